"""The oracle against loops over single queries."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.kernels import reference


@pytest.mark.parametrize("causal", [True, False])
def test_equals_loops_over_single_queries(causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(1, 5, 4, 3)), rng.normal(size=(1, 5, 2, 3)), rng.normal(size=(1, 5, 2, 3))
    positions, segments = np.array([[0, 1, 0, 1, 0]]), np.array([[1, 1, 2, 2, 0]])
    out = reference.attention(
        *(jnp.asarray(a, jnp.float32) for a in (q, k, v)),
        q_positions=jnp.asarray(positions),
        causal=causal,
        k_positions=jnp.asarray(positions),
        q_segments=jnp.asarray(segments),
        k_segments=jnp.asarray(segments),
    )
    expected = np.zeros_like(q)
    for i in range(4):  # the last token is padding
        keys = [j for j in range(4) if segments[0, j] == segments[0, i] and (not causal or j <= i)]
        for h in range(4):
            weights = np.exp([q[0, i, h] @ k[0, j, h // 2] / np.sqrt(3) for j in keys])
            expected[0, i, h] = sum(w * v[0, j, h // 2] for w, j in zip(weights / weights.sum(), keys, strict=True))
    np.testing.assert_allclose(out, expected, atol=1e-6)  # float32 rounding of sums of five
