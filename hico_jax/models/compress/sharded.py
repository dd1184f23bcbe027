"""Video-level compression of rows that are split over devices: the functions of `progressive.py`, inside `local`.

A device holds two chunks of a row, in row order each (`parallel/zigzag.py`). Neighbours swap the tokens at the edges of
their chunks, counts are added up, thresholds are found by halving: no array as long as the row exists anywhere.
Hidden states move once, after the choice, when the survivors close ranks and are dealt anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hico_jax.models.compress import progressive
from hico_jax.shapes import Array, Bool, Float, Int


class Axis(NamedTuple):
    """The mesh axis over which rows are split."""

    name: str
    size: int

    def me(self) -> Array:
        """The place of this device along it."""
        return jax.lax.axis_index(self.name)

    def sum(self, x: Array) -> Array:
        """Over all devices."""
        return jax.lax.psum(x, self.name)

    def shift(self, x: Array, by: int) -> Array:
        """What the device `by` places before this one holds; zeros where there is none."""
        pairs = [(i, i + by) for i in range(self.size) if 0 <= i + by < self.size]
        return jax.lax.ppermute(x, self.name, pairs)


def _halves(x: Array) -> tuple[Array, Array]:
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def following(x: Array, fill: int | bool, axis: Axis) -> Array:
    """Of each token, what the next place of its row holds; `fill` after the last one."""
    early, late = _halves(x)
    edge = jnp.where(axis.me() == axis.size - 1, late[:, :1], axis.shift(early[:, :1], -1))
    end = jnp.where(axis.me() == 0, jnp.asarray(fill, x.dtype), axis.shift(late[:, :1], 1))
    return jnp.concatenate([early[:, 1:], edge, late[:, 1:], end], 1)


def preceding(x: Array, fill: int | bool, axis: Axis) -> Array:
    """Of each token, what the place before it in its row holds; `fill` before the first one."""
    early, late = _halves(x)
    begin = jnp.where(axis.me() == 0, jnp.asarray(fill, x.dtype), axis.shift(early[:, -1:], 1))
    edge = jnp.where(axis.me() == axis.size - 1, early[:, -1:], axis.shift(late[:, -1:], -1))
    return jnp.concatenate([begin, early[:, :-1], edge, late[:, :-1]], 1)


def place(length: int, axis: Axis) -> Int[Array, " L"]:
    """Where in the row each place of this device is, from 0; `length` is the local one."""
    chunk, me = length // 2, axis.me()
    within = jnp.arange(chunk, dtype=jnp.int32)
    return jnp.concatenate([me * chunk + within, (2 * axis.size - 1 - me) * chunk + within]).astype(jnp.int32)


def rank(chosen: Bool[Array, "B L"], axis: Axis) -> Int[Array, "B L"]:
    """How many chosen places come before each one in its row."""
    halves = [jnp.cumsum(h, axis=1, dtype=jnp.int32) for h in _halves(chosen)]
    counts = jax.lax.all_gather(jnp.stack([h[:, -1] for h in halves]), axis.name)  # two numbers a row and device
    in_order = jnp.concatenate([counts[:, 0], counts[::-1, 1]])
    before = jnp.cumsum(in_order, axis=0, dtype=jnp.int32) - in_order
    starts = (before[axis.me()], before[2 * axis.size - 1 - axis.me()])
    return jnp.concatenate([h + s[:, None] for h, s in zip(halves, starts, strict=True)], 1) - chosen.astype(jnp.int32)


def by_segment(chosen: Bool[Array, "B L"], segments: Int[Array, "B L"], count: int, axis: Axis) -> Int[Array, "B R"]:
    """How many are chosen in each of the segments 1 to `count`, over the whole row."""
    ids = jnp.arange(1, count + 1, dtype=segments.dtype)
    mine = (segments[:, None] == ids[:, None]) & chosen[:, None]
    return axis.sum(mine.sum(-1, dtype=jnp.int32))


def of_segment(values: Array, segments: Int[Array, "B L"]) -> Array:
    """The value of each token's segment; of padding, that of segment 1."""
    return jnp.take_along_axis(values, jnp.maximum(segments - 1, 0), axis=1)


def before_visual(slots: Int[Array, "B L"], segments: Int[Array, "B L"], axis: Axis) -> Bool[Array, "B L"]:
    """Whether the next token of the segment is visual."""
    return (following(segments, 0, axis) == segments) & (following(slots, -1, axis) >= 0)


