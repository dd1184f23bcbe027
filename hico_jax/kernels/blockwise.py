"""Exact attention without an L x S array: online softmax over key blocks inside a loop over query blocks.

The idea is FlashAttention's (Dao et al., 2022): keep a running maximum and sum per query, save only the output
and the log of the sum, and recompute the weights of a block when its gradient is needed. Blocks no query can
see are not visited. Plain XLA, so it runs everywhere.

`forward` and `backward` are public because a ring over devices is made of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hico_jax.shapes import Array, Bool, Float, Int

SAVED = "attention"  # name of what a recomputing caller may keep: the output and its log-sum
BLOCK = 512
_LOW = -1e30  # below every score, yet finite: differences of it are never NaN
C = TypeVar("C")


class _Where(NamedTuple):
    """Positions and segments of one side, in blocks: [blocks B block]."""

    positions: Array
    segments: Array


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
    block: int = BLOCK,
) -> Float[Array, "B L H d"]:
    """`softmax(q k / sqrt(d)) v`; a query that sees no key gives zeros and passes no gradient."""
    return _attention(causal, block, q, k, v, q_positions, k_positions, q_segments, k_segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(causal: bool, block: int, q: Array, k: Array, v: Array, *mask: Array) -> Array:
    return forward(q, k, v, *mask, causal=causal, block=block)[0]


def _attention_fwd(causal: bool, block: int, q: Array, k: Array, v: Array, *mask: Array) -> tuple[Array, tuple]:
    out, lse = forward(q, k, v, *mask, causal=causal, block=block)
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, out, lse, mask)


def _attention_bwd(causal: bool, block: int, saved: tuple, d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, out, lse, mask = saved
    return *backward(q, k, v, out, lse, d_out, *mask, causal=causal, block=block), *(None for _ in mask)


_attention.defvjp(_attention_fwd, _attention_bwd)


def forward(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    q_positions: Int[Array, "B L"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B L"],
    k_segments: Int[Array, "B S"],
    *,
    causal: bool,
    block: int = BLOCK,
) -> tuple[Float[Array, "B L H d"], Float[Array, "B L H"]]:
    """The output and the log-sum-exp of each query's scores (very low where a query sees no key)."""
    rows, length, heads, width = q.shape
    q_blocks, k_blocks, v_blocks, q_where, k_where = _blocks(
        q, k, v, q_positions, k_positions, q_segments, k_segments, block
    )
    needed = _needed(q_where, k_where, causal)

    def per_query_block(_: None, item: tuple[Array, _Where, Array]) -> tuple[None, tuple[Array, Array]]:
        q_block, where, row_needed = item

        def step(j: Array | int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, top, acc = carry
            scores, mask = _scores(q_block, k_blocks[j], where, jax.tree.map(lambda a: a[j], k_where), causal)
            new_top = jnp.maximum(top, jnp.where(mask, scores, _LOW).max(-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            scale = jnp.exp(top - new_top)
            more = _dot("BKGLS,BSKd->BKGLd", weights.astype(v.dtype), v_blocks[j])
            return total * scale + weights.sum(-1), new_top, acc * scale[..., None] + more

        shape = (rows, *q_block.shape[2:4], q_block.shape[1])  # B K G L
        zero = jnp.zeros(shape, jnp.float32)
        start = (zero, jnp.full_like(zero, _LOW), jnp.zeros((*shape, width), jnp.float32))
        total, top, acc = _loop(row_needed, step, start)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        out = jnp.einsum("BKGLd->BLKGd", acc / total[..., None]).astype(q.dtype)
        return None, (out, jnp.einsum("BKGL->BLKG", jnp.where(seen, top + jnp.log(total), _LOW)))

    _, (out, lse) = jax.lax.scan(per_query_block, None, (q_blocks, q_where, needed))
    return _unblock(out, length).reshape(rows, length, heads, width), _unblock(lse, length).reshape(rows, length, heads)


def backward(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    out: Float[Array, "B L H d"],
    lse: Float[Array, "B L H"],
    d_out: Float[Array, "B L H d"],
    q_positions: Int[Array, "B L"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B L"],
    k_segments: Int[Array, "B S"],
    *,
    causal: bool,
    block: int = BLOCK,
) -> tuple[Float[Array, "B L H d"], Float[Array, "B S K d"], Float[Array, "B S K d"]]:
    """Gradients of q, k and v. `out` and `lse` may come from more keys than these (a ring passes part of them)."""
    rows, length, heads, width = q.shape
    keys = k.shape[1]
    q_blocks, k_blocks, v_blocks, q_where, k_where = _blocks(
        q, k, v, q_positions, k_positions, q_segments, k_segments, block
    )
    needed = _needed(q_where, k_where, causal)
    size, shape = q_blocks.shape[2], (*q.shape[:2], *q_blocks.shape[3:5])
    mean = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)  # sum over keys of weight * d_weight
    d_out_blocks = _block(d_out.reshape(*shape, width), size)
    lse_blocks, mean_blocks = (_block(a.reshape(shape), size) for a in (lse, mean))

    def per_key_block(d_q: Array, item: tuple[Array, Array, _Where, Array]) -> tuple[Array, tuple[Array, Array]]:
        k_block, v_block, where, column_needed = item

        def step(i: Array | int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            q_block, d_out_block = q_blocks[i], d_out_blocks[i]
            scores, mask = _scores(q_block, k_block, jax.tree.map(lambda a: a[i], q_where), where, causal)
            lse_i, mean_i = (jnp.einsum("BLKG->BKGL", a[i])[..., None] for a in (lse_blocks, mean_blocks))
            weights = jnp.where(mask, jnp.exp(scores - lse_i), 0.0)
            d_weights = _dot("BLKGd,BSKd->BKGLS", d_out_block, v_block)
            d_scores = (weights * (d_weights - mean_i) / math.sqrt(width)).astype(q.dtype)
            d_v += _dot("BKGLS,BLKGd->BSKd", weights.astype(v.dtype), d_out_block)
            d_k += _dot("BKGLS,BLKGd->BSKd", d_scores, q_block)
            return d_q.at[i].add(_dot("BKGLS,BSKd->BLKGd", d_scores, k_block)), d_k, d_v

        zero = jnp.zeros(k_block.shape, jnp.float32)
        d_q, d_k, d_v = _loop(column_needed, step, (d_q, zero, zero))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q, (d_k, d_v) = jax.lax.scan(
        per_key_block, jnp.zeros(q_blocks.shape, jnp.float32), (k_blocks, v_blocks, k_where, needed.T)
    )
    d_q = _unblock(d_q, length).reshape(rows, length, heads, width).astype(q.dtype)
    return d_q, _unblock(d_k, keys), _unblock(d_v, keys)


def _blocks(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    k_positions: Array,
    q_segments: Array,
    k_segments: Array,
    block: int,
) -> tuple[Array, Array, Array, _Where, _Where]:
    """Cut everything into blocks along its length; padding gets segment 0, which nothing sees."""
    kv_heads = k.shape[2]
    assert q.shape[2] % kv_heads == 0, (q.shape, k.shape)
    q_size, k_size = min(block, q.shape[1]), min(block, k.shape[1])
    grouped = q.reshape(*q.shape[:2], kv_heads, q.shape[2] // kv_heads, q.shape[3])
    return (
        _block(grouped, q_size),
        _block(k, k_size),
        _block(v, k_size),
        _Where(_block(q_positions, q_size), _block(q_segments, q_size)),
        _Where(_block(k_positions, k_size), _block(k_segments, k_size)),
    )


def _block(x: Array, size: int) -> Array:
    """[B L ...] to [blocks B size ...], zeros at the end."""
    missing = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _unblock(x: Array, length: int) -> Array:
    """The inverse of `_block`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _dot(pattern: str, a: Array, b: Array) -> Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, q_where: _Where, k_where: _Where, causal: bool) -> tuple[Array, Array]:
    """Scaled scores of one block pair and which of them count."""
    scores = _dot("BLKGd,BSKd->BKGLS", q, k) / math.sqrt(q.shape[-1])
    segments = q_where.segments[:, :, None]
    mask = (segments == k_where.segments[:, None, :]) & (segments != 0)
    if causal:
        mask &= k_where.positions[:, None, :] <= q_where.positions[:, :, None]
    return scores, mask[:, None, None]


def _needed(q_where: _Where, k_where: _Where, causal: bool) -> Bool[Array, "query_blocks key_blocks"]:
    """Whether any query of a block may see any key of another, from each block's extremes alone."""

    def extremes(where: _Where) -> tuple[_Where, _Where]:
        """Lowest and highest of each block [blocks B]; a block of padding has low above every high."""
        real, big = where.segments != 0, jnp.iinfo(jnp.int32).max
        low = (jnp.where(real, a, big).min(-1) for a in where)
        high = (jnp.where(real, a, -1).max(-1) for a in where)
        return _Where(*low), _Where(*high)

    q_low, q_high = (_Where(*(a[:, None] for a in e)) for e in extremes(q_where))
    k_low, k_high = extremes(k_where)
    needed = (q_low.segments <= k_high.segments) & (k_low.segments <= q_high.segments)
    if causal:
        needed &= k_low.positions <= q_high.positions
    return needed.any(-1)


def _loop(needed: Bool[Array, " blocks"], step: Callable[[Array | int, C], C], carry: C) -> C:
    """Fold `step` over the blocks from the first needed one to the last."""
    count = needed.shape[0]
    if count == 1:
        return step(0, carry)
    first, last = jnp.argmax(needed), count - jnp.argmax(needed[::-1])
    return jax.lax.fori_loop(first, jnp.where(needed.any(), last, first), step, carry)
