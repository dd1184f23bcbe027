"""Means over windows, against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.models.compress import pool


def patches(frames: int = 4, edge: int = 4, width: int = 3, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, frames * edge * edge, width)).astype(np.float32)


def test_space_is_the_mean_of_each_window() -> None:
    x = patches()
    found = pool.Pool("space")(jnp.asarray(x), 16, 4)
    cube = x.reshape(2, 4, 2, 2, 2, 2, 3)  # B T h dh w dw E
    np.testing.assert_allclose(found, cube.mean((3, 5)).reshape(2, 16, 3), atol=1e-6)


def test_two_by_two_is_space_where_the_numbers_are_equal() -> None:
    x = jnp.asarray(patches())
    np.testing.assert_allclose(pool.Pool("2x2")(x, 16, 4), pool.Pool("space")(x, 16, 4), atol=1e-6)
    assert pool.Pool("2x2")(jnp.asarray(patches(edge=14)), 4 * 49, 4).shape == (2, 196, 3)
    with pytest.raises(ValueError, match=r"make no 9 tokens of 4 x 4 patches; .* to 4"):
        pool.Pool("2x2")(x, 36, 4)


def test_time_averages_the_frames_and_keeps_the_places() -> None:
    x = patches()
    found = pool.Pool("time")(jnp.asarray(x), 16, 4)
    np.testing.assert_allclose(found, x.reshape(2, 4, 16, 3).mean(1), atol=1e-6)
    two = pool.Pool("time")(jnp.asarray(x), 32, 4)  # more tokens than a frame has patches: two moments
    np.testing.assert_allclose(two[:, :16], x.reshape(2, 4, 16, 3)[:, :2].mean(1), atol=1e-6)


def test_windows_that_do_not_divide_the_grid_overlap_as_in_adaptive_pooling() -> None:
    x = patches(frames=1, edge=5, batch=1)
    found = pool.Pool("space")(jnp.asarray(x), 4, 1).reshape(2, 2, 3)
    square = x.reshape(5, 5, 3)
    np.testing.assert_allclose(found[0, 1], square[:3, 2:].mean((0, 1)), atol=1e-6)


def test_every_patch_counts() -> None:
    x = jnp.asarray(patches(edge=5))
    for kind in ("space", "time"):
        grads = jax.jit(jax.grad(lambda x, kind=kind: pool.Pool(kind)(x, 16, 4).sum()))(x)
        assert (grads > 0).all()


def test_wrong_numbers() -> None:
    with pytest.raises(ValueError, match=r"compressor\.kind is 'max'"):
        pool.PoolConfig(kind="max")
    with pytest.raises(ValueError, match="cannot make 7 tokens of 64 patches in 4 frames"):
        pool.Pool("space")(jnp.asarray(patches()), 7, 4)
    with pytest.raises(ValueError, match="no square grid"):
        pool.Pool("space")(jnp.zeros((1, 8, 3)), 4, 1)
