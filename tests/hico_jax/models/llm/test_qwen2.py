"""Qwen2: recorded logits and rotary tables, configuration files, gradients, precision, memory options."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax.models import layers
from hico_jax.models.llm import qwen2
from hico_jax.models.llm.decoder import Stream

TINY = qwen2.VARIANTS["tiny"]
HF = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e7, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1010000, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def text_stream(x: Any, segments: Any = None) -> Stream:
    rows, length = x.shape[:2]
    return Stream(
        x=x,
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
        segments=jnp.ones((rows, length), jnp.int32) if segments is None else jnp.asarray(segments, jnp.int32),
        slots=jnp.full((rows, length), -1, jnp.int32),
    )


@pytest.mark.parity
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_reference(tied: bool, golden: Any, golden_llm: Any) -> None:
    tensors = golden.tensors(golden.case("E_llm", "plain_tied" if tied else "plain_untied")["file"])
    model, mask = golden_llm(tied), tensors["attention_mask"]

    @jax.jit
    def logits(model: qwen2.Qwen2, ids: Any) -> Any:
        stream, _ = model(text_stream(model.embed(ids), mask), None)
        return stream.x @ model.unembed_weight()

    got = logits(model, jnp.asarray(tensors["input_ids"].astype(np.int32))) * mask[..., None].astype(np.float32)
    # the reference's own float32 and float64 differ by 5e-5
    np.testing.assert_allclose(got, tensors["logits"], atol=2e-4, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("width", [128, 16])
def test_rotary_tables_equal_the_reference(width: int, golden: Any) -> None:
    tensors = golden.tensors(golden.case("E_llm", "rope_tables")["file"])
    name = f"d{width}_theta1e6"
    positions = jnp.asarray(tensors[f"{name}.positions"].astype(np.int32))[None]
    cos, sin = layers.rotary_angles(positions, width, 1e6)
    np.testing.assert_allclose(cos[0], tensors[f"{name}.cos"], atol=2e-6)  # rounding of cos itself
    np.testing.assert_allclose(sin[0], tensors[f"{name}.sin"], atol=2e-6)


def test_config_json_is_read_whole() -> None:
    assert qwen2.Qwen2Config.from_hf(HF) == qwen2.VARIANTS["qwen2.5-7b-1m"]
    tied = qwen2.Qwen2Config.from_hf(HF | {"tie_word_embeddings": True, "head_dim": 64})
    assert (tied.tied, tied.head_dim) == (True, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rope_theta": None}, "lacks rope_theta"), ({"hidden_act": "gelu"}, "gelu"), ({"use_sliding_window": 1}, "full")],
)
def test_config_json_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    config = {k: v for k, v in (HF | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        qwen2.Qwen2Config.from_hf(config)


@pytest.mark.parametrize(("name", "count"), [("qwen2.5-7b", 7_615_616_512), ("qwen2.5-1.5b", 1_543_714_304)])
def test_released_sizes(name: str, count: int) -> None:
    """The published parameter counts."""
    assert layers.num_params(nnx.eval_shape(lambda: qwen2.VARIANTS[name].build(rngs=nnx.Rngs(0)))) == count


def test_every_parameter_has_a_torch_name_and_axes() -> None:
    model = nnx.eval_shape(lambda: dataclasses.replace(TINY, tied=False).build(rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert all(len(v.get_metadata("axes")) in (v.get_value().ndim, v.get_value().ndim - 1) for v in leaves)

    def paths(tree: Any, prefix: str) -> set[str]:
        if not isinstance(tree, dict):
            return {prefix}
        return set().union(*(paths(v, f"{prefix}/{k}") for k, v in tree.items()))

    assert paths(nnx.to_pure_dict(nnx.state(model)), "llm") == {rule.path for rule in qwen2.TORCH_NAMES}


def test_later_tokens_and_other_rows_do_not_matter() -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, TINY.embed_dim))
    gradient = jax.jit(jax.grad(lambda x: model(text_stream(x), None)[0].x[0, 4].sum()))(x)
    assert (gradient[1] == 0).all()
    assert (gradient[0, 5:] == 0).all()
    assert (jnp.abs(gradient[0, :5]).max(-1) > 0).all()


def test_recomputing_changes_memory_only() -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    remat = dataclasses.replace(TINY, remat=True).build(rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 9, TINY.embed_dim))

    def loss(model: qwen2.Qwen2, x: Any) -> Any:
        return jnp.square(model(text_stream(x), None)[0].x).sum()

    plain, again = (jax.jit(jax.grad(loss))(m, x) for m in (model, remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # the same sums, fused differently
    text = str(jax.make_jaxpr(jax.grad(loss))(remat, x))
    assert "checkpoint" in text or "remat" in text


def test_half_precision_is_finite_and_near() -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, TINY.embed_dim))
    segments = np.array([[1] * 9, [1] * 4 + [0] * 5])
    run = jax.jit(lambda x: model(text_stream(x, segments), None)[0])
    full, half = run(x), run(x.astype(jnp.bfloat16))
    assert half.x.dtype == jnp.bfloat16
    assert np.isfinite(half.x.astype(jnp.float32)).all()
    real = segments > 0
    # 8 bits, a few roundings in a row, values of size one
    np.testing.assert_allclose(half.x.astype(jnp.float32)[real], full.x[real], atol=0.15)
