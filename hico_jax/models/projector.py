"""The bridge from merged visual tokens to the language model's width: two linear layers and a GELU.

The reference's `tome16_mlp_hd64` without its merging, which is `models/compress/tome.py`.

In: merged tokens. Out: the same tokens at the language model's width, ready to stand among the text.
Next: hico_jax/models/llm/qwen2.py
"""

from __future__ import annotations

from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.models import layers
from hico_jax.shapes import Array, Float

KINDS = ("mlp", "norm_mlp")
TORCH_NAMES = (
    Rule("model.mm_projector.mlp.0.weight", "projector/first/w", "D E -> E D"),
    Rule("model.mm_projector.mlp.0.bias", "projector/first/b"),
    Rule("model.mm_projector.mlp.2.weight", "projector/second/w", "O D -> D O"),
    Rule("model.mm_projector.mlp.2.bias", "projector/second/b"),
)
NORMED_TORCH_NAMES = (
    Rule("mlp1.0.weight", "projector/norm/scale"),
    Rule("mlp1.0.bias", "projector/norm/bias"),
    Rule("mlp1.1.weight", "projector/first/w", "D E -> E D"),
    Rule("mlp1.1.bias", "projector/first/b"),
    Rule("mlp1.3.weight", "projector/second/w", "O D -> D O"),
    Rule("mlp1.3.bias", "projector/second/b"),
)


def torch_names(kind: str) -> tuple[Rule, ...]:
    """The table of a kind of projector."""
    return {"mlp": TORCH_NAMES, "norm_mlp": NORMED_TORCH_NAMES}[kind]


class Projector(nnx.Module):
    """`second(gelu(first(x)))`; with a norm in front in the InternVL models (`mlp1`)."""

    def __init__(self, vision_dim: int, embed_dim: int, *, normed: bool = False, rngs: nnx.Rngs) -> None:
        self.norm = layers.LayerNorm(vision_dim, eps=1e-5, axis="vision_embed") if normed else None
        self.first = layers.Linear(vision_dim, embed_dim, ("vision_embed", "embed"), rngs=rngs)
        self.second = layers.Linear(embed_dim, embed_dim, ("embed", None), rngs=rngs)

    def __call__(self, tokens: Float[Array, "*lead E"]) -> Float[Array, "*lead D"]:
        tokens = tokens if self.norm is None else self.norm(tokens)
        return self.second(layers.gelu(self.first(tokens)))