def queries(
    segments: Int[Array, "B L"], labelled: Bool[Array, "B L"] | None, num_queries: int, count: int, axis: Axis
) -> Bool[Array, "B L"]:
    """`progressive.queries` for rows of at most `count` segments."""
    real = segments != 0
    last = (following(segments, 0, axis) != segments) & real
    if num_queries == 0:
        return last
    assert labelled is not None
    begins = (preceding(segments, 0, axis) != segments) & real
    first = of_segment(by_segment(begins & labelled, segments, count, axis) > 0, segments)
    asks = jnp.where(last, first, following(labelled, False, axis)) & ~labelled & real
    totals = axis.sum(real.sum(1, dtype=jnp.int32))
    wraps = axis.sum((asks & last).sum(1, dtype=jnp.int32)) > 0
    wraps &= (totals < totals.max()) & (jax.lax.pmax(segments.max(1), axis.name) == 1)
    end = place(segments.shape[1], axis) == axis.size * segments.shape[1] - 1
    return jnp.where(wraps[:, None], (asks & ~last) | end, asks)


def scores(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    positions: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    asks: Bool[Array, "B L"],
    num_queries: int,
    axis: Axis,
) -> Float[Array, "B L"]:
    """`progressive.scores`: the few queries go to all devices, each weighs its own keys, sums are shared."""
    rows, length, heads, width = q.shape
    kv_heads = k.shape[2]
    at = jnp.where(asks, rank(asks, axis), num_queries)
    source = jnp.arange(length, dtype=jnp.int32)
    index = jax.vmap(lambda t: jnp.zeros(num_queries, jnp.int32).at[t].set(source, mode="drop"))(at)
    here = jax.vmap(lambda t: jnp.zeros(num_queries, bool).at[t].set(True, mode="drop"))(at)

    def everywhere(x: Array) -> Array:
        return axis.sum(progressive.take(x, index, here))

    valid = axis.sum(here.astype(jnp.int32)) > 0
    grouped = everywhere(q).reshape(rows, num_queries, kv_heads, heads // kv_heads, width)
    position, segment = everywhere(positions), everywhere(segments)
    padding = valid & (segment == 0)
    position = jnp.where(padding, jnp.iinfo(jnp.int32).max, position)
    segment = jnp.where(padding, 1, segment)

    def step(total: tuple[Array, Array], query: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        row, position, segment = query
        mine = (segments == segment[:, None]) & (segments != 0)
        seen = (mine & (positions <= position[:, None]))[:, None, None]
        raw = jnp.einsum("BKGd,BLKd->BKGL", row, k, preferred_element_type=jnp.float32) / math.sqrt(width)
        raw = jnp.where(seen, raw, -1e30)
        top = jax.lax.pmax(raw.max(-1, keepdims=True), axis.name)
        weights = jnp.exp(raw - top)
        weights = (weights / axis.sum(weights.sum(-1, keepdims=True))).astype(q.dtype)
        mean = jnp.where(seen[:, 0, 0], weights.mean((1, 2)).astype(jnp.float32), 0.0)
        return (total[0] + mean, total[1] + mine.astype(jnp.float32)), None

    zero = jnp.zeros((rows, length), jnp.float32)
    by_query = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (grouped, position, segment))
    (total, asked), _ = jax.lax.scan(step, (zero, zero), by_query)
    return (total / jnp.maximum(asked, 1.0)).astype(q.dtype)


def best(
    scores: Float[Array, "B L"], slots: Int[Array, "B L"], segments: Int[Array, "B L"], keep: Int[Array, "B R"],
    axis: Axis,
) -> Bool[Array, "B L"]:  # fmt: skip
    """`progressive.best`, the same tokens exactly: the least score kept, bit by bit, then the last place among equals.

    Each bit costs one sum of [B, R] integers over the devices; nothing is sorted and no score travels.
    """
    visual = (slots >= 0) & (segments != 0)
    count = keep.shape[1]
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    key = jnp.where(bits >= sign, ~bits, bits | sign)  # rises with the score

    def largest(width: int, dtype: Any, fits: Callable[[Array], Array]) -> Array:
        """Per row and segment, the largest number of so many bits that fits."""

        def step(i: Array, found: Array) -> Array:
            more = found | (jnp.ones((), dtype) << (width - 1 - i).astype(dtype))
            return jnp.where(fits(more), more, found)

        return jax.lax.fori_loop(0, width, step, jnp.zeros(keep.shape, dtype))

    least = largest(
        32, jnp.uint32,
        lambda t: by_segment(visual & (key >= of_segment(t, segments)), segments, count, axis) >= keep,
    )  # fmt: skip
    threshold = of_segment(least, segments)
    above, equal = visual & (key > threshold), visual & (key == threshold)
    open_places = keep - by_segment(above, segments, count, axis)
    where = jnp.broadcast_to(place(slots.shape[1], axis), slots.shape)
    width = (axis.size * slots.shape[1]).bit_length()
    end = largest(
        width, jnp.int32,
        lambda t: by_segment(equal & (where < of_segment(t, segments)), segments, count, axis) <= open_places,
    )  # fmt: skip
    chosen = above | (equal & (where < of_segment(end, segments)))
    return jnp.where(visual, chosen & (of_segment(keep, segments) > 0), segments != 0)


def best_of_shares(
    scores: Float[Array, "B L"], slots: Int[Array, "B L"], segments: Int[Array, "B L"], keep: Int[Array, "B R"],
    shares: int, axis: Axis,
) -> Bool[Array, "B L"]:  # fmt: skip
    """`progressive.best_of_shares`, the same tokens exactly: each device sorts its own parts.

    One round of counts, a few integers a part, is all that devices tell each other.

    Raises:
      ValueError: parts that would lie on two devices.
    """
    if shares % (2 * axis.size):
        raise ValueError(
            f"drop.shares is {shares} but rows are dealt to {axis.size} devices in {2 * axis.size} chunks; make it a "
            f"multiple of {2 * axis.size}, or 1 for the best of the whole row"
        )
    each, chunk = shares // (2 * axis.size), slots.shape[1] // 2
    within = np.arange(chunk) * each // chunk
    part = jnp.asarray(np.concatenate([within, each + within]), jnp.int32)
    visual = (slots >= 0) & (segments != 0)
    group = jnp.where(visual, progressive.group_of(segments, part, 2 * each), 0)
    rows, segments_most = keep.shape
    counts = progressive.count_groups(group, segments_most * 2 * each).reshape(rows, segments_most, 2, each)
    sums = jax.lax.all_gather(counts.sum(-1), axis.name)  # [devices B R 2]
    in_order = jnp.concatenate([sums[..., 0], sums[::-1, ..., 1]])
    before = jnp.cumsum(in_order, axis=0, dtype=jnp.int32) - in_order
    total = in_order.sum(0)[..., None]
    mine = (before[axis.me()], before[2 * axis.size - 1 - axis.me()])
    allowed = [
        progressive.share_out(keep, counts[:, :, half], start[..., None], total) for half, start in enumerate(mine)
    ]
    chosen = progressive.best_of_groups(scores, group, jnp.concatenate(allowed, -1).reshape(rows, -1))
    return jnp.where(visual, chosen, segments != 0)


def close_ranks(tree: Any, alive: Bool[Array, "B L"], length: int, axis: Axis) -> tuple[Any, Bool[Array, "B M"]]:
    """Every living token moves to the place its rank deserves in rows of `length`, dealt anew; which places are filled.

    Blocks travel once around the ring and each device takes what is its own, so it holds two blocks at most.
    """
    chunk = length // (2 * axis.size)
    to = rank(alive, axis)
    number = to // chunk
    device = jnp.where(number < axis.size, number, 2 * axis.size - 1 - number)
    device = jnp.where(alive, device, -1)
    spot = jnp.where(number < axis.size, 0, chunk) + to % chunk
    me, source = axis.me(), jnp.arange(alive.shape[1], dtype=jnp.int32)

    def collect(carry: tuple[Any, Array], block: Any) -> tuple[Any, Array]:
        taken, filled = carry
        arrays, device, spot = block
        at = jnp.where(device == me, spot, 2 * chunk)
        index = jax.vmap(lambda t: jnp.zeros(2 * chunk, jnp.int32).at[t].set(source, mode="drop"))(at)
        here = jax.vmap(lambda t: jnp.zeros(2 * chunk, bool).at[t].set(True, mode="drop"))(at)

        def one(old: Array, new: Array) -> Array:
            extra = (1,) * (new.ndim - 2)
            return (
                old + progressive.take(new, index, here)
                if new.dtype != bool
                else jnp.where(here.reshape(*here.shape, *extra), progressive.take(new, index, here), old)
            )

        return jax.tree.map(one, taken, arrays), filled | here

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        sums, block = carry
        moves = [(i, (i + 1) % axis.size) for i in range(axis.size)]
        block = jax.tree.map(lambda a: jax.lax.ppermute(a, axis.name, moves), block)
        return (collect(sums, block), block), None

    empty = jax.tree.map(lambda a: jnp.zeros((a.shape[0], 2 * chunk, *a.shape[2:]), a.dtype), tree)
    block = (tree, device, spot)
    sums = collect((empty, jnp.zeros((alive.shape[0], 2 * chunk), bool)), block)
    ((taken, filled), _), _ = jax.lax.scan(step, (sums, block), None, length=axis.size - 1)
    return taken, filled


def positions(segments: Int[Array, "B L"], count: int, axis: Axis) -> Int[Array, "B L"]:
    """`progressive.renumber` of rows whose living tokens are all in front, segments in rising order."""
    real = segments != 0
    each = by_segment(real, segments, count, axis)
    begin = jnp.cumsum(each, axis=1, dtype=jnp.int32) - each
    return jnp.where(real, rank(real, axis) - of_segment(begin, segments), 0)


def last(x: Array, segments: Int[Array, "B L"], axis: Axis) -> Array:
    """What the last real token of each row holds: [B 1 ...], on every device."""
    where = place(segments.shape[1], axis)
    mine = jnp.where(segments != 0, where, -1).max(1)
    end = jax.lax.pmax(mine, axis.name)
    index = jnp.argmax(where[None] == end[:, None], axis=1).astype(jnp.int32)[:, None]
    return axis.sum(progressive.take(x, index, (mine == end)[:, None]))
