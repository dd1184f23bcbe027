"""Packed products, interpreted, against products in float64; and that they lower for a GPU at real sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.kernels import packed
from hico_jax.kernels.packed import Cut, Norm, Packed

LAYER = jnp.asarray(1, jnp.int32)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def made(seed: int, outer: int, inner: int, *, int8: bool) -> tuple[Packed, np.ndarray]:
    """A packed stack of two layers, and its second layer as numbers."""
    value = normal(seed, 2, outer, inner)
    if not int8:
        half = value.astype(jnp.bfloat16)
        return Packed(half, None, (inner,), (outer,)), np.asarray(half[1], np.float64)
    scale = jnp.abs(value).max(-1) / 127
    whole = jnp.round(value / scale[..., None]).astype(jnp.int8)
    exact = np.asarray(whole[1], np.float64) * np.asarray(scale[1], np.float64)[:, None]
    return Packed(packed.words(whole), scale, (inner,), (outer,)), exact


def test_words_hold_every_number() -> None:
    numbers = jnp.arange(-128, 128, dtype=jnp.int8).reshape(2, 128)
    words = packed.words(numbers)
    assert words.shape == (2, 32)
    np.testing.assert_array_equal(packed.unpacked(words), numbers)
    each = [packed._number(words, k) for k in range(packed.BYTES)]  # as the kernel reads them
    np.testing.assert_array_equal(jnp.concatenate(each, axis=1), numbers.astype(jnp.float32))
    with pytest.raises(ValueError, match="do not divide by 4"):
        packed.words(jnp.zeros((2, 6), jnp.int8))


@pytest.mark.parametrize("int8", [True, False])
def test_a_pack_unpacks_to_its_matrix(int8: bool) -> None:
    pack, exact = made(0, 6, 8, int8=int8)
    pack = Packed(pack.values, pack.scale, (8,), (2, 3))
    assert pack.shape == (2, 8, 2, 3)
    np.testing.assert_allclose(pack[1].astype(jnp.float32), exact.T.reshape(8, 2, 3), rtol=1e-6)
    np.testing.assert_allclose(pack[1].take(jnp.asarray([[4]]), jnp.float32)[0], exact[4:5], rtol=1e-6)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_with_all_around_it_equals_the_plain_one(int8: bool, rows: int) -> None:
    inner, kind = 1536, {"interpret": True}
    x = normal(9, rows, inner).astype(jnp.float32 if int8 else jnp.bfloat16)
    exact, add = np.asarray(x, np.float64), normal(7, rows, 64)
    (a, wide_a), (b, wide_b), (c, wide_c) = (made(i, n, inner, int8=int8) for i, n in ((1, 64), (2, 64), (3, 32)))
    for cut in (None, Cut(8, 64, 2, 4)):
        (got,) = packed.product(x, [a], LAYER, add=add, cut=cut, **kind)
        np.testing.assert_allclose(got, exact @ wide_a.T + np.asarray(add), atol=1e-3)
    gain, biases = normal(4, 2, inner), [normal(5, 2, n) for n in (64, 64, 32)]
    normed = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-6) * np.asarray(gain[1], np.float64)
    several = packed.product(x, [a, b, c], LAYER, norm=Norm(gain, 1e-6), biases=biases, **kind)
    for got, wide, bias in zip(several, (wide_a, wide_b, wide_c), biases, strict=True):
        np.testing.assert_allclose(got, normed @ wide.T + np.asarray(bias[1]), atol=2e-3)
    (got,) = packed.product(x, [a, b], LAYER, norm=Norm(gain, 1e-6), gated=True, **kind)
    gate, up = normed @ wide_a.T, normed @ wide_b.T
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("inner", "outer", "gated", "rows"),
    [(3584, (18944, 18944), True, 16), (18944, (3584,), False, 8), (1536, (1536, 256, 256), False, 8),
     (8960, (1536,), False, 4), (1536, (151936,), False, 16)],
)  # fmt: skip
def test_kernels_of_real_sizes_lower_for_a_gpu(inner: int, outer: tuple[int, ...], gated: bool, rows: int) -> None:
    shape = jax.ShapeDtypeStruct
    packs = [
        Packed(shape((2, n, inner // 4), jnp.int32), shape((2, n), jnp.float32), (inner,), (n,)) for n in outer
    ]  # fmt: skip
    cut: Any = packed.cut_of(packs, gated)
    assert cut.rows == rows
    assert cut.warps * 32 > cut.across
    run = jax.jit(lambda x, packs, layer: packed.product(x, packs, layer, gated=gated))
    traced = run.trace(shape((1, inner), jnp.float32), packs, shape((), jnp.int32))
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_odd_sizes_are_left_to_plain_products() -> None:
    shape = jax.ShapeDtypeStruct
    assert (
        packed.cut_of([Packed(shape((92553, 1024), jnp.int32), shape((92553,), jnp.float32), (4096,), (92553,))])
        is None
    )
    assert packed.cut_of([Packed(shape((64, 20), jnp.bfloat16), None, (20,), (64,))]) is None
