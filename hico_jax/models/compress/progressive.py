"""Video-level compression: progressive visual dropout inside the language model (`flash_rank_drop` in the reference).

Between two groups of decoder layers some visual tokens leave. Which ones is either even (decided on the host) or
by the attention that the questions pay them in the next layer. How many stay is always decided on the host, so
shapes are static. Pure functions on arrays; `llm/decoder.py` strings them together. Works for rows of any mix: no
visual token, several images, several packed segments.

Never an L x L array: only the rows of attention that belong to a question are formed, one at a time.
Next: hico_jax/generate.py
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hico_jax.shapes import Array, Bool, Float, Int


def starts(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Where the run of equal segments begins that each token belongs to."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    changed = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(changed, index, 0), axis=1)


def renumber(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Rotary positions counted anew inside each segment; 0 for padding."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    return jnp.where(segments != 0, index - starts(segments), 0)


def queries(segments: Int[Array, "B L"], labelled: Bool[Array, "B L"] | None, num_queries: int) -> Bool[Array, "B L"]:
    """Which tokens ask: in training those right before an answer, in generation the last of each segment.

    A training query is a token that is no target itself while the next one is. The reference looks the neighbour
    of its first token up with index -1, so the last token asks too when the first is a target and it is not; and
    in a row shorter than the longest, index -1 is a padding place. That place asks here as well (the last one of
    the array stands for it), for parity; rows whose last token is a target never meet it.
    """
    real = segments != 0
    last = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True) & real
    if num_queries == 0:
        return last
    assert labelled is not None
    first = jnp.take_along_axis(labelled, starts(segments), axis=1)
    following = jnp.where(last, first, jnp.pad(labelled[:, 1:], ((0, 0), (0, 1))))
    asks = following & ~labelled & real
    count = real.sum(1)
    wraps = (asks & last).any(1) & (count < count.max()) & (segments.max(1) == 1)
    end = jnp.arange(segments.shape[1]) == segments.shape[1] - 1
    return jnp.where(wraps[:, None], (asks & ~last) | end, asks)


def scores(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    positions: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    asks: Bool[Array, "B L"],
    num_queries: int,
) -> Float[Array, "B L"]:
    """Attention that each token receives, averaged over heads and over the queries of its segment.

    As in the reference the softmax is float32 and is cast to the activations' dtype before it is averaged. At most
    `num_queries` tokens of a row may ask.
    """
    rows, length, heads, width = q.shape
    kv_heads = k.shape[2]
    index, valid = compact(asks, num_queries)
    grouped = take(q, index, valid).reshape(rows, num_queries, kv_heads, heads // kv_heads, width)
    position, segment = take(positions, index, valid), take(segments, index, valid)
    padding = valid & (segment == 0)  # see `queries`: it comes after the row's only segment
    position = jnp.where(padding, jnp.iinfo(jnp.int32).max, position)
    segment = jnp.where(padding, 1, segment)  # still 0 where nobody asks

    def step(total: tuple[Array, Array], query: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        row, position, segment = query
        mine = (segments == segment[:, None]) & (segments != 0)
        seen = mine & (positions <= position[:, None])
        raw = jnp.einsum("BKGd,BLKd->BKGL", row, k, preferred_element_type=jnp.float32) / math.sqrt(width)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], raw, -1e30), axis=-1).astype(q.dtype)
        mean = jnp.where(seen, weights.mean((1, 2)).astype(jnp.float32), 0.0)
        return (total[0] + mean, total[1] + mine.astype(jnp.float32)), None

    zero = jnp.zeros((rows, length), jnp.float32)
    by_query = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (grouped, position, segment))
    (total, count), _ = jax.lax.scan(step, (zero, zero), by_query)
    return (total / jnp.maximum(count, 1.0)).astype(q.dtype)


def best(
    scores: Float[Array, "B L"], slots: Int[Array, "B L"], segments: Int[Array, "B L"], keep: Int[Array, "B R"]
) -> Bool[Array, "B L"]:
    """Text, and the `keep[b, r]` visual tokens of segment `r + 1` with the highest scores; the earlier wins a tie."""
    visual = (slots >= 0) & (segments != 0)
    return jnp.where(visual, best_of_groups(scores, jnp.where(visual, segments, 0), keep), segments != 0)


def best_of_shares(
    scores: Float[Array, "B L"], slots: Int[Array, "B L"], segments: Int[Array, "B L"], keep: Int[Array, "B R"],
    shares: int,
) -> Bool[Array, "B L"]:  # fmt: skip
    """`best` of each of `shares` equal parts of the row, which keep as many as their part of the visual tokens asks.

    Shares are rounded so that they add up to `keep`. Over devices a part lies on one of them, so that choosing needs
    counts alone: `sharded.best_of_shares`.
    """
    length = slots.shape[1]
    part = jnp.asarray(np.arange(length) * shares // length, jnp.int32)
    visual = (slots >= 0) & (segments != 0)
    counts = count_groups(jnp.where(visual, group_of(segments, part, shares), 0), keep.shape[1] * shares)
    allowed = share_out(keep, counts.reshape(*keep.shape, shares))
    group = jnp.where(visual, group_of(segments, part, shares), 0)
    chosen = best_of_groups(scores, group, allowed.reshape(len(slots), -1))
    return jnp.where(visual, chosen, segments != 0)


def group_of(segments: Int[Array, "B L"], part: Int[Array, " L"], parts: int) -> Int[Array, "B L"]:
    """A number from 1 for each part of each segment."""
    return jnp.maximum(segments - 1, 0) * parts + part + 1


def count_groups(group: Int[Array, "B L"], count: int) -> Int[Array, "B G"]:
    """How many tokens each of the groups 1 to `count` has; 0 is none."""
    add = lambda g: jnp.zeros(count + 1, jnp.int32).at[g].add(1)
    return jax.vmap(add)(group)[:, 1:]


def share_out(keep: Int[Array, "B R"], counts: Int[Array, "B R P"], before: Any = 0, total: Any = None) -> Array:
    """`keep` shared out over parts by their counts, each rounded where the sum of those before it ends.

    `before` is what parts before the first one hold, `total` what all hold (None: these are all).
    """
    upto = before + jnp.cumsum(counts, axis=-1, dtype=jnp.int32)
    total = upto[..., -1:] if total is None else total
    ends = scaled(jnp.broadcast_to(keep[..., None], upto.shape), upto, total)
    first = scaled(keep[..., None], upto[..., :1] - counts[..., :1], total)
    return ends - jnp.concatenate([first, ends[..., :-1]], axis=-1)


def scaled(a: Array, b: Array, c: Array) -> Array:
    """`a * b // c` of int32 with `b <= c < 2**29`, exactly, though `a * b` may not fit; 0 where `c` is 0."""
    c = jnp.maximum(c, 1)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        quotient, rest = carry
        rest = 2 * rest + jnp.where((a >> (30 - i)) & 1 == 1, b, 0)
        return 2 * quotient + rest // c, rest % c

    zero = jnp.zeros(jnp.broadcast_shapes(a.shape, b.shape, c.shape), jnp.int32)
    return jax.lax.fori_loop(0, 31, step, (zero, zero))[0]


def best_of_groups(
    scores: Float[Array, "B L"], group: Int[Array, "B L"], allowed: Int[Array, "B G"]
) -> Bool[Array, "B L"]:
    """The `allowed[b, g]` tokens of group `g + 1` with the highest scores; none of group 0; the earlier wins a tie."""
    count = allowed.shape[1]
    index = jnp.broadcast_to(jnp.arange(group.shape[1], dtype=jnp.int32), group.shape)
    group = jnp.where(group == 0, count + 1, group).astype(jnp.int32)
    group, _, order = jax.lax.sort((group, -scores, index), dimension=1, is_stable=True, num_keys=2)
    rank = index - starts(group)
    allowed = jnp.pad(allowed, ((0, 0), (1, 1)))
    chosen = rank < jnp.take_along_axis(allowed, group, axis=1)
    return jax.vmap(lambda o, c: jnp.zeros_like(c).at[o].set(c))(order, chosen)


def compact(alive: Bool[Array, "B L"], length: int) -> tuple[Int[Array, "B length"], Bool[Array, "B length"]]:
    """Where the tokens alive come from when they move to the front, in order, and which places are filled."""
    target = jnp.where(alive, jnp.cumsum(alive, axis=1, dtype=jnp.int32) - 1, length)
    source = jnp.arange(alive.shape[1], dtype=jnp.int32)
    index = jax.vmap(lambda t: jnp.zeros(length, jnp.int32).at[t].set(source, mode="drop"))(target)
    count = alive.sum(1, dtype=jnp.int32)
    return index, jnp.arange(length, dtype=jnp.int32)[None] < count[:, None]


def take(x: Array, index: Int[Array, "B length"], real: Bool[Array, "B length"]) -> Array:
    """Gather along the length; zeros in places that are not filled."""
    extra = (1,) * (x.ndim - 2)
    taken = jnp.take_along_axis(x, index.reshape(*index.shape, *extra), axis=1)
    return jnp.where(real.reshape(*real.shape, *extra), taken, jnp.zeros((), x.dtype))
