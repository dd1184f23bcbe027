"""Clips on every device without a word between them; visual tokens home in one round."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.parallel import sharding, spread
from hico_jax.parallel.mesh import MeshConfig, make_mesh

COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of every collective of a compiled program (float32)."""
    found = re.findall(rf"= f32\[([\d,]*)\]\S* ({COLLECTIVES})(?:-start)?\(", text)
    return [(kind, 4 * int(np.prod([int(n) for n in shape.split(",") if n]))) for shape, kind in found]


def encode(weights: Any, clips: jax.Array) -> jax.Array:
    return jnp.einsum("nthwc,cd->nhd", clips.astype(jnp.float32) / 100, weights)


@pytest.mark.parametrize("count", [16, 5])
def test_clips_are_encoded_alone(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "PATCHES", 1)  # one clip at a time
    rng = np.random.default_rng(0)
    clips, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((count, 2, 16, 16, 3), (3, 4)))
    clips = (100 * clips).astype(jnp.int32)
    run = jax.jit(jax.value_and_grad(lambda w, c: jnp.square(spread.each_clip(encode, w, c)).sum()))
    expected = run(weights, clips)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2, 2))):
        found = run(weights, clips)
        text = jax.jit(lambda w, c: spread.each_clip(encode, w, c)).lower(weights, clips).compile().as_text()
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-5)
    if count == 16:
        assert collectives(text) == []


@pytest.mark.parametrize("mesh", [MeshConfig(1, 2, 4, 1), MeshConfig(1, 1, 4, 2), MeshConfig(1, 1, 3, 1)])
def test_visual_tokens_go_where_they_are_wanted(mesh: MeshConfig) -> None:
    rng = np.random.default_rng(1)
    rows, length, count, width = 2, 24, 20, 8
    visual, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((rows, count, width), (rows, length, width)))
    slots = np.full((rows, length), -1, np.int32)
    for row in slots:
        row[rng.permutation(length)[:count]] = rng.permutation(count)
    expected = np.where(
        slots[..., None] >= 0, np.take_along_axis(np.asarray(visual), np.maximum(slots, 0)[..., None], 1), text
    )
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))])):
        found, pull = jax.vjp(jax.jit(lambda v, t: spread.fetch(v, jnp.asarray(slots), t)), visual, text)
        d_visual, d_text = pull(jnp.ones_like(found))
    np.testing.assert_array_equal(found, expected)
    wanted = np.zeros((rows, count))
    np.add.at(wanted, (np.nonzero(slots >= 0)[0], slots[slots >= 0]), 1)
    np.testing.assert_array_equal(d_visual, np.broadcast_to(wanted[..., None], d_visual.shape))
    np.testing.assert_array_equal(d_text, np.broadcast_to((slots < 0)[..., None], d_text.shape))


def test_no_device_ever_holds_the_film_and_the_bytes_are_as_stated() -> None:
    """(m - 1) hops of one block each: S / m tokens of D numbers."""
    rows, length, count, width, devices = 1, 64, 64, 8, 8
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, devices, 1))):
        mesh = make_mesh(MeshConfig(1, 1, devices, 1))
        spec = sharding.batch_shardings(np.zeros((rows, length)), mesh)
        sds = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=spec)
        args = (
            sds((rows, count, width), jnp.float32),
            sds((rows, length), jnp.int32),
            sds((rows, length, width), jnp.float32),
        )
        text = jax.jit(spread.fetch).lower(*args).compile().as_text()
    block = count // devices * width * 4
    assert collectives(text) == [("collective-permute", block)]
    assert re.search(r'"known_trip_count":\{"n":"7"\}', text)
