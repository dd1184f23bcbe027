"""The slow, obvious attention: the oracle of every kernel test. Builds the whole L x S array of scores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from hico_jax.shapes import Array, Bool, Float, Int


def attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    *,
    q_positions: Int[Array, "B L"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B L"],
    k_segments: Int[Array, "B S"],
    causal: bool,
) -> Float[Array, "B L H d"]:
    """`softmax(q k / sqrt(d)) v` in float32; a query that sees no key gives zeros."""
    groups = q.shape[2] // k.shape[2]
    q32, k32, v32 = (a.astype(jnp.float32) for a in (q, jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)))
    scores = jnp.einsum("BLHd,BSHd->BHLS", q32, k32) / math.sqrt(q.shape[-1])
    mask = visible(q_positions, k_positions, q_segments, k_segments, causal=causal)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("BHLS,BSHd->BLHd", jnp.where(mask, weights, 0.0), v32).astype(q.dtype)


def visible(
    q_positions: Int[Array, "B L"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B L"],
    k_segments: Int[Array, "B S"],
    *,
    causal: bool,
) -> Bool[Array, "B L S"]:
    """Which keys each query sees: those of its own non-zero segment, up to its own position when `causal`."""
    mask = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    return mask & (k_positions[:, None, :] <= q_positions[:, :, None]) if causal else mask
