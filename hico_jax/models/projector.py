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

TORCH_NAMES = (
    Rule("model.mm_projector.mlp.0.weight", "projector/first/w", "D E -> E D"),
    Rule("model.mm_projector.mlp.0.bias", "projector/first/b"),
    Rule("model.mm_projector.mlp.2.weight", "projector/second/w", "O D -> D O"),
    Rule("model.mm_projector.mlp.2.bias", "projector/second/b"),
)


class Projector(nnx.Module):
    """`second(gelu(first(x)))`."""

    def __init__(self, vision_dim: int, embed_dim: int, *, rngs: nnx.Rngs) -> None:
        self.first = layers.Linear(vision_dim, embed_dim, ("vision_embed", "embed"), rngs=rngs)
        self.second = layers.Linear(embed_dim, embed_dim, ("embed", None), rngs=rngs)

    def __call__(self, tokens: Float[Array, "*lead E"]) -> Float[Array, "*lead D"]:
        return self.second(layers.gelu(self.first(tokens)))
