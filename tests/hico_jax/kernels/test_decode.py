"""Kernels of decoding, interpreted, against plain products and attention; and a whole model through both."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax import generate
from hico_jax.kernels import decode
from hico_jax.models import attention
from hico_jax.models.llm import qwen2
from hico_jax.models.llm.decoder import Stream

LAYER = jnp.asarray(1, jnp.int32)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@pytest.mark.parametrize(
    ("rows", "inner", "outer", "tiles"),
    [(1, 64, 256, None), (3, 96, 128, decode.Tiles(128, 32, 2)), (2, 64, 256, decode.Tiles(64, 16, 5))],
)
def test_a_product_out_of_the_stack_equals_the_product(rows: int, inner: int, outer: int, tiles: Any) -> None:
    x, stack = normal(0, rows, inner), normal(1, 2, inner, outer)
    got = decode.product(x, [stack], LAYER, tiles=tiles, interpret=True)[0]
    exact = np.asarray(x, np.float64) @ np.asarray(stack[1], np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=1e-4)  # float32 sums of up to 96 terms of size one


def test_several_products_of_one_input_equal_each_alone() -> None:
    x, stacks = normal(0, 2, 64), [normal(seed, 2, 64, outer) for seed, outer in ((1, 256), (2, 128), (3, 384))]
    together = decode.product(x, stacks, LAYER, interpret=True)
    for got, stack in zip(together, stacks, strict=True):
        np.testing.assert_allclose(got, decode.product(x, [stack], LAYER, interpret=True)[0], atol=1e-4)


def test_wide_tiles_are_for_wide_matrices() -> None:
    assert decode.tiles_of(3584, [18944, 18944]) == decode.TILES
    assert decode.tiles_of(18944, [3584]) == decode.SMALL_TILES
    assert decode.tiles_of(1536, [1536, 200]) is None
    assert decode.tiles_of(1000, [1536]) is None


@pytest.mark.parametrize(("heads", "kv_heads", "keys"), [(6, 2, 150), (16, 1, 40)])
def test_attention_out_of_the_stack_equals_plain_attention(heads: int, kv_heads: int, keys: int) -> None:
    q = normal(2, 2, heads, 16)
    k, v = (normal(seed, 2, 2, kv_heads, keys, 16) for seed in (3, 4))
    visible = np.arange(keys)[None] % np.array([[3], [keys]]) == 0  # every third key, and the first alone
    got = decode.attention(q, k, v, LAYER, jnp.asarray(visible), interpret=True)
    exact = attention._attend_one(q[:, None], k[1], v[1], jnp.asarray(visible))[:, 0].astype(jnp.float32)
    np.testing.assert_allclose(got, exact, atol=2e-2)  # bfloat16 weights, rounded before or after they add up to one
    np.testing.assert_allclose(got[1], np.repeat(v[1, 1, :, 0], heads // kv_heads, 0), atol=1e-6)


def test_a_matrix_outside_the_stack_and_one_of_no_whole_tiles_are_plain_products() -> None:
    x, stack = normal(5, 1, 1, 48), normal(6, 2, 48, 4, 8)
    plain = decode.contract("BLD,DHd->BLHd", x, stack[1])
    assert plain.shape == (1, 1, 4, 8)
    np.testing.assert_array_equal(decode.contract("BLD,DHd->BLHd", x, decode.Stacked(stack, LAYER)), plain)


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_answers_the_same_through_the_kernels(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(qwen2.VARIANTS["nano"], num_kv_heads=4, mlp_dim=256, num_layers=2)
    llm = config.build(rngs=nnx.Rngs(params=0))
    llm = jax.tree.map(lambda p: p.astype(jnp.bfloat16), llm)
    length = 9
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    ids = jax.random.randint(jax.random.key(7), (rows, length), 0, config.vocab_size, jnp.int32)
    stream = Stream(x=llm.embed(ids), positions=positions, segments=jnp.ones_like(ids), slots=jnp.full_like(ids, -1))
    token = jax.random.randint(jax.random.key(8), (rows, 1), 0, config.vocab_size, jnp.int32)

    def step(llm: Any, cache: Any) -> Any:
        return llm.decode(llm.embed(token), cache)

    begun = jax.jit(lambda llm, stream: generate.prefill(llm, stream, None, room=2)[1])(llm, stream)
    plain, plain_cache = jax.jit(step)(llm, begun)
    taken: list[str] = []
    product, attend = decode.product, decode.attention
    monkeypatch.setattr(decode, "PLATFORM", "cpu")
    monkeypatch.setattr(decode, "product", lambda *a, **k: (taken.append("product"), product(*a, **k))[1])
    monkeypatch.setattr(decode, "attention", lambda *a, **k: (taken.append("attention"), attend(*a, **k))[1])
    got, cache = jax.jit(lambda llm, cache: step(llm, cache))(llm, begun)
    assert taken.count("attention") == 1  # the loop's body is traced once
    assert "product" in taken
    # Hidden states of size one behind two layers whose sums are rounded to 8 bits once, here before, there after.
    np.testing.assert_allclose(got.astype(jnp.float32), plain.astype(jnp.float32), atol=0.08)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(plain_cache), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.08)
