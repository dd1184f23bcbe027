"""Windows and places."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.models.compress import grid


@pytest.mark.parametrize(("size", "number"), [(4, 2), (5, 2), (14, 4), (28, 4), (7, 7), (3, 1)])
def test_windows_cover_everything_and_weigh_one(size: int, number: int) -> None:
    found = grid.windows(size, number)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert (found > 0).any(0).all()
    assert all((np.diff(np.flatnonzero(row)) == 1).all() for row in found)


def test_evenly() -> None:
    assert grid.evenly(16, 4).tolist() == [2, 6, 10, 14]
    assert grid.evenly(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert len(set(grid.evenly(196, 16).tolist())) == 16


def test_shapes() -> None:
    assert grid.shape(12, 4) == (3, 4)
    with pytest.raises(ValueError, match="7 tokens do not fill"):
        grid.shape(7, 4)
    with pytest.raises(ValueError, match="no square grid"):
        grid.side(12)


def test_pooling_keeps_a_constant() -> None:
    found = grid.pool(jnp.full((1, 4, 25, 2), 3.0, jnp.bfloat16), 2, 2, 3)
    assert found.shape == (1, 12, 2)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), 3.0)
