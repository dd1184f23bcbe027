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
from typing import Any, NamedTuple, TypeVar

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
    dtype: Any = None,
) -> tuple[Float[Array, "B L H d"], Float[Array, "B L H"]]:
    """The output (in `dtype`, None: that of q) and the log-sum-exp of each query's scores, very low if it sees none."""
    dtype = dtype or q.dtype
    rows, length, heads, width = q.shape
    q_blocks, k_blocks, v_blocks, q_where, k_where = _blocks(
        q, k, v, q_positions, k_positions, q_segments, k_segments, block
    )
    needed = _needed(q_where, k_where, causal)
    k_across = k_blocks.swapaxes(-1, -2)  # [blocks B K d S]

    def per_query_block(_: None, item: tuple[Array, _Where, Array]) -> tuple[None, tuple[Array, Array]]:
        q_block, where, row_needed = item

        def step(j: Array | int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, top, acc = carry
            mask = _mask(where, jax.tree.map(lambda a: a[j], k_where), causal)[:, None, None]  # B 1 1 L S
            scores = _dot("BKGLd,BKdS->BKGLS", q_block, k_across[j]) / math.sqrt(width)
            new_top = jnp.maximum(top, jnp.where(mask, scores, _LOW).max(-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            scale = jnp.exp(top - new_top)
            more = _dot("BKGLS,BKSd->BKGLd", weights.astype(v.dtype), v_blocks[j])
            return total * scale + weights.sum(-1), new_top, acc * scale[..., None] + more

        zero = jnp.zeros(q_block.shape[:-1], jnp.float32)
        start = (zero, jnp.full_like(zero, _LOW), jnp.zeros(q_block.shape, jnp.float32))
        total, top, acc = _loop(row_needed, step, start)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        return None, ((acc / total[..., None]).astype(dtype), jnp.where(seen, top + jnp.log(total), _LOW))

    _, (out, lse) = jax.lax.scan(per_query_block, None, (q_blocks, q_where, needed))
    lse = _unblock_heads(lse[..., None], length)[..., 0]
    return _unblock_heads(out, length).reshape(rows, length, heads, width), lse.reshape(rows, length, heads)


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
    dtype: Any = None,
) -> tuple[Float[Array, "B L H d"], Float[Array, "B S K d"], Float[Array, "B S K d"]]:
    """Gradients of q, k and v, in `dtype` or their own.

    `out` and `lse` may come from more keys than these: a ring over devices passes a part of them.
    """
    rows, length, heads, width = q.shape
    keys = k.shape[1]
    q_blocks, k_blocks, v_blocks, q_where, k_where = _blocks(
        q, k, v, q_positions, k_positions, q_segments, k_segments, block
    )
    needed = _needed(q_where, k_where, causal)
    size, shape = q_blocks.shape[-2], (rows, length, k.shape[2], heads // k.shape[2])
    mean = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)  # sum over keys of weight * d_weight
    d_out_blocks = _block_heads(d_out.reshape(*shape, width), size)
    lse_blocks, mean_blocks = (_block_heads(a.reshape(*shape, 1), size)[..., 0] for a in (lse, mean))
    q_across, d_out_across = (jnp.einsum("nBKGLd->nBKdGL", a) for a in (q_blocks, d_out_blocks))
    k_across = k_blocks.swapaxes(-1, -2)

    def per_key_block(d_q: Array, item: tuple[Array, Array, Array, _Where, Array]) -> tuple[Array, tuple[Array, Array]]:
        k_block, k_across, v_block, where, column_needed = item

        # Keys by queries, so that each of the five products multiplies rows by columns as they lie in memory.
        def step(i: Array | int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            mask = _mask(jax.tree.map(lambda a: a[i], q_where), where, causal).swapaxes(1, 2)[:, None, :, None]
            scores = _dot("BKSd,BKdGL->BKSGL", k_block, q_across[i]) / math.sqrt(width)
            weights = jnp.where(mask, jnp.exp(scores - lse_blocks[i][:, :, None]), 0.0)
            d_weights = _dot("BKSd,BKdGL->BKSGL", v_block, d_out_across[i])
            d_scores = (weights * (d_weights - mean_blocks[i][:, :, None]) / math.sqrt(width)).astype(q.dtype)
            d_v += _dot("BKSGL,BKGLd->BKSd", weights.astype(v.dtype), d_out_blocks[i])
            d_k += _dot("BKSGL,BKGLd->BKSd", d_scores, q_blocks[i])
            return d_q.at[i].add(_dot("BKdS,BKSGL->BKdGL", k_across, d_scores)), d_k, d_v

        zero = jnp.zeros(k_block.shape, jnp.float32)
        d_q, d_k, d_v = _loop(column_needed, step, (d_q, zero, zero))
        return d_q, (d_k.astype(dtype or k.dtype), d_v.astype(dtype or v.dtype))

    d_q, (d_k, d_v) = jax.lax.scan(
        per_key_block, jnp.zeros(q_across.shape, jnp.float32), (k_blocks, k_across, v_blocks, k_where, needed.T)
    )
    d_q = _unblock_heads(jnp.einsum("nBKdGL->nBKGLd", d_q), length).reshape(rows, length, heads, width)
    d_k, d_v = (_unblock_heads(a[:, :, :, None], keys)[..., 0, :] for a in (d_k, d_v))
    return d_q.astype(dtype or q.dtype), d_k, d_v


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
    k_blocks, v_blocks = (_block_heads(a[..., None, :], k_size)[:, :, :, 0] for a in (k, v))
    return (
        _block_heads(grouped, q_size),
        k_blocks,
        v_blocks,
        _Where(_block(q_positions, q_size), _block(q_segments, q_size)),
        _Where(_block(k_positions, k_size), _block(k_segments, k_size)),
    )


def _block(x: Array, size: int) -> Array:
    """[B L ...] to [blocks B size ...], zeros at the end."""
    missing = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _block_heads(x: Float[Array, "B L K G width"], size: int) -> Float[Array, "blocks B K G size width"]:
    """Blocks with the heads outside, so that a head's block is one matrix: XLA on a CPU is slow to turn it later."""
    return jnp.einsum("nBLKGd->nBKGLd", _block(x, size))


def _unblock_heads(x: Float[Array, "blocks B K G size width"], length: int) -> Float[Array, "B L K G width"]:
    """The inverse of `_block_heads`."""
    x = jnp.einsum("nBKGLd->BnLKGd", x)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _dot(pattern: str, a: Array, b: Array) -> Array:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _mask(q_where: _Where, k_where: _Where, causal: bool) -> Bool[Array, "B L S"]:
    """Which queries of a block see which keys of another."""
    segments = q_where.segments[:, :, None]
    mask = (segments == k_where.segments[:, None, :]) & (segments != 0)
    if causal:
        mask &= k_where.positions[:, None, :] <= q_where.positions[:, :, None]
    return mask


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
