"""Clips on every device without a word between them; visual tokens home in one round."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.parallel import sharding, spread
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.plan import program


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
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-5)


def test_encoding_needs_no_word_between_devices() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2, 2))):
        args = jnp.zeros((3, 4)), jnp.zeros((16, 2, 16, 16, 3), jnp.int32)
        text = jax.jit(lambda w, c: spread.each_clip(encode, w, c)).lower(*args).compile().as_text()
    assert program.collectives_of(text) == ()


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

        def fetch(visual: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = spread.fetch(visual, jnp.asarray(slots), text)
            return out.sum(), out

        (d_visual, d_text), found = jax.jit(jax.grad(fetch, (0, 1), has_aux=True))(visual, text)
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
    sent = [(c.kind, c.times, c.size) for c in program.collectives_of(text)]
    assert sent == [("collective-permute", devices - 1, block)]
