"""Which kernel runs where."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from hico_jax.kernels import backends, cudnn, ring, splash


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "length", "expected"),
    [
        ("tpu", jnp.bfloat16, 128, 16384, splash.BACKEND),
        ("tpu", jnp.float32, 128, 16384, splash.BACKEND),
        ("tpu", jnp.bfloat16, 32, 16384, ring.BLOCKWISE),
        ("gpu", jnp.bfloat16, 128, 16384, cudnn.BACKEND),
        ("gpu", jnp.float32, 128, 16384, ring.BLOCKWISE),
        ("cpu", jnp.bfloat16, 128, 16384, ring.BLOCKWISE),
        (None, jnp.bfloat16, 128, 16384, ring.BLOCKWISE),
    ],
)
def test_the_fastest_that_fits(platform: str | None, dtype: object, width: int, length: int, expected: object) -> None:
    assert backends.pick(dtype, width, length, platform) is expected
