"""Packed models: what is packed, what it costs in logits, and that kernels and plain products agree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax import generate, quantize
from hico_jax.kernels import decode, packed
from hico_jax.kernels.packed import Packed
from hico_jax.models.llm import internlm2, qwen2
from hico_jax.models.llm.decoder import Stream

CONFIGS = {
    "qwen2": dataclasses.replace(qwen2.VARIANTS["nano"], num_kv_heads=4, mlp_dim=256, num_layers=2),
    "internlm2": dataclasses.replace(
        internlm2.VARIANTS["tiny"], vocab_size=512, embed_dim=128, mlp_dim=256, num_layers=2, head_dim=32
    ),
}


def answered(llm: Any) -> Any:
    """Logits behind a prompt of two rows and one token more."""
    ids = jax.random.randint(jax.random.key(7), (2, 9), 0, 512, jnp.int32)
    token = jax.random.randint(jax.random.key(8), (2, 1), 0, 512, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), ids.shape)
    stream = Stream(x=llm.embed(ids), positions=positions, segments=jnp.ones_like(ids), slots=jnp.full_like(ids, -1))
    _, cache = generate.prefill(llm, stream, None, room=2)
    x, _ = llm.decode(llm.embed(token), cache)
    return generate.logits_of(llm, x)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen2", "int8"), ("internlm2", "rows"), pytest.param("internlm2", "int8", marks=pytest.mark.slow),
     pytest.param("qwen2", "rows", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_packed_model_answers_the_same_with_and_without_kernels(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = CONFIGS[name].build(rngs=nnx.Rngs(params=0))
    exact = jax.jit(answered)(llm)
    llm = quantize.quantized(llm, kind)
    plain = jax.jit(lambda llm: answered(llm))(llm)
    lost = np.abs(np.asarray(plain - exact)).max() / np.asarray(exact).std()
    assert lost == 0 if kind == "rows" else 0.01 < lost < 0.2
    taken: list[int] = []
    product = packed.product
    monkeypatch.setattr(decode, "PLATFORM", "cpu")
    monkeypatch.setattr(
        packed, "product", lambda x, packs, *a, **k: (taken.append(len(packs)), product(x, packs, *a, **k))[1]
    )
    fused = jax.jit(lambda llm: answered(llm))(llm)
    heads = 2 if kind == "int8" and name == "qwen2" else 2 * (kind == "int8")
    assert taken.count(2) == 1  # gate and up; the loop's body is traced once
    assert len(taken) == 4 + heads
    np.testing.assert_allclose(fused, plain, atol=2e-5)


def test_what_is_packed_and_what_is_not() -> None:
    config = CONFIGS["qwen2"]
    llm = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(params=0)))
    packs = quantize.quantized(llm, "int8", quantize.shape_of)
    held = {
        n for n, p in vars(packs.blocks.attn).items() if isinstance(p, nnx.Param) and isinstance(p.get_value(), Packed)
    }
    assert held == {"wq", "wk", "wv", "wo"}
    assert packs.embedding.get_value().values.shape == (512, 32)
    for made, told in zip(
        jax.tree.leaves(quantize.quantized(config.build(rngs=nnx.Rngs(params=0)), "int8")),
        jax.tree.leaves(packs), strict=True,
    ):  # fmt: skip
        assert (made.shape, made.dtype) == (told.shape, told.dtype)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="quantize is 'int3'; it must be one of int8, rows"):
        quantize.quantized(nnx.eval_shape(lambda: CONFIGS["qwen2"].build(rngs=nnx.Rngs(params=0))), "int3")
