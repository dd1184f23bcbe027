"""The TPU's step of the ring, interpreted on CPU: against XLA's step, and as a whole ring against float64."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.kernels import blockwise, ring, splash
from hico_jax.models import attention
from hico_jax.parallel import sharding
from tests.hico_jax.kernels.ring_cases import Case, dealt, oracle, program


@pytest.mark.parametrize("causal", [True, False])
def test_a_step_equals_the_blockwise_one(causal: bool) -> None:
    """Under a log-sum-exp that is not its own, as in a ring."""
    rng = np.random.default_rng(0)
    q, out, d_out = (jnp.asarray(rng.normal(size=(1, 128, 2, 64)), jnp.float32) for _ in range(3))
    k, v = (jnp.asarray(rng.normal(size=(1, 128, 1, 64)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.repeat([1, 2, 0], [70, 40, 18])[None], jnp.int32)
    positions = jnp.arange(128, dtype=jnp.int32)[None] if causal else None
    real = np.asarray(segments != 0)
    found = jax.jit(splash.INTERPRETED.forward)(q, k, v, segments, segments, positions)
    expected = jax.jit(ring.BLOCKWISE.forward)(q, k, v, segments, segments, positions)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(f)[real], np.asarray(e)[real], atol=1e-5)
    lse = jnp.where(segments[..., None] != 0, expected[1] + 0.7, 1e30)
    found = jax.jit(splash.INTERPRETED.backward)(q, k, v, out, lse, d_out, segments, segments, positions)
    expected = jax.jit(ring.BLOCKWISE.backward)(q, k, v, out, lse, d_out, segments, segments, positions)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, atol=1e-5 * max(1, np.abs(e).max()))


def test_one_device_runs_it_without_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `attend` does on a TPU, for packed rows: values and gradients of XLA's kernel."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "BACKEND", splash.INTERPRETED)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(1, 256, h, 64)), jnp.float32) for h in (2, 1, 1, 2))
    segments = jnp.asarray(np.repeat([1, 2, 0], [150, 90, 16])[None], jnp.int32)
    positions = jnp.concatenate([jnp.arange(150), jnp.arange(90), jnp.zeros(16, int)]).astype(jnp.int32)[None]
    where = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}

    @functools.partial(jax.jit, static_argnums=0)
    def both(attend: Callable[..., Any], *inputs: Any) -> Any:
        out, pull = jax.vjp(lambda *a: attend(*a, **where), *inputs)
        return out, pull(d_out)

    found, pulled = both(attention.attend, q, k, v)
    expected, pulled_expected = both(functools.partial(blockwise.attention, causal=True), q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for f, e in zip(pulled, pulled_expected, strict=True):
        np.testing.assert_allclose(f, e, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "gather", "usp"])
def test_a_ring_of_it_equals_float64(strategy: str) -> None:
    case = Case(2, strategy, 1, 128, 4, 2, 64, ((300, 150),))
    inputs, places = dealt(case)
    grads, out = program(2, strategy, splash.INTERPRETED)(*inputs)
    expected = oracle(*case.arrays())
    for name, got in (("out", out), *zip("qkv", grads, strict=True)):
        scale = max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(np.asarray(got), expected[name][:, places], atol=1e-5 * scale, err_msg=name)


def test_metadata_of_a_million_tokens_over_64_devices_cost_nothing() -> None:
    chunk = (1 << 20) // 128
    began = time.process_time()
    full = splash._kernel.__wrapped__(chunk, chunk, False)
    square = splash._kernel.__wrapped__(2 * chunk, 2 * chunk, True)
    assert time.process_time() - began < 2
    numbers = [a.size for k in (full, square) for a in (k.forward + k.d_kv) if hasattr(a, "size")]
    assert sum(numbers) < 1 << 20


def test_what_fits() -> None:
    assert splash.fits(128, 16384)
    assert not splash.fits(32, 16384)
    assert not splash.fits(128, 300)
