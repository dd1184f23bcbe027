"""A second question about the same film: all layers above the first choice that depends on a question run once.

Attention is causal, so no token of the film has seen the question behind it, and even stages of the drop count tokens
only. What may be kept is therefore: keys and values of every layer before the first attention-guided stage, and what
that stage chooses from. A question then runs alone through those layers, and with the film through the rest.

In: the stream of a prompt up to its last visual token, then the stream of each question. Out: hidden states and a
cache, as from `decoder.run`.
Next: hico_jax/generate.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hico_jax.batch import DropPlan, DropSchedule
from hico_jax.models.compress import progressive
from hico_jax.models.llm import cache as kv_cache
from hico_jax.models.llm import decoder
from hico_jax.models.llm.decoder import Place, Stream
from hico_jax.parallel import sharding
from hico_jax.shapes import Array, Int


class Memory(flax.struct.PyTreeNode):
    """What is kept of a prompt's beginning."""

    groups: tuple[kv_cache.Group, ...]  # of layers that no question changes
    stream: Stream  # tokens alive at the first stage that asks the question; empty of any use if there is none
    room: int = flax.struct.field(pytree_node=False, default=0)  # places for a question and its answer


def num_groups(schedule: DropSchedule) -> int:
    """Groups of layers above the first stage that depends on the question."""
    return min(schedule.num_uniform + 1, schedule.num_stages + 1)


def remember(
    blocks: Any, stream: Stream, plan: DropPlan | None, *, schedule: DropSchedule,
    angles: Callable[[Array], tuple[Array, Array]], room: int,
) -> Memory:  # fmt: skip
    """Run the beginning of a prompt, whose tokens all come before any question, with `room` places kept behind it.

    Raises:
      ValueError: rows are split over devices.
    """
    if sharding.ring() > 1:
        raise ValueError("a film is remembered in whole rows; set mesh.sequence to 1")
    last = num_groups(schedule)
    stream, cache, _ = decoder.run(
        blocks, stream, plan, schedule=schedule, angles=angles, cache_room=room, last=last
    )  # fmt: skip
    assert cache is not None
    return Memory(cache.groups, stream, room)


def resume(
    blocks: Any, memory: Memory, question: Stream, plan: DropPlan | None, *, schedule: DropSchedule,
    angles: Callable[[Array], tuple[Array, Array]],
) -> tuple[Stream, kv_cache.Cache]:  # fmt: skip
    """Run a question behind what is remembered. `plan` is that of the whole prompt; the memory stays as it is.

    Raises:
      ValueError: the memory has no room for the question.
    """
    asked = question.x.shape[1]
    if asked >= memory.room:
        raise ValueError(
            f"the question has {asked} places but the film was remembered with room for {memory.room}, answer "
            "included; remember it with more room"
        )
    room, x, first, groups = memory.room - asked, question.x, 0, []
    for group in memory.groups:
        count, before = group.k.shape[0], group.k.shape[3] - memory.room
        positions = group.position[:, None] + jnp.arange(asked, dtype=jnp.int32)
        place = Place(*angles(positions), positions, question.segments)
        segments = jax.lax.dynamic_update_slice(group.segments, question.segments, (0, before))

        def step(
            i: Array, carry: tuple[Array, Array, Array], first: int = first, place: Place = place,
            segments: Array = segments, before: int = before,
        ) -> tuple[Array, Array, Array]:  # fmt: skip
            block = jax.tree.map(lambda p: p[first + i], blocks)
            return block.extend(carry[0], place, *carry[1:], i, before, segments)

        x, k, v = jax.lax.fori_loop(0, count, step, (x, group.k, group.v))
        real = (question.segments != 0).sum(1, dtype=jnp.int32)
        groups.append(group.replace(k=k, v=v, segments=segments, position=group.position + real))
        first += count
    done = num_groups(schedule)
    stream = question.replace(x=x)
    if done <= schedule.num_stages:
        together = _behind(memory.stream, stream)
        stream, cache, _ = decoder.run(
            blocks, together, plan, schedule=schedule, angles=angles, cache_room=room, first=done
        )
        assert cache is not None
        return stream, dataclasses.replace(cache, groups=(*groups, *cache.groups))
    return stream, kv_cache.Cache.begin(groups, stream.segments, room)


def _behind(film: Stream, question: Stream) -> Stream:
    """One stream of both, padding last."""
    parts = [s.replace(targets=None, weights=None, survives=None, labelled=None, plain=False) for s in (film, question)]
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *parts)
    index, real = progressive.compact(joined.segments != 0, joined.segments.shape[1])
    taken = jax.tree.map(lambda a: progressive.take(a, index, real), joined)
    labels: Int[Array, "B L"] = jnp.zeros_like(taken.segments)
    return taken.replace(
        slots=jnp.where(real, taken.slots, -1), positions=progressive.renumber(taken.segments),
        survives=(labels + 127).astype(jnp.int8), labelled=labels != 0, plain=film.plain and question.plain,
    )  # fmt: skip
