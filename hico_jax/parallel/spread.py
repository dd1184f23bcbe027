"""Clips on all devices, then tokens where their row wants them: the way from pixels to a row that is split.

A clip is encoded, merged and projected by one device, whichever axis of the mesh it belongs to; nothing is exchanged
meanwhile. Then blocks of visual tokens travel once around the devices that share the row, and each takes those of its
own places: with m devices a row and S visual tokens, every device sends (m - 1) S / m of them and holds two blocks at
most, never the whole film.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hico_jax.parallel import sharding
from hico_jax.shapes import Array, Float, Int

PATCHES = 25_088  # encoded at once on a device: 32 clips of 4 frames at 224 pixels, 8 at 448


def each_clip(f: Callable[[Any, Any], Array], weights: Any, clips: Any) -> Array:
    """`f(weights, clips)` for clips shared out over every device, in order; weights are whole on each.

    `clips` is their pixels, or a tuple of pixels and what else belongs to each (None: nothing). Every clip must give
    the same, whatever clips stand beside it. Many clips of a device run in groups, and the backward pass encodes a
    group again: what the tower keeps of a whole film would not fit.
    """
    sizes = sharding.sizes()
    count, devices = jax.tree.leaves(clips)[0].shape[0], math.prod(sizes.values())
    if devices == 1:
        return f(weights, clips)
    missing = -count % devices

    def spread(x: Array) -> Array:
        x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        return sharding.shard(x, "clips", *(None for _ in x.shape[1:]))

    clips = jax.tree.map(spread, clips)

    def groups_of(clips: Any) -> int:
        pixels = jax.tree.leaves(clips)[0]
        return group_size(pixels.shape[0], math.prod(pixels.shape[1:-1]) // 256)

    def mine(weights: Any, clips: Any) -> Array:
        with jax.named_scope("clips"):
            return in_groups(weights, clips)

    def in_groups(weights: Any, clips: Any) -> Array:
        group = groups_of(clips)
        if group == jax.tree.leaves(clips)[0].shape[0]:
            return f(weights, clips)
        groups = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), clips)
        out = jax.lax.map(jax.checkpoint(lambda part: f(weights, part)), groups)
        return out.reshape(-1, *out.shape[2:])

    first = jax.tree.leaves(clips)[0]
    over = sharding.split_over(first.shape[0], "clips")

    def run(weights: Any, clips: Any) -> Array:
        return sharding.local(mine, weights, clips, axes=((), ("clips",)), out=("clips",))

    def pull(weights: Any, clips: Any, d_out: Array) -> Any:
        group = groups_of(clips)
        parts = jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:]), (clips, d_out))

        def step(sums: Any, part: tuple[Any, Array]) -> tuple[Any, None]:
            with jax.named_scope("clips"):
                (more,) = jax.vjp(lambda w: f(w, part[0]), weights)[1](part[1])
            return jax.tree.map(jnp.add, sums, more), None

        # A zero that is there only when gradients are: else sums as large as the tower wait through all other layers.
        nothing = d_out.reshape(-1)[0].astype(jnp.float32) * 0
        zeros = jax.tree.map(lambda a: jnp.broadcast_to(nothing.astype(a.dtype), a.shape), weights)
        return jax.lax.psum(jax.lax.scan(step, zeros, parts)[0], over)

    @jax.custom_vjp
    def encoded(weights: Any, clips: Any) -> Array:
        return run(weights, clips)

    def back(saved: tuple[Any, Any], d_out: Array) -> tuple[Any, None]:
        axes = ((), ("clips",), ("clips",))
        # The barrier: whole weights are not kept from the forward pass, they travel again.
        weights, clips, d_out = jax.lax.optimization_barrier((*saved, d_out))
        return sharding.local(pull, weights, clips, d_out, axes=axes, out=()), None

    encoded.defvjp(lambda weights, clips: (run(weights, clips), (weights, clips)), back)
    # Gradients of pixels are nobody's wish in training; who hands in floats may ask for them.
    out = (run if jnp.issubdtype(first.dtype, jnp.inexact) else encoded)(weights, clips)
    return out[:count] if missing else out


def group_size(count: int, patches: int) -> int:
    """The most clips of so many patches that divide `count` and fit at once.

    Example:
      >>> group_size(256, 784), group_size(6, 20_000)
      (32, 1)
    """
    most = max(1, min(count, PATCHES // max(1, patches)))
    return next(n for n in range(most, 0, -1) if count % n == 0)


@jax.custom_vjp
def fetch(
    visual: Float[Array, "B S D"], slots: Int[Array, "B L"], text: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    """`visual[b, slots[b, l]]` where a slot is given, `text` elsewhere; rows are split over devices on both sides.

    The gradient travels the same way and needs the slots alone: differentiating through the hops would keep a mask of
    the whole width for each of them.
    """
    names, devices = _around()

    def mine(block: Array, slots: Array, text: Array) -> Array:
        me, count = jax.lax.axis_index(names), block.shape[1]

        def take(out: Array, block: Array, source: Array) -> Array:
            place, here = _of_block(slots, source, count)

            def some(out: Array) -> Array:
                found = jnp.take_along_axis(block, jnp.clip(place, 0, count - 1)[..., None], axis=1)
                return jnp.where(here[..., None], found.astype(out.dtype), out)

            return jax.lax.cond(here.any(), some, lambda out: out, out)

        def step(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            out, block = carry
            block = _onward(block, names, devices)
            return (take(out, block, (me - number) % devices), block), None

        (out, _), _ = jax.lax.scan(step, (take(text, block, me), block), jnp.arange(1, devices))
        return out

    axes = (_BLOCK, _ROW, _ROW)
    return sharding.local(mine, _in_blocks(visual, devices), slots, text, axes=axes, out=_ROW)


_ROW, _BLOCK = ("batch", "length"), ("batch", "row_clips")


def _around() -> tuple[tuple[str, ...], int]:
    """The mesh axes whose devices share a row, and how many devices that are."""
    sizes = sharding.sizes()
    names = tuple(n for n in sharding.ROW if sizes.get(n, 1) > 1)
    return names, math.prod(sizes[n] for n in names)


def _in_blocks(visual: Array, devices: int) -> Array:
    visual = jnp.pad(visual, ((0, 0), (0, -visual.shape[1] % devices), (0, 0)))
    return sharding.shard(visual, "batch", "row_clips", None)


def _of_block(slots: Array, source: Array, count: int) -> tuple[Array, Array]:
    """Where in the block of device `source` each slot lies, and whether it does."""
    place = slots - source * count
    return place, (slots >= 0) & (place >= 0) & (place < count)


def _onward(x: Array, names: tuple[str, ...], devices: int) -> Array:
    return jax.lax.ppermute(x, names, [(i, (i + 1) % devices) for i in range(devices)])


def _fetch_fwd(visual: Array, slots: Array, text: Array) -> tuple[Array, tuple[Array, Array]]:
    return fetch(visual, slots, text), (slots, jnp.zeros((visual.shape[1], 0), visual.dtype))


def _fetch_bwd(saved: tuple[Array, Array], d_out: Array) -> tuple[Array, None, Array]:
    slots, like = saved
    names, devices = _around()
    count = -(-like.shape[0] // devices)
    twins = tuple(n for n in names if n != sharding.SEQUENCE)  # devices that hold the same tokens: one of them speaks

    def mine(start: Array, slots: Array, d_out: Array) -> Array:
        me = jax.lax.axis_index(names)
        speaks = jax.lax.axis_index(twins) == 0 if twins else True

        def add(d_block: Array, source: Array) -> Array:
            place, here = _of_block(slots, source, count)
            here &= speaks

            def some(d_block: Array) -> Array:
                put = lambda sums, at, d: sums.at[at].add(d.astype(sums.dtype), mode="drop")
                return jax.vmap(put)(d_block, jnp.where(here, place, count), d_out)

            return jax.lax.cond(here.any(), some, lambda d_block: d_block, d_block)

        def step(d_block: Array, number: Array) -> tuple[Array, None]:
            return add(_onward(d_block, names, devices), (me - 1 - number) % devices), None

        # Begun by the device after its own, so that the last hop brings it home.
        return jax.lax.scan(step, add(start, (me - 1) % devices), jnp.arange(1, devices))[0]

    nothing = jnp.zeros((slots.shape[0], count * devices, d_out.shape[2]), like.dtype)
    d_visual = sharding.local(mine, nothing, slots, d_out, axes=(_BLOCK, _ROW, _ROW), out=_BLOCK)
    return d_visual[:, : like.shape[0]], None, jnp.where(slots[..., None] >= 0, jnp.zeros((), d_out.dtype), d_out)


fetch.defvjp(_fetch_fwd, _fetch_bwd)
