"""Attention as the models call it: grouped heads, positions and segments as the mask, a kernel picked by platform.

In: projected and rotated q, k, v. Out: the mixed values, still split into heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hico_jax.kernels import backends, blockwise, cudnn, decode, ring, splash
from hico_jax.parallel import context, sharding
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
    plain: bool = False,
) -> Float[Array, "B L H d"]:
    """`softmax(q k / sqrt(d)) v`; no positions count from 0, no segments are one segment, segment 0 is padding.

    A padding query gives zeros. On a GPU in half precision cuDNN runs long rows wherever its masks can say what
    ours say: no mask, causal, and padding on the right. Everything else runs blockwise (short rows: one block).

    Args:
      plain: the caller knows that every row is one segment of rising positions, then padding.
    """
    if causal and q_segments is not None and q_segments is k_segments and (sharding.ring() > 1 or _tiled(q)):
        assert q_positions is not None
        assert q_positions is k_positions
        return _attend_over_devices(q, k, v, q_positions, q_segments)
    (rows, length), keys = q.shape[:2], k.shape[1]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fused = jax.default_backend() == "gpu" and half and length > blockwise.BLOCK and q.shape[-1] in range(8, 129, 8)
    if fused and all(a is None for a in (q_positions, k_positions, q_segments, k_segments)):
        return cudnn.attention(q, k, v, causal)
    where = {
        "q_positions": _default(q_positions, jnp.arange(length, dtype=jnp.int32), (rows, length)),
        "k_positions": _default(k_positions, jnp.arange(keys, dtype=jnp.int32), (rows, keys)),
        "q_segments": _default(q_segments, jnp.ones(length, jnp.int32), (rows, length)),
        "k_segments": _default(k_segments, jnp.ones(keys, jnp.int32), (rows, keys)),
    }
    blocks = functools.partial(blockwise.attention, **where, causal=causal)
    if fused and q_positions is k_positions and q_segments is k_segments and q_segments is not None:
        flash = functools.partial(_fused, segments=q_segments, causal=causal)
        if plain:
            return flash(q, k, v)
        # Only the data tell whether rows are packed, so both programs are kept and one runs.
        return jax.lax.cond(_right_padded(where["q_positions"], q_segments), flash, blocks, q, k, v)
    return blocks(q, k, v)


def _attend_over_devices(q: Array, k: Array, v: Array, positions: Array, segments: Array) -> Array:
    """Causal attention over rows that are split over devices, dealt as `parallel/zigzag.py` deals.

    Raises:
      ValueError: the length does not make two equal chunks a device, or heads do not divide by the tensor axis.
    """
    count, tensor = sharding.ring(), sharding.sizes().get("tensor", 1)
    length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if length % (2 * count):
        raise ValueError(
            f"rows of {length} tokens cannot be split over mesh.sequence={count}; make their length a multiple of "
            f"{2 * count} (data.length_step)"
        )
    if heads % tensor or kv_heads % tensor:
        raise ValueError(
            f"{heads} heads and {kv_heads} key/value heads cannot be split over mesh.tensor={tensor}; "
            f"use a divisor of {math.gcd(heads, kv_heads)}"
        )
    gathered_bytes = (
        2 * k.size * k.dtype.itemsize // (tensor * max(1, math.prod(sharding.sizes().values()) // tensor // count))
    )
    run = functools.partial(
        ring.attention, axis=sharding.SEQUENCE, size=count, strategy=context.strategy(gathered_bytes),
        backend=backends.pick(q.dtype, q.shape[3], length // count, sharding.platform()),
    )  # fmt: skip
    if not sharding.sizes():
        return run(q, k, v, positions, segments)
    row = ("batch", "length")
    axes = ((*row, "heads"), (*row, "kv_heads"), (*row, "kv_heads"), row, row)
    return sharding.local(run, q, k, v, positions, segments, axes=axes, out=(*row, "heads"))


def _tiled(q: Array) -> bool:
    """Whether whole rows have a TPU's kernels too: of queries in their order, as a ring of one device."""
    return sharding.platform() == "tpu" and backends.pick(q.dtype, q.shape[3], q.shape[1], "tpu") is splash.BACKEND


