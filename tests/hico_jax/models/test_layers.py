from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax.models import layers


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_layer_norm():
    norm = layers.LayerNorm(8, eps=0.5)
    norm.scale.set_value(jnp.arange(8.0))
    norm.bias.set_value(jnp.ones(8))
    x = random(3, 8)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 0.5) * np.arange(8) + 1
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-6)


def test_rms_norm_rounds_before_the_weight():
    norm = layers.RMSNorm(8, eps=0.5)
    norm.scale.set_value(jnp.arange(8.0) / 3)
    x = random(3, 8)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected * np.arange(8) / 3, atol=1e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    wide = half.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 0.5)
    expected = unit.astype(jnp.bfloat16) * (jnp.arange(8.0) / 3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(half).astype(jnp.float32), expected.astype(jnp.float32))


def test_linear_follows_the_input():
    linear = layers.Linear(4, 3, ("embed", "mlp"), rngs=nnx.Rngs(0))
    linear.b.set_value(jnp.arange(3.0))
    x = random(2, 5, 4)
    np.testing.assert_allclose(linear(jnp.asarray(x)), x @ np.asarray(linear.w[...]) + np.arange(3), atol=1e-6)
    assert linear(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert layers.Linear(4, 3, ("embed", "mlp"), rngs=nnx.Rngs(0), bias=False).b is None


def test_parameters_need_an_axis_for_every_dim():
    with pytest.raises(AssertionError):
        layers.param(jnp.ones((2, 3)), ("embed",))


def test_stack_draws_every_layer_anew():
    stacked = layers.stack(lambda r: layers.Linear(4, 3, ("embed", "mlp"), rngs=r), 3, nnx.Rngs(0))
    weights = np.asarray(stacked.w[...])
    assert weights.shape == (3, 4, 3)
    assert len({w.tobytes() for w in weights}) == 3
    assert stacked.w.get_metadata("axes") == ("embed", "mlp")
    np.testing.assert_array_equal(layers.layer_slice(stacked, 1, 3).w[...], weights[1:])


def test_gelu_is_exact():
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    expected = [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x]
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, atol=1e-6)


def test_rotation_depends_on_distance_alone():
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8)[..., ::-1].copy()

    def score(at, other):
        a, b = (layers.rotary_angles(jnp.asarray([[p]]), 8, 1e4) for p in (at, other))
        return float((layers.rotate(jnp.asarray(q), *a) * layers.rotate(jnp.asarray(k), *b)).sum())

    assert abs(score(7, 3) - score(104, 100)) < 1e-5
    assert abs(score(7, 3) - score(7, 4)) > 1e-2
    np.testing.assert_array_equal(layers.rotate(jnp.asarray(q), *layers.rotary_angles(jnp.asarray([[0]]), 8, 1e4)), q)


def test_rotation_by_hand():
    cos, sin = layers.rotary_angles(jnp.asarray([[2]]), 4, 100.0)  # frequencies 1 and 0.1
    x = np.float32([1, 2, 3, 4]).reshape(1, 1, 1, 4)
    c, s = np.cos([2, 0.2]), np.sin([2, 0.2])
    expected = [c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + s[0], 4 * c[1] + 2 * s[1]]
    np.testing.assert_allclose(layers.rotate(jnp.asarray(x), cos, sin).ravel(), expected, rtol=1e-6)


def test_yarn_has_the_recorded_constants():
    """Theta 1e6, width 128, 32,768 positions, four times as many: the values of the NIAH evaluation."""
    plain = 1e6 ** (-np.arange(64) / 64)
    slowed = layers.yarn(plain.astype(np.float32), 1e6, 4.0, 32768)
    ramp = np.clip((np.arange(64) - 23) / (40 - 23), 0, 1)
    np.testing.assert_allclose(slowed, plain * (1 - ramp) + plain / 4 * ramp, rtol=1e-6)
    cos, sin = layers.rotary_angles(jnp.zeros((1, 1), jnp.int32), 128, 1e6, kind="yarn", factor=4.0, original=32768)
    np.testing.assert_allclose(cos, 1.138629436, rtol=1e-7)
    np.testing.assert_array_equal(sin, 0)
    cos, _ = layers.rotary_angles(jnp.full((1, 1), 100, jnp.int32), 128, 1e6, kind="yarn", factor=4.0)
    np.testing.assert_allclose(cos[0, 0, :64], 1.138629436 * np.cos(100 * slowed.astype(float)), atol=1e-5)


def test_slices_give_what_the_whole_gives() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 3)), jnp.float32)
    f = lambda x: jnp.square(x).sum(-1, keepdims=True) * x
    run = lambda most: jax.jit(jax.value_and_grad(lambda x: jnp.sin(layers.in_slices(f, x, most)).sum()))(x)
    for found, expected in zip(run(4), run(100), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
