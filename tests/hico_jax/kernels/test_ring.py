"""Context-parallel attention against the whole softmax in float64: values and gradients of drawn cases."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from hico_jax.kernels import ring
from hico_jax.parallel import zigzag
from hico_jax.plan import program as program_text
from tests.hico_jax.kernels.ring_cases import AXIS, Case, dealt, oracle, program

# strategy, ring size, rows, tokens of a chunk, heads, key/value heads
CASES = [
    ("ring", 2, 2, 3, 2, 1), ("ring", 3, 1, 4, 4, 2), ("ring", 8, 2, 5, 6, 2), ("gather", 4, 1, 5, 3, 3),
    ("usp", 2, 1, 3, 4, 2), ("usp", 8, 1, 3, 8, 4),
]  # fmt: skip
MORE = [
    ("ring", 1, 1, 6, 2, 1), ("ring", 4, 2, 1, 3, 1), ("ring", 8, 1, 300, 4, 2), ("gather", 8, 2, 2, 4, 1),
    ("gather", 5, 1, 4, 2, 2), ("usp", 4, 2, 2, 4, 4), ("usp", 6, 1, 2, 6, 6),
]  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [*CASES, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE)], ids=lambda s: f"{s[0]}{s[1]}"
)
def test_values_and_gradients_equal_float64(sizes: tuple) -> None:
    strategy, size, *rest = sizes
    first = Case(size, strategy, *rest, width=4, splits=())
    run = program(size, strategy)
    for seed in range(4):
        case = first.split(seed)
        inputs, places = dealt(case)
        grads, out = run(*inputs)
        expected = oracle(*case.arrays())
        for name, got in (("out", out), *zip("qkv", grads, strict=True)):
            scale = max(1.0, float(np.abs(expected[name]).max()))
            np.testing.assert_allclose(
                np.asarray(got), expected[name][:, places], atol=1e-5 * scale, err_msg=f"{name} of {case}"
            )


def test_half_precision_is_near_float64() -> None:
    case = Case(2, "ring", 1, 16, 4, 2, 8, ((50, 10),))
    inputs, places = dealt(case, jnp.bfloat16)
    grads, out = program(2, "ring")(*inputs)
    expected = oracle(*case.arrays())
    for name, got in (("out", out), *zip("qkv", grads, strict=True)):
        assert got.dtype == jnp.bfloat16
        scale = max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(
            np.asarray(got, np.float32), expected[name][:, places], atol=2e-2 * scale, err_msg=name
        )


def test_the_ring_sends_only_keys_and_values_and_one_step_less_than_devices() -> None:
    """Forward: keys, values and segments seven times each over eight devices; no gather, no reduction."""
    case = Case(8, "ring", 1, 4, 2, 1, 4, ((64,),))
    inputs, _ = dealt(case)
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(AxisType.Auto,))
    part = PartitionSpec(None, AXIS)
    local = functools.partial(ring.attention, axis=AXIS, size=8)
    forward = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(part,) * 5, out_specs=part, check_vma=False))
    text = forward.lower(*inputs[:5]).compile().as_text()
    hop = 2 * 8 * 4 * 4 + 8 * 4  # bytes: keys and values of 8 tokens and 4 numbers, 8 segments
    assert program_text.by_kind(program_text.collectives_of(text)) == {"collective-permute": (3 * 7, 7 * hop)}


def test_mistakes_say_what_to_change() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        zigzag.order(24, 8)
    with pytest.raises(ValueError, match="one of ring, gather, usp"):
        program(2, "star")(*dealt(Case(2, "ring", 1, 2, 2, 1, 4, ((8,),)))[0])
    with pytest.raises(ValueError, match="share no divisor"):
        ring.exchange(8, 3)
    odd = [a[:, :-2] for a in dealt(Case(2, "ring", 1, 2, 2, 1, 4, ((8,),)))[0]]
    with pytest.raises(ValueError, match="not two equal chunks"):
        program(2, "ring")(*odd)


@pytest.mark.parametrize("strategy", ["gather", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ring", "usp"))])
def test_queries_in_slices_give_the_same(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slices a chunk, of packed rows with padding."""
    monkeypatch.setattr(ring, "SLICE_STEP", 2)
    monkeypatch.setattr(ring, "MOST_SUMS", 512)
    case = Case(2, strategy, 2, 6, 4, 2, 4, ((20,), (9, 11)))
    inputs, places = dealt(case)
    assert ring.slices_of(jnp.zeros((2, 12, 4, 4))) == 3
    grads, out = program(2, strategy)(*inputs)
    expected = oracle(*case.arrays())
    for name, got in (("out", out), *zip("qkv", grads, strict=True)):
        scale = max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(np.asarray(got), expected[name][:, places], atol=1e-5 * scale, err_msg=name)