def _default(given: Array | None, value: Array, shape: tuple[int, int]) -> Array:
    return jnp.broadcast_to(value, shape) if given is None else given


def _right_padded(positions: Int[Array, "B L"], segments: Int[Array, "B L"]) -> Bool[Array, ""]:
    """Whether every row is one segment with rising positions, then padding."""
    real = segments != 0
    first = jnp.arange(segments.shape[1]) < real.sum(1, keepdims=True)
    rising = positions[:, 1:] > positions[:, :-1]
    return (segments == jnp.where(first, segments[:, :1], 0)).all() & (rising | ~real[:, 1:]).all()


def _fused(q: Array, k: Array, v: Array, *, segments: Int[Array, "B L"], causal: bool) -> Array:
    real = segments != 0
    if causal:  # padding stands where no real query looks, and cuDNN is faster without lengths
        out: Any = cudnn.attention(q, k, v, True)
    else:
        lengths = jnp.maximum(real.sum(1, dtype=jnp.int32), 1)  # cuDNN divides by zero over no key
        out = jax.nn.dot_product_attention(
            q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    return jnp.where(real[..., None, None], out, jnp.zeros((), out.dtype))


def attend_one(
    q: Float[Array, "B 1 H d"],
    k: Float[Array, "*N B K S d"],
    v: Float[Array, "*N B K S d"],
    visible: Bool[Array, "B S"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B 1 H d"]:
    """One query per row over a cache whose keys lie head by head. Every row must see at least one key.

    With `layer`, the cache is the stack of all layers.
    """
    if layer is not None and decode.runs(q) and k.dtype == q.dtype and q.shape[2] // k.shape[2] <= decode.QUERIES:
        out = decode.attention(q[:, 0], k, v, layer, visible, interpret=jax.default_backend() == "cpu")
        return out[:, None].astype(q.dtype)
    if layer is not None:
        k, v = k[layer], v[layer]
    if sharding.ring() > 1:
        run = functools.partial(_attend_one, axis=sharding.SEQUENCE)
        keys = ("batch", "kv_heads", "length")
        row = ("batch", None, "heads")
        return sharding.local(run, q, k, v, visible, axes=(row, keys, keys, ("batch", "length")), out=row)
    return _attend_one(q, k, v, visible)


def _attend_one(q: Array, k: Array, v: Array, visible: Array, axis: str | None = None) -> Array:
    """With an axis, keys are split over its devices and their partial softmaxes are added up."""
    rows, _, heads, width = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("BKGd,BKSd->BKGS", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(width)
    scores = jnp.where(visible[:, None, None], scores, -1e30)
    if axis is None:
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("BKGS,BKSd->BKGd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    else:
        weights = jnp.exp(scores - jax.lax.pmax(scores.max(-1, keepdims=True), axis))
        out = jnp.einsum("BKGS,BKSd->BKGd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out, total = jax.lax.psum((out, weights.sum(-1)), axis)
        out = out / total[..., None]
    return out.reshape(rows, 1, heads, width).astype(q.dtype)


MOST_WEIGHTS = 1 << 27  # that `attend_some` holds at once


def weights_of(
    q: Float[Array, "B 1 H d"], k: Float[Array, "B K S d"], visible: Bool[Array, "B S"]
) -> Float[Array, "B S"]:
    """How much one query per row attends to each key, mean over heads, in float32."""
    rows, _, heads, width = q.shape
    grouped = q.reshape(rows, k.shape[1], heads // k.shape[1], width)
    scores = jnp.einsum("BKGd,BKSd->BKGS", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(width)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1)
    return jnp.where(visible, weights.mean((1, 2)), 0.0)


def attend_some(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    q_segments: Int[Array, "B Q"],
    k_segments: Int[Array, "B S"],
    first: int | Int[Array, ""],
) -> Float[Array, "B Q H d"]:
    """A few queries, whose own keys stand from place `first` on, over a cache whose keys lie head by head.

    Few enough queries run at once that no more than `MOST_WEIGHTS` weights exist. A padding query gives zeros.
    """
    rows, count, heads, width = q.shape
    kv_heads, keys = k.shape[1:3]
    at_once = max(1, min(count, MOST_WEIGHTS // (rows * heads * keys)))
    at_once = next(n for n in range(at_once, 0, -1) if count % n == 0)
    place = jnp.arange(keys, dtype=jnp.int32)

    def some(part: tuple[Array, Array, Array]) -> Array:
        q, segments, index = part
        grouped = q.reshape(rows, at_once, kv_heads, heads // kv_heads, width)
        seen = (segments[..., None] == k_segments[:, None]) & (place <= first + index[:, None])  # B q S
        scores = jnp.einsum("BqKGd,BKSd->BKGqS", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(width)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), axis=-1)
        out = jnp.einsum("BKGqS,BKSd->BqKGd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out = jnp.where(segments[..., None, None, None] != 0, out, 0.0)
        return out.reshape(rows, at_once, heads, width).astype(q.dtype)

    def cut(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(rows, -1, at_once, *a.shape[2:]), 1, 0)

    index = jnp.arange(count, dtype=jnp.int32).reshape(-1, at_once)
    out = jax.lax.map(some, (cut(q), cut(q_segments), index))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


Flash = Callable[[Array, Array, Array], tuple[Array, Array]]  # the output in float32, and its log-sum-exp [B Q H]


def attend_piece(
    q: Float[Array, "B Q H d"], k: Float[Array, "B K S d"], v: Float[Array, "B K S d"], first: int | Int[Array, ""]
) -> Float[Array, "B Q H d"]:
    """`attend_some` where every place up to a query's own is seen: rows of one segment.

    On a GPU in half precision cuDNN runs the places before the piece, a block as long as the piece at a time; what no
    query sees is not visited.
    """
    count = q.shape[1]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() == "gpu" and half and cudnn.fits(q.shape[3], count) and k.shape[2] >= 2 * count:
        ones = jnp.ones(q.shape[:2], jnp.int32)
        return _attend_blocks(q, k, v, first, lambda q, k, v: cudnn.forward(q, k, v, ones, ones, None))
    ones = jnp.ones((q.shape[0], k.shape[2]), jnp.int32)
    return attend_some(q, k, v, ones[:, :count], ones, first)


def _attend_blocks(q: Array, k: Array, v: Array, first: int | Array, flash: Flash) -> Array:
    """Whole blocks before the piece by `flash`, the rest and the piece itself blockwise, joined by their log-sums."""
    rows, size = q.shape[:2]
    whole = jnp.asarray(first, jnp.int32) // size
    tail = jnp.minimum(whole * size, k.shape[2] - 2 * size)

    def cut(a: Array, start: Array, count: int) -> Array:
        return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(a, start, count, axis=2), 1, 2)

    def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        more, its = flash(q, cut(k, j * size, size), cut(v, j * size, size))
        both = jnp.logaddexp(lse, its)
        return out * jnp.exp(lse - both)[..., None] + more * jnp.exp(its - both)[..., None], both

    places = jnp.broadcast_to(tail + jnp.arange(2 * size, dtype=jnp.int32), (rows, 2 * size))
    mine = jnp.broadcast_to(jnp.asarray(first, jnp.int32) + jnp.arange(size, dtype=jnp.int32), (rows, size))
    begun = blockwise.forward(
        q, cut(k, tail, 2 * size), cut(v, tail, 2 * size), mine, places, jnp.ones_like(mine),
        (places >= whole * size).astype(jnp.int32), causal=True, dtype=jnp.float32,
    )  # fmt: skip
    return jax.lax.fori_loop(0, whole, step, begun)[0].astype(q.dtype)
