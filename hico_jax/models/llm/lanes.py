"""Several conversations side by side, a lane each: prompts come in pieces, answers grow a token at a time.

A lane holds the keys and values of one row, compact from place 0 on, in every group of layers between two stages of the
drop. How far each lane is filled is known to the host and handed in, so one program serves every length. What stands
behind that length is garbage that nobody sees and the next piece overwrites; so a lane is cut back for nothing.

In: embeddings of a piece of one lane, or of one token of several. Out: hidden states, and the lanes with it written.
Next: hico_jax/generate.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hico_jax.batch import DropSchedule
from hico_jax.kernels import decode as decode_kernels
from hico_jax.models import attention
from hico_jax.models.compress import progressive
from hico_jax.models.llm.decoder import Place
from hico_jax.shapes import Array, Float, Int

Angles = Callable[[Array], tuple[Array, Array]]


class Lanes(flax.struct.PyTreeNode):
    """Keys and values of all lanes, group by group."""

    keys: tuple[Any, ...]  # Float[layers B K S d] each
    values: tuple[Any, ...]

    @classmethod
    def empty(cls, config: Any, schedule: DropSchedule, count: int, places: Sequence[int], dtype: Any) -> Lanes:
        """`count` lanes with `places[g]` places in group `g`, for a language model of this configuration."""
        edges = bounds(schedule, config.num_layers)
        shapes = [
            (stop - start, count, config.num_kv_heads, size, config.head_dim)
            for (start, stop), size in zip(itertools.pairwise(edges), places, strict=True)
        ]
        return cls(*(tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2)))

    def of_group(self, group: int, keys: Array, values: Array) -> Lanes:
        """The lanes with one group's arrays replaced."""
        put = lambda all, one: tuple(one if g == group else a for g, a in enumerate(all))
        return Lanes(put(self.keys, keys), put(self.values, values))


def bounds(schedule: DropSchedule, num_layers: int) -> tuple[int, ...]:
    """Where groups of layers begin, and the end."""
    return (0, *(schedule.layers if schedule.num_stages else ()), num_layers)


