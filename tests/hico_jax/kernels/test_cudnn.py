"""cuDNN's step of the ring. What it computes is tested on a GPU; what decides, anywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.kernels import cudnn, ring


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [
        ([1, 1], [1, 1], True),
        ([2, 0], [2, 2], True),
        ([0, 0], [0, 0], True),
        ([1, 2], [1, 1], False),
        ([2, 2], [1, 2], False),
    ],
)
def test_two_segments_are_noticed(queries: list[int], keys: list[int], expected: bool) -> None:
    assert bool(cudnn._one_segment(jnp.asarray([queries]), jnp.asarray([keys]))) is expected


def test_its_primitives_take_what_we_give_them() -> None:
    """Shapes of both passes, without a GPU: the private names and attributes are still there."""
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    lse = jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    out = jax.eval_shape(lambda q, k, s: cudnn.forward(q, k, k, s, s, None), q, k, segments)
    assert [a.shape for a in out] == [(2, 256, 4, 64), (2, 256, 4)]
    grads = jax.eval_shape(lambda q, k, l, s: cudnn.backward(q, k, k, q, l, q, s, s, None), q, k, lse, segments)
    assert [a.shape for a in grads] == [q.shape, k.shape, k.shape]
    attend: Any = cudnn.attention
    whole = lambda q, k: jax.value_and_grad(lambda *a: attend(*a, True).sum(), (0, 1, 2))(q, k, k)
    assert [a.shape for a in jax.eval_shape(whole, q, k)[1]] == [q.shape, k.shape, k.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_a_step_equals_the_blockwise_one(causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, d_out = (jnp.asarray(rng.normal(size=(2, 512, 4, 64)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 512, 2, 64)), jnp.bfloat16) for _ in range(2))
    segments = jnp.ones((2, 512), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(512, dtype=jnp.int32), (2, 512)) if causal else None
    found = cudnn.forward(q, k, v, segments, segments, positions)
    expected = ring.BLOCKWISE.forward(q, k, v, segments, segments, positions)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, atol=2e-2)
    rest = (expected[0], expected[1] + 0.5, d_out, segments, segments, positions)
    found = cudnn.backward(q, k, v, *rest)
    expected = ring.BLOCKWISE.backward(q, k, v, *rest)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, atol=2e-2 * max(1.0, float(np.abs(e).max())))
