"""The models' attention: its defaults, its padding, and the single query of decoding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hico_jax.kernels import blockwise, reference
from hico_jax.models import attention
from hico_jax.parallel.mesh import MeshConfig, make_mesh


def arrays(rows: int, length: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(rows, length, heads, 4)), jnp.float32) for heads in (4, 2, 2)]


def where(rows: int, length: int) -> dict[str, Any]:
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    ones = jnp.ones((rows, length), jnp.int32)
    return {"q_positions": positions, "k_positions": positions, "q_segments": ones, "k_segments": ones}


@pytest.mark.parametrize("causal", [True, False])
def test_defaults_are_one_segment_counted_from_zero(causal: bool) -> None:
    q, k, v = arrays(2, 9)
    expected = jax.jit(lambda *a: reference.attention(*a, **where(2, 9), causal=causal))(q, k, v)
    found = jax.jit(lambda *a: attention.attend(*a, causal=causal))(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 sums of nine terms


def test_padding_is_zero_and_never_nan_in_gradients() -> None:
    q, k, v = arrays(1, 6)
    segments = jnp.asarray([[1, 1, 1, 1, 0, 0]])

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.square(attention.attend(q, k, v, q_segments=segments, k_segments=segments)).sum()

    assert (attention.attend(q, k, v, q_segments=segments, k_segments=segments)[:, 4:] == 0).all()
    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all()
        assert (gradient[:, 4:] == 0).all()


def test_one_query_equals_the_last_row_of_the_whole() -> None:
    q, k, v = arrays(2, 9)
    whole = reference.attention(q, k, v, **where(2, 9), causal=True)
    lie = [jnp.swapaxes(jnp.pad(a, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=7.0), 1, 2) for a in (k, v)]
    visible = jnp.broadcast_to(jnp.arange(12) < 9, (2, 12))
    one = attention.attend_one(q[:, -1:], *lie, visible)
    np.testing.assert_allclose(one, whole[:, -1:], atol=1e-6)


@pytest.mark.parametrize(
    "split", [None, ((1, 520),), ((1, 300), (0, 220)), ((0, 520),), ((1, 300), (2, 200), (0, 20))], ids=str
)
@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_path_is_taken_only_where_its_mask_says_the_same(
    split: Any, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU cuDNN would run; here its stand-in of the same signature does. Packed rows must not reach it."""
    calls = []
    original = jax.nn.dot_product_attention

    def stand_in(*arrays: Any, implementation: str, **options: Any) -> Any:
        assert implementation == "cudnn"
        calls.append(1)
        with jax.numpy_dtype_promotion("standard"):  # the stand-in mixes types; cuDNN would not
            return original(*arrays, implementation="xla", **options)

    def flash(q: Any, k: Any, v: Any, causal: bool) -> Any:
        return stand_in(q, k, v, is_causal=causal, implementation="cudnn")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention.cudnn, "attention", flash)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    length = 520
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, 8)), jnp.bfloat16) for heads in (4, 2, 2))
    ours = where(1, length)
    given = {}
    if split:
        segments = jnp.asarray(np.concatenate([np.full(n, s, np.int32) for s, n in split])[None])
        positions = jnp.asarray(np.concatenate([np.arange(n, dtype=np.int32) for _, n in split])[None])
        given = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
        ours = given
    expected = jax.jit(lambda *a: reference.attention(*a, **ours, causal=causal))(q, k, v)
    packed = split is not None and len({s for s, _ in split if s}) > 1
    for plain in (False,) if packed else (False, True):
        calls.clear()
        # one program; what is given stays the same object, which `attend` asks about
        got = jax.jit(lambda *a, plain=plain: attention.attend(*a, causal=causal, plain=plain, **given))(q, k, v)
        assert calls
        # bfloat16 has 8 bits: weights and output are each rounded once
        np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=3e-2)


@pytest.mark.parametrize(
    ("mesh", "length", "says"),
    [
        (MeshConfig(1, 1, 4, 2), 12, r"rows of 12 tokens .* mesh\.sequence=4; make their length a multiple of 8"),
        (MeshConfig(1, 1, 2, 4), 8, r"4 heads and 2 key/value heads .* mesh\.tensor=4; use a divisor of 2"),
    ],
)
def test_rows_and_heads_that_devices_cannot_share(mesh: MeshConfig, length: int, says: str) -> None:
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2))
    where = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(q: jax.Array, k: jax.Array, where: jax.Array) -> jax.Array:
        return attention.attend(q, k, k, q_positions=where, k_positions=where, q_segments=where, k_segments=where)

    with jax.set_mesh(make_mesh(mesh)), pytest.raises(ValueError, match=says):
        jax.eval_shape(run, q, k, where)


@pytest.mark.parametrize("first", [0, 5, 8, 19, 24])
def test_a_piece_over_what_stands_before_it(first: int) -> None:
    """By blocks and their log-sums, as on a GPU, and densely; keys behind the piece are garbage."""
    rng = np.random.default_rng(first)
    rows, size, places, heads, kv_heads, width = 2, 8, 32, 4, 2, 8
    q = jnp.asarray(rng.normal(size=(rows, size, heads, width)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(rows, kv_heads, places, width)), jnp.float32) for _ in range(2))

    def flash(q: Any, k: Any, v: Any) -> Any:
        ones = jnp.ones(q.shape[:2], jnp.int32)
        where = jnp.zeros_like(ones)
        return blockwise.forward(q, k, v, where, where, ones, ones, causal=False, dtype=jnp.float32)

    blocks = jax.jit(lambda first: attention._attend_blocks(q, k, v, first, flash))(jnp.asarray(first))
    dense = jax.jit(lambda first: attention.attend_piece(q, k, v, first))(jnp.asarray(first))
    raw = np.einsum("BqKGd,BKSd->BKGqS", np.asarray(q).reshape(rows, size, kv_heads, -1, width), k) / np.sqrt(width)
    raw = np.where(np.arange(places) <= first + np.arange(size)[:, None], raw, -np.inf)
    weights = np.exp(raw - raw.max(-1, keepdims=True))
    want = np.einsum("BKGqS,BKSd->BqKGd", weights / weights.sum(-1, keepdims=True), v).reshape(q.shape)
    np.testing.assert_allclose(blocks, want, atol=2e-6)
    np.testing.assert_allclose(dense, want, atol=2e-6)
