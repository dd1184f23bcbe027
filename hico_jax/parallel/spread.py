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

    def mine(weights: Any, clips: Any) -> Array:
        pixels = jax.tree.leaves(clips)[0]
        group = group_size(pixels.shape[0], math.prod(pixels.shape[1:-1]) // 256)
        if group == pixels.shape[0]:
            return f(weights, clips)
        groups = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), clips)
        out = jax.lax.map(jax.checkpoint(lambda part: f(weights, part)), groups)
        return out.reshape(-1, *out.shape[2:])

    out = sharding.local(mine, weights, clips, axes=((), ("clips",)), out=("clips",))
    return out[:count] if missing else out


def group_size(count: int, patches: int) -> int:
    """The most clips of so many patches that divide `count` and fit at once.

    Example:
      >>> group_size(256, 784), group_size(6, 20_000)
      (32, 1)
    """
    most = max(1, min(count, PATCHES // max(1, patches)))
    return next(n for n in range(most, 0, -1) if count % n == 0)


def fetch(
    visual: Float[Array, "B S D"], slots: Int[Array, "B L"], text: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    """`visual[b, slots[b, l]]` where a slot is given, `text` elsewhere; rows are split over devices on both sides."""
    sizes = sharding.sizes()
    names = tuple(n for n in sharding.ROW if sizes.get(n, 1) > 1)
    devices = math.prod(sizes[n] for n in names)
    visual = jnp.pad(visual, ((0, 0), (0, -visual.shape[1] % devices), (0, 0)))
    visual = sharding.shard(visual, "batch", "row_clips", None)

    def mine(block: Array, slots: Array, text: Array) -> Array:
        me, count = jax.lax.axis_index(names), block.shape[1]

        def take(out: Array, block: Array, source: Array) -> Array:
            place = slots - source * count
            here = (slots >= 0) & (place >= 0) & (place < count)

            def some(out: Array) -> Array:
                found = jnp.take_along_axis(block, jnp.clip(place, 0, count - 1)[..., None], axis=1)
                return jnp.where(here[..., None], found.astype(out.dtype), out)

            return jax.lax.cond(here.any(), some, lambda out: out, out)

        def step(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            out, block = carry
            block = jax.lax.ppermute(block, names, [(i, (i + 1) % devices) for i in range(devices)])
            return (take(out, block, (me - number) % devices), block), None

        (out, _), _ = jax.lax.scan(step, (take(text, block, me), block), jnp.arange(1, devices))
        return out

    row = ("batch", "length")
    return sharding.local(mine, visual, slots, text, axes=(("batch", "row_clips"), row, row), out=row)
