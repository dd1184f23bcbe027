"""Which strategy is in force, and that a compiled program knows it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hico_jax.parallel import context


def test_auto_gathers_what_is_small_and_rings_what_is_not() -> None:
    assert context.strategy(context.MOST_GATHERED) == "gather"
    assert context.strategy(context.MOST_GATHERED + 1) == "ring"
    with context.using("usp"):
        assert context.strategy(0) == "usp"


def test_another_strategy_compiles_anew() -> None:
    traced = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        traced.append(context.strategy(0))
        return x

    f(jnp.ones(1))
    with context.using("ring"):
        f(jnp.ones(1))
    f(jnp.ones(1))
    assert traced == ["gather", "ring"]
