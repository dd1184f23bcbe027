"""No compression."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from hico_jax.models.compress import keep


def test_every_patch_is_a_token() -> None:
    x = jnp.ones((1, 8, 3))
    assert keep.Keep()(x, 8, 2) is x
    with pytest.raises(ValueError, match="told of 4 tokens but the tower gives 8 patches"):
        keep.Keep()(x, 4, 2)
