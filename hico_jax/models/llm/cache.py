"""The key/value cache: one group per run of layers that see the same tokens, each with room to grow.

Layers after a drop hold fewer tokens, so every group has its own length, positions and segments. Rows of
different lengths stay right-padded inside a group: the pads have segment 0 and nobody sees them. All rows write
step `t` at the same place, `prefix + t`, but each row counts its own rotary position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hico_jax.shapes import Array, Float, Int


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
        last = last_index(segments)
        position = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1
        return cls(k=k, v=v, segments=jnp.pad(segments, ((0, 0), (0, room))), position=position)


class Cache(flax.struct.PyTreeNode):
    """All groups, and the step that comes next."""

    groups: tuple[Group, ...]
    segment: Any  # Int[B]: the segment that each row continues
    step: Any  # Int[]: tokens decoded so far
    room: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def begin(cls, groups: Sequence[Group], segments: Int[Array, "B L"], room: int) -> Cache:
        """The cache right after the prompt; `segments` are those of the tokens alive at the end."""
        segment = jnp.take_along_axis(segments, last_index(segments)[:, None], axis=1)[:, 0]
        return cls(groups=tuple(groups), segment=segment, step=jnp.zeros((), jnp.int32), room=room)


def last_index(segments: Int[Array, "B L"]) -> Int[Array, " B"]:
    """Where each row's last real token sits."""
    return segments.shape[1] - 1 - jnp.argmax(segments[:, ::-1] != 0, axis=1).astype(jnp.int32)


def with_room(key_value: tuple[Array, Array], room: int) -> tuple[Array, Array]:
    """Keys and values [B L K d] of one layer in the cache's layout [B K L+room d]."""

    def one(a: Array) -> Array:
        return jnp.pad(jnp.swapaxes(a, 1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))

    k, v = key_value
    return one(k), one(v)


def write(stack: Float[Array, "N B K S d"], layer: Array, offset: Array, value: Float[Array, "B 1 K d"]) -> Array:
    """Put one token's keys or values into its layer of the stack, in place where the compiler may."""
    zero = jnp.zeros((), jnp.int32)
    update = jnp.swapaxes(value, 1, 2)[None].astype(stack.dtype)
    return jax.lax.dynamic_update_slice(stack, update, (layer, zero, zero, offset, zero))
