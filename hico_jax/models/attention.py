"""Attention as the models call it: grouped heads, positions and segments as the mask, a kernel picked by platform.

In: projected and rotated q, k, v. Out: the mixed values, still split into heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from hico_jax.kernels import blockwise
from hico_jax.shapes import Array, Bool, Float, Int


def attend(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    *,
    causal: bool = True,
    q_positions: Int[Array, "B L"] | None = None,
    k_positions: Int[Array, "B S"] | None = None,
    q_segments: Int[Array, "B L"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B L H d"]:
    """`softmax(q k / sqrt(d)) v`; no positions count from 0, no segments are one segment, segment 0 is padding.

    A padding query gives zeros.
    """
    (rows, length), keys = q.shape[:2], k.shape[1]
    q_positions = _default(q_positions, jnp.arange(length, dtype=jnp.int32), (rows, length))
    k_positions = _default(k_positions, jnp.arange(keys, dtype=jnp.int32), (rows, keys))
    q_segments = _default(q_segments, jnp.ones(length, jnp.int32), (rows, length))
    k_segments = _default(k_segments, jnp.ones(keys, jnp.int32), (rows, keys))
    return blockwise.attention(
        q, k, v, q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments,
        causal=causal,
    )


def _default(given: Array | None, value: Array, shape: tuple[int, int]) -> Array:
    return jnp.broadcast_to(value, shape) if given is None else given


def attend_one(
    q: Float[Array, "B 1 H d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B 1 H d"]:
    """One query per row over a cache whose keys lie head by head. Every row must see at least one key."""
    rows, _, heads, width = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("BKGd,BKSd->BKGS", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(width)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1)
    out = jnp.einsum("BKGS,BKSd->BKGd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(rows, 1, heads, width).astype(q.dtype)
