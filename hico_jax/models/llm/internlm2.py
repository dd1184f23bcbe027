"""InternLM2 and InternLM2.5: Qwen2 without biases, queries, keys and values from one matrix, dynamic rotary scaling.

In: a `Stream` of embeddings. Out: the stream after all layers and the last norm (hidden states, not logits).
Next: hico_jax/models/llm/decoder.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.kernels.decode import contract
from hico_jax.models import layers
from hico_jax.models.llm import qwen2
from hico_jax.models.llm.decoder import Place
from hico_jax.parallel.sharding import shard
from hico_jax.shapes import Array, Float, Int

PADDING = 2  # `padding_idx` of the reference's embedding: this row is never trained


@dataclasses.dataclass(frozen=True)
class InternLM2Config(qwen2.Qwen2Config):
    """Sizes of one InternLM2."""

    arch: ClassVar[str] = "internlm2"
    norm_eps: float = 1e-5
    rope_kind: str = "dynamic"
    rope_factor: float = 2.0

    @property
    def torch_sizes(self) -> dict[str, int]:
        """Sizes that the rules of `TORCH_NAMES` split axes by."""
        return {
            "H": self.num_heads, "K": self.num_kv_heads, "d": self.head_dim,
            "g": self.num_heads // self.num_kv_heads + 2,
        }  # fmt: skip

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> InternLM2Config:
        """From the dict of a released `config.json`, or from its `llm_config`.

        Raises:
          ValueError: a size is missing, or the file asks for something this module does not do.
        """
        if config.get("bias", False):
            raise ValueError("config.json has bias true for InternLM2; only layers without biases are built")
        plain = qwen2.Qwen2Config.from_hf({**config, "rope_scaling": None})
        return cls(**dataclasses.asdict(plain) | no_scaling() | qwen2.rope_scaling(config, ("dynamic",)))

    def build(self, *, rngs: nnx.Rngs) -> InternLM2:
        """The language model with random weights."""
        return InternLM2(self, rngs=rngs)

    def block(self, *, rngs: nnx.Rngs) -> qwen2.Block:
        """One decoder layer with random weights."""
        return qwen2.Block(self, Attention(self, rngs=rngs), rngs=rngs)


def no_scaling() -> dict[str, Any]:
    """The rotary fields of a model whose `rope_scaling` is null."""
    return {"rope_kind": "default", "rope_factor": 1.0, "rope_original": 32768}


VARIANTS = {
    "internlm2.5-7b": InternLM2Config(
        vocab_size=92553,
        embed_dim=4096,
        mlp_dim=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    ),
    "tiny": InternLM2Config(
        vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
    ),
}


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and no bias. Each key/value head owns its queries: [q ... k v]."""

    def __init__(self, config: InternLM2Config, *, rngs: nnx.Rngs) -> None:
        dim, heads, kv_heads, width = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        fused = layers.normal(rngs, (dim, kv_heads, heads // kv_heads + 2, width), config.init_std)
        out = layers.normal(rngs, (heads, width, dim), config.init_std)
        self.wqkv = layers.param(fused, ("embed", "kv_heads", None, "head_dim"))
        self.wo = layers.param(out, ("heads", "head_dim", "embed"))

    def _fused(self, x: Any) -> Float[Array, "B L K g d"]:
        """Called for queries and keys and again for values; the compiler computes it once."""
        return contract("BLD,DKgd->BLKgd", x, self.wqkv[...])

    def query_key(
        self, x: Float[Array, "B L D"], place: Place
    ) -> tuple[Float[Array, "B L H d"], Float[Array, "B L K d"]]:
        """Rotated queries and keys."""
        return _query_key(self._fused(x), place)

    def value(self, x: Float[Array, "B L D"]) -> Float[Array, "B L K d"]:
        return shard(self._fused(x)[..., -1, :], "batch", "length", "kv_heads", None)

    def query_key_value(self, x: Any, place: Place) -> tuple[Array, Array, Array]:
        fused = self._fused(x)
        return *_query_key(fused, place), shard(fused[..., -1, :], "batch", "length", "kv_heads", None)

    def out(self, mixed: Float[Array, "B L H d"], add: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return contract("BLHd,HdD->BLD", mixed, self.wo[...], add)


def _query_key(fused: Float[Array, "B L K g d"], place: Place) -> tuple[Array, Array]:
    q = fused[..., :-2, :].reshape(*fused.shape[:2], -1, fused.shape[-1])
    q = layers.rotate(q, place.cos, place.sin)
    k = layers.rotate(fused[..., -2, :], place.cos, place.sin)
    return shard(q, "batch", "length", "heads", None), shard(k, "batch", "length", "kv_heads", None)


class InternLM2(qwen2.Qwen2):
    """Embedding, stacked blocks, last norm, unembedding."""

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        x = super().embed(tokens)
        return jnp.where((tokens == PADDING)[..., None], jax.lax.stop_gradient(x), x)


_ROOT = "language_model.model"
_LAYER = f"{_ROOT}.layers.{{i}}"
TORCH_NAMES = (
    Rule(f"{_ROOT}.tok_embeddings.weight", "llm/embedding"),
    Rule(f"{_LAYER}.attention_norm.weight", "llm/blocks/input_norm/scale"),
    Rule(f"{_LAYER}.attention.wqkv.weight", "llm/blocks/attn/wqkv", "(K g d) D -> D K g d"),
    Rule(f"{_LAYER}.attention.wo.weight", "llm/blocks/attn/wo", "D (H d) -> H d D"),
    Rule(f"{_LAYER}.ffn_norm.weight", "llm/blocks/post_norm/scale"),
    Rule(f"{_LAYER}.feed_forward.w1.weight", "llm/blocks/mlp/gate", "F D -> D F"),
    Rule(f"{_LAYER}.feed_forward.w3.weight", "llm/blocks/mlp/up", "F D -> D F"),
    Rule(f"{_LAYER}.feed_forward.w2.weight", "llm/blocks/mlp/down", "D F -> F D"),
    Rule(f"{_ROOT}.norm.weight", "llm/norm/scale"),
    Rule("language_model.output.weight", "llm/unembedding", "V D -> D V", optional=True),
)
