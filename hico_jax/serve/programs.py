"""What runs on the device for the lanes: one compiled program a shape.

Shapes are few: pieces of a prompt by lane size and by how far they look back, steps by how many answers go on together.
In: arrays. Out: arrays; the lanes are written in place.
Next: hico_jax/serve/sampling.py
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hico_jax.generate import logits_of
from hico_jax.models.llm import lanes as device
from hico_jax.serve import sampling
from hico_jax.shapes import Array, Float


@jax.jit
def embed(llm: Any, tokens: Array, slots: Array, visual: Array) -> Float[Array, "Q D"]:
    """A piece's text and visual tokens as they enter the first layer; `slots` is -1 where text stands."""
    text = llm.embed(tokens[None])[0].astype(visual.dtype)
    return jnp.where(slots[:, None] >= 0, visual[0, jnp.maximum(slots, 0)], text)


@functools.partial(jax.jit, static_argnames="size")
def cut(buffer: Array, start: Array, *, size: int) -> Array:
    """A piece of what enters a group of layers."""
    return jax.lax.dynamic_slice_in_dim(buffer, start, size)


@functools.partial(jax.jit, static_argnames=("group", "first", "seen"), donate_argnames="state")
def run(
    llm: Any, state: device.Lanes, x: Array, where: Array, *, group: int, first: int, seen: int
) -> tuple[Array, device.Lanes, Array]:
    """A piece through one group of layers; `where` is its lane, place, real tokens and the row's last position."""
    return llm.extend(state, x, *where, group=group, first=first, seen=seen)


@functools.partial(jax.jit, donate_argnames="buffer")
def scatter(buffer: Array, x: Array, target: Array) -> Array:
    """Survivors of a piece, written where they stand in the next group; places beyond the buffer are let fall."""
    return buffer.at[target].set(x, mode="drop")


@functools.partial(jax.jit, static_argnames=("layer", "kept"))
def select(llm: Any, x: Array, visual: Array, length: Array, keep: Array, *, layer: int, kept: int) -> Any:
    """What an attention-guided stage leaves of a row, where it comes from, and the scores."""
    return llm.select(x, visual, length, keep, layer=layer, kept=kept)


@functools.partial(jax.jit, static_argnames=("group", "first", "layer"))
def attended(
    llm: Any, state: device.Lanes, x: Array, lane: Array, length: Array, *, group: int, first: int, layer: int
) -> Array:
    """What a lane's last token attends to in one layer."""
    return llm.attended(state, x, lane, length, group=group, first=first, layer=layer)


@jax.jit
def logits(llm: Any, x: Array, index: Array) -> Float[Array, "1 V"]:
    """Logits behind one token of a piece."""
    last = jax.lax.dynamic_slice_in_dim(x, index, 1)[None]
    return logits_of(llm, llm.norm(last))[0]


copy = jax.jit(device.copy, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("sampled", "top"), donate_argnames="seen")
def first(
    logits: Array, seen: Array, lane: Array, knobs: sampling.Knobs, *, sampled: bool, top: bool
) -> tuple[sampling.Said, Array]:
    """The first token of an answer; its lane's set of tokens said begins anew."""
    fresh = jnp.zeros((1, seen.shape[1]), bool)
    said = sampling.choose(logits, fresh, knobs, sampled=sampled, top=top)
    return said, seen.at[lane].set(fresh[0].at[said.ids[0]].set(True))


@functools.partial(
    jax.jit, static_argnames=("seen_to", "everyone", "sampled", "top"), donate_argnames=("state", "seen")
)
def step(
    llm: Any, state: device.Lanes, seen: Array, tokens: Array, rows: Array, lengths: Array, knobs: sampling.Knobs, *,
    seen_to: int | None, everyone: bool, sampled: bool, top: bool,
) -> tuple[sampling.Said, device.Lanes, Array]:  # fmt: skip
    """One more token of several lanes; `everyone` says that `rows` are all lanes in their order."""
    x = llm.embed(tokens[:, None]).astype(state.keys[0].dtype)
    x, state = llm.step(state, x, None if everyone else rows, lengths, seen=seen_to)
    said = sampling.choose(logits_of(llm, x)[:, 0], seen[rows], knobs, sampled=sampled, top=top)
    return said, state, seen.at[rows, said.ids].set(True)
