"""Blockwise attention against the oracle: values, gradients, what it skips and what it never builds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.kernels import blockwise, reference

# name: rows, queries, keys, causal, how the tokens are split into segments (0 is padding); few shapes: each is compiled
CASES = {
    "one_block": (2, 7, 7, True, None),
    "many_blocks": (1, 32, 32, True, None),
    "uneven": (2, 29, 29, True, None),
    "bidirectional": (2, 29, 29, False, None),
    "more_keys": (2, 11, 27, False, None),
    "padded": (2, 29, 29, True, ((1, 29), (1, 9), (0, 20))),
    "packed": (2, 29, 29, True, ((1, 10), (2, 3), (3, 11), (0, 5), (1, 8), (2, 21))),
    "packed_bidirectional": (2, 29, 29, False, ((1, 10), (2, 14), (0, 5), (1, 29))),
}


def inputs(rows: int, queries: int, keys: int, split: Any, dtype: Any = jnp.float32) -> tuple[tuple, dict]:
    rng = np.random.default_rng(queries + keys)
    shapes = ((rows, queries, 6, 4), (rows, keys, 2, 4), (rows, keys, 2, 4))
    arrays = tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    where = {}
    for side, length in (("q", queries), ("k", keys)):
        segments, positions = np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        if split:
            segments = np.concatenate([np.full(n, s, np.int32) for s, n in split]).reshape(rows, length)
            positions = np.concatenate([np.arange(n, dtype=np.int32) for _, n in split]).reshape(rows, length)
        where |= {f"{side}_segments": jnp.asarray(segments), f"{side}_positions": jnp.asarray(positions)}
    return arrays, where


@functools.cache
def program(attention: Any, causal: bool) -> Any:
    """Gradients and output of one of the two, compiled once for each shape."""

    def loss(q: Any, k: Any, v: Any, where: Any, weight: Any) -> Any:
        out = attention(q, k, v, **where, causal=causal)
        return (out * weight).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


BLOCKS = functools.partial(blockwise.attention, block=8)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_oracle(name: str) -> None:
    rows, queries, keys, causal, split = CASES[name]
    arrays, where = inputs(rows, queries, keys, split)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
    got = program(BLOCKS, causal)(*arrays, where, weight)
    expected = program(reference.attention, causal)(*arrays, where, weight)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, atol=3e-6)  # float32 sums of about 30 terms of size one


def test_padding_queries_give_zeros_and_no_gradient() -> None:
    arrays, where = inputs(2, 29, 29, CASES["padded"][4])
    gradients, out = program(BLOCKS, True)(*arrays, where, jnp.ones(arrays[0].shape))
    padding = np.asarray(where["q_segments"]) == 0
    assert (np.asarray(out)[padding] == 0).all()
    for gradient in gradients:
        assert (np.asarray(gradient)[padding] == 0).all()
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("split", [((1, 16), (2, 16)), None])
def test_blocks_nobody_can_see_are_not_visited(split: Any) -> None:
    """Poison the last block of values: whoever visits it gets NaN, even with weight zero."""
    (q, k, v), where = inputs(1, 32, 32, split)
    _, out = program(BLOCKS, True)(q, k, v.at[:, 24:].set(jnp.nan), where, jnp.ones(q.shape))
    assert np.isfinite(out[:, :16]).all()
    assert np.isnan(out[:, 24:]).all()


def largest(jaxpr: Any) -> int:
    """Elements of the largest array a program forms, inner programs included."""
    sizes = [int(np.prod(v.aval.shape)) for e in jaxpr.eqns for v in e.outvars]
    inner = [largest(j) for e in jaxpr.eqns for p in e.params.values() for j in _programs(p)]
    return max(sizes + inner, default=0)


def _programs(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [j for v in value for j in _programs(v)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def test_never_builds_a_length_by_length_array() -> None:
    (q, k, v), where = inputs(1, 2048, 2048, None)

    def most(attention: Any) -> int:
        gradient = jax.grad(lambda q: attention(q, k, v, **where, causal=True).sum())
        return largest(jax.make_jaxpr(gradient)(q).jaxpr)

    assert most(reference.attention) >= 2048 * 2048  # the measure itself works
    assert most(functools.partial(blockwise.attention, block=64)) <= 2 * q.size


def test_half_precision_is_near_float32() -> None:
    arrays, where = inputs(2, 29, 29, None, jnp.bfloat16)
    both = jax.jit(lambda *a: [attend(*a, **where, causal=True) for attend in (BLOCKS, reference.attention)])
    got, expected = both(*arrays)
    assert got.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: weights and output are each rounded once
    np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=3e-2)