def extend(
    blocks: Any,
    lanes: Lanes,
    x: Float[Array, "Q D"],
    lane: Int[Array, ""],
    at: Int[Array, ""],
    count: Int[Array, ""],
    reach: Int[Array, ""],
    *,
    group: int,
    first: int,
    seen: int,
    angles: Angles,
) -> tuple[Float[Array, "Q D"], Lanes, Float[Array, "N D"]]:
    """A piece of a lane's row through one group of layers, written from place `at` on.

    Args:
      count: real tokens of the piece; the others are padding at its end.
      reach: the whole row's last position, which rotary scaling by length needs to know.
      first: the group's first layer.
      seen: places that exist for this piece: at least `at` + Q.

    Returns:
      Hidden states behind the group, the lanes, and what entered each of its layers at the piece's last real token.
    """
    places = x.shape[0]
    positions = at + jnp.arange(places, dtype=jnp.int32)[None]
    cos, sin = angles(jnp.concatenate([positions, jnp.full((1, 1), reach, jnp.int32)], axis=1))
    place = Place(cos[:, :-1], sin[:, :-1], positions, jnp.ones((1, places), jnp.int32))
    visible = jnp.ones((1, seen), jnp.int32)
    keys, values = lanes.keys[group], lanes.values[group]

    def step(i: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, keys, values, trail = carry
        trail = jax.lax.dynamic_update_index_in_dim(trail, x[0, count - 1], i, 0)
        block = jax.tree.map(lambda p: p[first + i], blocks)
        return *block.extend(x, place, keys, values, i, at, visible, lane), trail

    trail = jnp.zeros((keys.shape[0], x.shape[1]), x.dtype)
    x, keys, values, trail = jax.lax.fori_loop(0, keys.shape[0], step, (x[None], keys, values, trail))
    return x[0], lanes.of_group(group, keys, values), trail


def step(
    blocks: Any,
    lanes: Lanes,
    x: Float[Array, "R 1 D"],
    rows: Int[Array, " R"] | None,
    lengths: Int[Array, "G R"],
    *,
    angles: Angles,
    seen: int | None = None,
) -> tuple[Float[Array, "R 1 D"], Lanes]:
    """One token of several lanes through all layers; it stands behind what each group of its lane holds.

    Args:
      rows: which lanes; None is all of them, in order, which spares copying what is read.
      lengths: how many places of each group are filled in each of these lanes.
      seen: places that are read: more than any length that matters. None is all of them.
    """
    first, dtype = 0, x.dtype
    x = decode_kernels.widened(blocks, x)
    for group, (keys, values) in enumerate(zip(lanes.keys, lanes.values, strict=True)):
        at = lengths[group]
        place = Place(*angles(at[:, None]), at[:, None], jnp.ones((x.shape[0], 1), jnp.int32))
        width = keys.shape[3] if seen is None else min(keys.shape[3], seen)
        visible = jnp.arange(width, dtype=jnp.int32)[None] <= at[:, None]

        def layer(
            i: Array, carry: tuple[Array, Array, Array], first: int = first, at: Array = at, place: Place = place,
            visible: Array = visible,
        ) -> tuple[Array, Array, Array]:  # fmt: skip
            block = decode_kernels.layer_of(blocks, first + i, carry[0])
            return block.step(carry[0], place, *carry[1:], i, rows, at, visible)

        x, keys, values = jax.lax.fori_loop(0, keys.shape[0], layer, (x, keys, values))
        lanes = lanes.of_group(group, keys, values)
        first += keys.shape[0]
    return x.astype(dtype), lanes


def select(
    blocks: Any,
    x: Float[Array, "S D"],
    visual: Int[Array, " S"],
    length: Int[Array, ""],
    keep: Int[Array, ""],
    *,
    layer: int,
    kept: int,
    angles: Angles,
) -> tuple[Float[Array, "kept D"], Int[Array, " kept"], Float[Array, " S"]]:
    """An attention-guided stage for one lane: the `keep` visual tokens that its last token looks at most, and the text.

    Args:
      x: what enters the layer, of which `length` places are filled.
      visual: 1 where a visual token stands.
      kept: places of the result.

    Returns:
      What is left, where it comes from, and the scores (`progressive.scores`).
    """
    index = jnp.arange(x.shape[0], dtype=jnp.int32)
    segments = (index < length).astype(jnp.int32)[None]
    positions = jnp.where(segments != 0, index[None], 0)
    slots = jnp.where((segments != 0) & (visual[None] != 0), 0, -1)
    block = jax.tree.map(lambda p: p[layer], blocks)
    x = jnp.where(segments[0, :, None] != 0, x, jnp.zeros((), x.dtype))
    q, k = block.attention_query_key(x[None], Place(*angles(positions), positions, segments))
    asks = index[None] == length - 1
    scores = progressive.scores(q, k, positions, segments, asks, 1)
    alive = progressive.best(scores, slots, segments, keep.reshape(1, 1))
    where, real = progressive.compact(alive, kept)
    return progressive.take(x[None], where, real)[0], where[0], scores[0].astype(jnp.float32)


def attended(
    blocks: Any,
    lanes: Lanes,
    x: Float[Array, " D"],
    lane: Int[Array, ""],
    length: Int[Array, ""],
    *,
    group: int,
    first: int,
    layer: int,
    angles: Angles,
) -> Float[Array, " S"]:
    """Attention that a lane's last token pays to every place in one layer, mean over heads: what `select` would score.

    `x` is what entered the layer at that token (of `extend`), `layer` counts within the group.
    """
    keys = jax.lax.dynamic_index_in_dim(lanes.keys[group][layer], lane, 0, keepdims=False)  # K S d
    position = (length - 1).reshape(1, 1)
    block = jax.tree.map(lambda p: p[first + layer], blocks)
    place = Place(*angles(position), position, jnp.ones((1, 1), jnp.int32))
    q, _ = block.attention_query_key(x[None, None], place)
    seen = jnp.arange(keys.shape[1], dtype=jnp.int32)[None] < length
    return attention.weights_of(q, keys[None], seen)[0]


def copy(lanes: Lanes, source: Int[Array, ""], target: Int[Array, ""]) -> Lanes:
    """One lane's contents written over another's."""

    def one(a: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(a, source, 1, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(a, part, target, 1)

    return jax.tree.map(one, lanes)


def read_rows(
    stack: Float[Array, "N B K S d"], layer: Array, rows: Int[Array, " R"] | None, places: int
) -> Float[Array, "R K P d"]:
    """The first places of one layer's keys or values of several lanes, or of all of them in order."""
    zero, (_, count, heads, _, width) = jnp.zeros((), jnp.int32), stack.shape
    if rows is None:
        return jax.lax.dynamic_slice(stack, (layer, *[zero] * 4), (1, count, heads, places, width))[0]
    one = lambda row: jax.lax.dynamic_slice(stack, (layer, row, *[zero] * 3), (1, 1, heads, places, width))[0]
    return jnp.concatenate([one(rows[r]) for r in range(rows.shape[0])])


def write_rows(
    stack: Float[Array, "N B K S d"],
    layer: Array,
    rows: Int[Array, " R"] | None,
    at: Int[Array, " R"],
    value: Float[Array, "R 1 K d"],
) -> Array:
    """One token's keys or values of several lanes, each at its own place. The same lane twice must bring the same."""
    zero = jnp.zeros((), jnp.int32)
    update = jnp.swapaxes(value, 1, 2)[None].astype(stack.dtype)  # 1 R K 1 d
    for r in range(value.shape[0]):
        row = jnp.asarray(r, jnp.int32) if rows is None else rows[r]
        stack = jax.lax.dynamic_update_slice(stack, update[:, r : r + 1], (layer, row, zero, at[r], zero))
    return stack
