"""LayerNorm behind a sum: the kernel, interpreted, against float64, its gradients against the plain form's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.kernels import decode, norm

EPS = 1e-6
add_and_norm: Any = norm.add_and_norm


def inputs(tokens: int, width: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    x, update = (3 + jax.random.normal(key, (2, tokens, width), jnp.bfloat16) for key in keys[:2])
    return x, update, *(jax.random.normal(key, (width,), jnp.bfloat16) for key in keys[2:])


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PLATFORM", "cpu")


@pytest.mark.usefixtures("on_the_cpu")
def test_the_kernel_sums_and_normalizes_like_float64() -> None:
    args = inputs(6, 64)
    text = str(jax.make_jaxpr(lambda *a: add_and_norm(*a, EPS))(*args))
    assert "pallas_call" in text
    total, normed = add_and_norm(*args, EPS)
    x, update, offset, scale, bias = (np.asarray(a, np.float64) for a in args)
    np.testing.assert_allclose(np.asarray(total, np.float64), x + update + offset, rtol=2**-8)  # rounded to 8 bits once
    exact = np.asarray(total, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * scale + bias
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=2**-8, atol=1e-5)


def test_gradients_of_the_kernel_are_those_of_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(6, 64)
    weights = jax.random.normal(jax.random.key(1), (2, 2, 6, 64), jnp.float32)

    def loss(*args: jax.Array) -> jax.Array:
        both = jnp.stack(add_and_norm(*args, EPS)).astype(jnp.float32)
        return (both * weights).sum()

    plain = jax.jit(jax.grad(loss, range(5)))(*args)
    monkeypatch.setattr(decode, "PLATFORM", "cpu")
    through = jax.jit(jax.grad(lambda *a: loss(*a), range(5)))(*args)
    for got, expected in zip(through, plain, strict=True):
        assert got.dtype == expected.dtype
        scale = float(jnp.abs(expected).max())
        # sums of 12 numbers that were rounded to 8 bits in another order
        np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03 * scale)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("tokens", "width"), [(6, 96), (3, 64), (6, 16)])
def test_what_the_kernel_does_not_take_runs_plain(tokens: int, width: int) -> None:
    args = inputs(tokens, width)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda *a: add_and_norm(*a, EPS))(*args))
    total, normed = add_and_norm(*args, EPS)
    np.testing.assert_array_equal(normed, norm.layer_norm(total, args[3], args[4], EPS))
