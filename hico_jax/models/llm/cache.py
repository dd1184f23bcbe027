"""The key/value cache: one group per run of layers that see the same tokens, each with room to grow.

Layers after a drop hold fewer tokens, so every group has its own length, positions and segments. Rows of
different lengths stay right-padded inside a group: the pads have segment 0 and nobody sees them. All rows write
step `t` at the same place, `prefix + t`, but each row counts its own rotary position.

Where rows are split over n devices, so is the cache: each keeps its part of the prompt and every n-th new token, step
`t` on device `t mod n`. Nothing of it ever moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hico_jax.models.compress import sharded
from hico_jax.parallel import sharding
from hico_jax.shapes import Array, Float, Int

ROW = ("batch", "length")
HEADS = ("batch", "kv_heads", "length")


class Group(flax.struct.PyTreeNode):
    """Keys and values of consecutive layers, head by head so that one head's keys lie together."""

    k: Any  # Float[layers B K S d], S = prefix + room
    v: Any  # Float[layers B K S d]
    segments: Any  # Int[B S]; 0 where nothing is written yet
    position: Any  # Int[B]: rotary position of the next token

    @classmethod
    def begin(
        cls,
        k: Float[Array, "N B K S d"],
        v: Float[Array, "N B K S d"],
        segments: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        room: int,
    ) -> Group:
        """After the prompt has run. The next token follows the last one of each row."""
        position = take_last(positions, segments)[:, 0] + 1
        return cls(k=k, v=v, segments=_pad(segments, room, ROW), position=position)


class Cache(flax.struct.PyTreeNode):
    """All groups, and the step that comes next."""

    groups: tuple[Group, ...]
    segment: Any  # Int[B]: the segment that each row continues
    step: Any  # Int[]: tokens decoded so far
    room: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def begin(cls, groups: Sequence[Group], segments: Int[Array, "B L"], room: int) -> Cache:
        """The cache right after the prompt; `segments` are those of the tokens alive at the end."""
        segment = take_last(segments, segments)[:, 0]
        return cls(groups=tuple(groups), segment=segment, step=jnp.zeros((), jnp.int32), room=room)


def last_index(segments: Int[Array, "B L"]) -> Int[Array, " B"]:
    """Where each row's last real token sits."""
    return segments.shape[1] - 1 - jnp.argmax(segments[:, ::-1] != 0, axis=1).astype(jnp.int32)


def take_last(x: Array, segments: Int[Array, "B L"]) -> Array:
    """What each row's last real token holds: [B 1 ...]."""
    if sharding.ring() > 1:
        axis = sharded.Axis(sharding.SEQUENCE, sharding.ring())
        find = lambda x, segments: sharded.last(x, segments, axis)
        return sharding.local(find, x, segments, axes=(ROW, ROW), out=("batch",))
    last = last_index(segments).reshape(-1, 1, *(1 for _ in x.shape[2:]))
    return jnp.take_along_axis(x, last, axis=1)


def _pad(x: Array, room: int, axes: tuple[str, ...]) -> Array:
    """Free places at the end of the dim that carries `length`, on each device that holds a part of it."""
    dim = axes.index("length")
    each = -(-room // sharding.ring())

    def one(x: Array) -> Array:
        return jnp.pad(x, [(0, each if i == dim else 0) for i in range(x.ndim)])

    return one(x) if sharding.ring() == 1 else sharding.local(one, x, axes=(axes,), out=axes)


def with_room(key_value: tuple[Array, Array], room: int) -> tuple[Array, Array]:
    """Keys and values [B L K d] of one layer in the cache's layout [B K L+room d]."""
    k, v = (jnp.swapaxes(a, 1, 2) for a in key_value)
    return _pad(k, room, HEADS), _pad(v, room, HEADS)


def write(
    stack: Float[Array, "N B K S d"], layer: Array, step: Array, room: int, value: Float[Array, "B 1 K d"]
) -> Array:
    """Put one token's keys or values into its layer of the stack, in place where the compiler may."""
    update = jnp.swapaxes(value, 1, 2)[None].astype(stack.dtype)
    return _put(stack, update, layer, step, room, (None, *HEADS))


def write_at(
    stack: Float[Array, "N B K S d"],
    layer: Array,
    place: int | Int[Array, ""],
    value: Float[Array, "b Q K d"],
    lane: Int[Array, ""] | None = None,
) -> Array:
    """Put several tokens' keys or values into a layer of the stack of one device, from a place on.

    With a lane, `value` is that row's alone. All places must exist: a slice that reaches beyond the end moves back.
    """
    update = jnp.swapaxes(value, 1, 2)[None].astype(stack.dtype)
    zero = jnp.zeros((), jnp.int32)
    row = zero if lane is None else lane
    return jax.lax.dynamic_update_slice(stack, update, (layer, row, zero, jnp.asarray(place, jnp.int32), zero))


def read(
    stack: Float[Array, "N B K S d"], layer: Array, places: int, lane: Int[Array, ""] | None = None
) -> Float[Array, "b K s d"]:
    """The first places of a layer, of all rows or of one lane."""
    if lane is None:
        return stack[layer][:, :, :places]
    zero, (_, _, heads, _, width) = jnp.zeros((), jnp.int32), stack.shape
    return jax.lax.dynamic_slice(stack, (layer, lane, zero, zero, zero), (1, 1, heads, places, width))[0]


def mark(segments: Int[Array, "B S"], segment: Int[Array, " B"], step: Array, room: int) -> Int[Array, "B S"]:
    """The segments of a group once step `step` is written."""
    return _put(segments, segment[:, None], None, step, room, ROW)


def _put(x: Array, update: Array, layer: Array | None, step: Array, room: int, axes: tuple[str | None, ...]) -> Array:
    """Write `update` at the place of step `step`, behind the prompt."""
    count = sharding.ring()
    dim, zero = axes.index("length"), jnp.zeros((), jnp.int32)

    def one(x: Array, update: Array, layer: Array | None, step: Array) -> Array:
        place = x.shape[dim] - -(-room // count) + step // count
        start = [place if i == dim else zero for i in range(x.ndim)]
        if layer is not None:
            start[0] = layer
        if count > 1:
            mine = jax.lax.axis_index(sharding.SEQUENCE) == step % count
            update = jnp.where(mine, update, jax.lax.dynamic_slice(x, start, update.shape))
        return jax.lax.dynamic_update_slice(x, update, start)

    if count == 1:
        return one(x, update, layer, step)
    whole = tuple(None if a == "length" else a for a in axes)
    return sharding.local(one, x, update, layer, step, axes=(axes, whole, (), ()), out=axes)
