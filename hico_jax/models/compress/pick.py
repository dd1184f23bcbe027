"""Keeping some patches: evenly, those that others look at (after VisionZip), or those that change (after DyCoke).

The towers here hand over features, not their attention or keys, so what a patch is worth is judged on the features: a
patch is looked at by those it is similar to. The published methods read the tower's last attention.

In: patches of clips or image tiles `[B P E]`. Out: `[B M E]` in the order of their places. No parameters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.models.compress import grid
from hico_jax.shapes import Array, Float, Int

KINDS = ("even", "salient", "novel")
DOMINANT = 54 / 64  # of VisionZip's tokens; the others are means of what is left


@dataclasses.dataclass(frozen=True)
class PickConfig:
    """How many tokens remain, and which.

    "even": evenly spaced patches of each frame. "salient": the patches of each frame that the others attend to most,
    and means of the rest by similarity (VisionZip, arXiv 2412.04467). "novel": half from the clip's first frame,
    evenly, and half where the later frames differ most from the frame before (DyCoke, arXiv 2411.15024).
    """

    arch: ClassVar[str] = "pick"

    tokens_per_frame: int = 16
    tokens_per_image: int = 64
    kind: str = "even"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"compressor.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")

    def build(self, *, num_heads: int) -> Pick:
        """The compressor for a tower of `num_heads` heads."""
        return Pick(self.kind, num_heads)


VARIANTS = {
    "even16": PickConfig(),
    "salient16": PickConfig(kind="salient"),
    "novel16": PickConfig(kind="novel"),
    "nano": PickConfig(4, 16),
    "tiny": PickConfig(1, 2, "salient"),
}
TORCH_NAMES: tuple[Rule, ...] = ()


class Pick(nnx.Module):
    """A choice of patches. Gradients flow through values, never through the choice."""

    def __init__(self, kind: str, num_heads: int) -> None:
        self.kind, self.num_heads = kind, num_heads

    def __call__(self, patches: Float[Array, "B P E"], num_tokens: int, num_frames: int = 1) -> Float[Array, "B M E"]:
        per_frame, kept = grid.check(patches.shape[1], num_tokens, num_frames)
        if num_tokens == patches.shape[1]:
            return patches
        frames = patches.reshape(-1, per_frame, patches.shape[-1])  # (B T) P E
        if self.kind == "novel" and num_frames > 1:
            return novel(patches.reshape(-1, num_frames, per_frame, patches.shape[-1]), num_tokens)
        if self.kind == "salient":
            found = salient(frames, kept, self.num_heads)
        else:
            found = frames[:, grid.evenly(per_frame, kept)]
        return found.reshape(patches.shape[0], num_tokens, -1)


def salient(x: Float[Array, "B P E"], kept: int, num_heads: int) -> Float[Array, "B M E"]:
    """The most attended patches in order of place, then means of the others around evenly spaced ones of them."""
    dominant = min(kept, max(1, round(DOMINANT * kept)))
    worth = received(x, num_heads)
    order = jnp.argsort(-worth, axis=1, stable=True)
    first = jnp.sort(order[:, :dominant], axis=1)
    chosen = jnp.take_along_axis(x, first[..., None], axis=1)
    if dominant == kept:
        return chosen
    rest = jnp.sort(order[:, dominant:], axis=1)
    others = jnp.take_along_axis(x, rest[..., None], axis=1)
    centres = others[:, grid.evenly(others.shape[1], kept - dominant)]
    likeness = jnp.einsum("BAE,BSE->BAS", _unit(others), _unit(centres), precision="highest")
    joins = jax.nn.one_hot(jnp.argmax(likeness, -1), kept - dominant, dtype=jnp.float32)
    total = jnp.einsum("BAS,BAE->BSE", joins, others.astype(jnp.float32), precision="highest")
    means = total / jnp.maximum(joins.sum(1), 1)[..., None]
    return jnp.concatenate([chosen, means.astype(x.dtype)], axis=1)


def received(x: Float[Array, "B P E"], num_heads: int) -> Float[Array, "B P"]:
    """Attention that each patch receives from all, with the features as queries and keys; mean over heads."""
    heads = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(*x.shape[:2], num_heads, -1)
    raw = jnp.einsum("BAHd,BSHd->BHAS", heads, heads, precision="highest") / math.sqrt(heads.shape[-1])
    return jax.nn.softmax(raw, axis=-1).mean((1, 2))


def novel(x: Float[Array, "B T P E"], num_tokens: int) -> Float[Array, "B M E"]:
    """Half of the tokens from the first frame, evenly; half where later frames differ most from the one before."""
    batch, frames, per_frame, width = x.shape
    still = min(per_frame, -(-num_tokens // 2))
    unit = _unit(x)
    change = 1 - jnp.einsum("BTPE,BTPE->BTP", unit[:, 1:], unit[:, :-1], precision="highest")
    order = jnp.argsort(-change.reshape(batch, -1), axis=1, stable=True)[:, : num_tokens - still]
    later = jnp.sort(order, axis=1) + per_frame
    first = jnp.broadcast_to(jnp.asarray(grid.evenly(per_frame, still)), (batch, still))
    index: Int[Array, "B M"] = jnp.concatenate([first, later.astype(jnp.int32)], axis=1)
    return jnp.take_along_axis(x.reshape(batch, frames * per_frame, width), index[..., None], axis=1)


def _unit(x: Array) -> Array:
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)
