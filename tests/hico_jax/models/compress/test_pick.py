"""Chosen patches: which ones, in which order, and that nothing but the choice is changed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.models.compress import grid, pick


def patches(frames: int = 4, per_frame: int = 16, width: int = 8, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, frames * per_frame, width)).astype(np.float32)


def places(found: np.ndarray, x: np.ndarray) -> list[list[int]]:
    """Where each token came from; fails unless it is a patch."""
    return [[int(np.flatnonzero((x[b] == token).all(1))[0]) for token in found[b]] for b in range(len(x))]


def test_even() -> None:
    x = patches()
    found = np.asarray(pick.Pick("even", 2)(jnp.asarray(x), 16, 4))
    expected = [t * 16 + i for t in range(4) for i in grid.evenly(16, 4)]
    assert places(found, x) == [expected, expected]


def test_salient_keeps_what_others_look_at_and_means_of_the_rest() -> None:
    """Against loops in NumPy."""
    x = patches(frames=1, per_frame=32)
    found = np.asarray(pick.salient(jnp.asarray(x), 12, 2))
    for b in range(2):
        heads = x[b].reshape(32, 2, 4)
        worth = np.zeros(32)
        for h in range(2):
            raw = heads[:, h] @ heads[:, h].T / 2.0
            weights = np.exp(raw - raw.max(1, keepdims=True))
            worth += (weights / weights.sum(1, keepdims=True)).mean(0) / 2
        best = sorted(np.argsort(-worth)[:10])
        np.testing.assert_array_equal(found[b, :10], x[b, best])
        rest = [i for i in range(32) if i not in best]
        centres = [rest[i] for i in grid.evenly(22, 2)]
        unit = x[b] / np.linalg.norm(x[b], axis=1, keepdims=True)
        joins = [int(np.argmax(unit[i] @ unit[centres].T)) for i in rest]
        for c in range(2):
            mean = x[b, [i for i, j in zip(rest, joins, strict=True) if j == c]].mean(0)
            np.testing.assert_allclose(found[b, 10 + c], mean, atol=1e-5)


def test_novel_takes_what_changes() -> None:
    x = patches()
    for t in range(1, 4):
        x[:, t * 16 + 4 : (t + 1) * 16] = x[:, 4:16] + 0.01 * x[:, t * 16 + 4 : (t + 1) * 16]  # hardly moves
    found = np.asarray(pick.Pick("novel", 2)(jnp.asarray(x), 16, 4))
    unit = x / np.linalg.norm(x, axis=2, keepdims=True)
    for b, taken in enumerate(places(found, x)):
        change = {i: 1 - unit[b, i] @ unit[b, i - 16] for i in range(16, 64)}
        assert taken[8:] == sorted(sorted(change, key=lambda i: -change[i])[:8])
        assert taken[:8] == grid.evenly(16, 8).tolist()
        assert all(i % 16 < 4 for i in taken[8:])


def test_an_image_has_no_time() -> None:
    x = jnp.asarray(patches(frames=1))
    np.testing.assert_array_equal(pick.Pick("novel", 2)(x, 4, 1), pick.Pick("even", 2)(x, 4, 1))


@pytest.mark.parametrize("kind", pick.KINDS)
def test_all_patches_are_all_patches(kind: str) -> None:
    x = jnp.asarray(patches())
    np.testing.assert_array_equal(pick.Pick(kind, 2)(x, 64, 4), x)
    grads = jax.jit(jax.grad(lambda x: pick.Pick(kind, 2)(x, 16, 4).sum()))(x)
    assert np.isfinite(grads).all()
    assert np.abs(grads).sum() > 0


def test_wrong_kinds_and_numbers() -> None:
    with pytest.raises(ValueError, match=r"compressor\.kind is 'best'"):
        pick.PickConfig(kind="best")
    with pytest.raises(ValueError, match="cannot make 6 tokens"):
        pick.Pick("even", 2)(jnp.asarray(patches()), 6, 4)
