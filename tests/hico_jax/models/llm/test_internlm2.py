from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax import generate
from hico_jax.convert import load
from hico_jax.generate import GenerationConfig
from hico_jax.models import layers
from hico_jax.models.llm import internlm2, qwen2
from hico_jax.models.llm.decoder import Stream

TINY = internlm2.VARIANTS["tiny"]


def stream_of(model, tokens, mask=None):
    mask = np.ones_like(tokens) if mask is None else mask
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    return Stream(
        x=model.embed(jnp.asarray(tokens, jnp.int32)),
        positions=jnp.asarray(positions, jnp.int32),
        segments=jnp.asarray(mask, jnp.int32),
        slots=jnp.full(tokens.shape, -1, jnp.int32),
    )


@pytest.fixture(scope="module")
def loaded(golden):
    return load.load(golden.folder / "I_internvl_hico_ckpt", activations="float32").model.llm


def shortened(model, places, **changes):
    """The same weights, trained on fewer positions."""
    config = dataclasses.replace(model.config, max_positions=places, rope_original=places, **changes)
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.state(model))


logits_of = jax.jit(lambda model, stream: generate.logits_of(model, model(stream, None)[0].x))


@pytest.mark.parity
@pytest.mark.parametrize("side", ["right", "left"])
def test_recorded_logits_of_padded_rows(golden, loaded, side):
    """Positions count what is real. We pad on the right only; on the left it is the same to a model."""
    tensors = golden.tensors(f"I_llm_plain_{side}_padded.safetensors")
    mask = tensors["attention_mask"].astype(np.int32)
    made = logits_of(loaded, stream_of(loaded, tensors["input_ids"], mask))
    np.testing.assert_allclose(np.where(mask[..., None] > 0, made, 0), tensors["logits"], atol=5e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["dynamic_greedy_crossing", "dynamic_greedy_beyond"])
def test_recorded_answers_beyond_the_trained_positions(golden, loaded, name):
    case = golden.case("I_internvl_hico", f"llm_{name}")
    tensors = golden.tensors(case["file"])
    model = shortened(loaded, case["config"]["max_position_embeddings_override"])
    stream = stream_of(model, tensors["input_ids"])
    np.testing.assert_allclose(logits_of(model, stream)[0], tensors["prefill_logits"][0], atol=5e-5)
    made = generate.continue_stream(model, stream, None, GenerationConfig(max_new_tokens=8, eos=()))
    np.testing.assert_array_equal(made.ids[0], tensors["generated_ids"].reshape(-1))


@pytest.mark.parity
def test_recorded_prefill_with_and_without_scaling(golden, loaded):
    """`logits_short_after_long` is of a table that the reference enlarged for another prompt; ours keep no state."""
    case = golden.case("I_internvl_hico", "llm_dynamic_prefill")
    tensors = golden.tensors(case["file"])
    model = shortened(loaded, case["config"]["max_position_embeddings_override"])
    plain = shortened(loaded, model.config.max_positions, rope_kind="default")
    for ids, chosen, name in (
        ("long", model, "long"), ("short", model, "short_fresh_model"), ("long", plain, "long_scaling_off"),
    ):  # fmt: skip
        made = logits_of(chosen, stream_of(chosen, tensors[f"{ids}_ids"]))
        np.testing.assert_allclose(made, tensors[f"logits_{name}"], atol=5e-5, err_msg=name)


@pytest.mark.parity
def test_recorded_rotary_tables(golden):
    tensors = golden.tensors("I_rope_tables.safetensors")

    def ours(positions, width, **scaling):
        made = layers.rotary_angles(jnp.asarray([positions], jnp.int32), width, 1e6, **scaling)
        return {"cos": np.asarray(made[0][0]), "sin": np.asarray(made[1][0])}

    for part in ("cos", "sin"):
        np.testing.assert_allclose(ours(range(100), 8)[part], tensors[f"off.{part}"], atol=2e-7)
        for n in (64, 65, 100):
            made = ours(range(n), 8, kind="dynamic", factor=2.0, original=64)[part]
            np.testing.assert_allclose(made, tensors[f"dynamic_{n}.{part}"], atol=1e-6)
        for n in (32768, 32769, 40000, 65536):
            made = ours([1, n - 1], 128, kind="dynamic", factor=2.0, original=32768)[part]
            # Ours stretches frequencies, the reference theta: two units in the last place, times the position.
            np.testing.assert_allclose(made[1], tensors[f"published_{n}.{part}_last"], atol=n * 1.2e-7)
            turn = {"cos": np.cos, "sin": np.sin}[part](tensors[f"published_{n}.inv_freq"])
            np.testing.assert_allclose(made[0, :64], turn, atol=2e-7)


@pytest.mark.parity
def test_recorded_greedy_answer(golden, loaded):
    tensors = golden.tensors("I_llm_greedy_plain.safetensors")
    stream = stream_of(loaded, tensors["input_ids"].reshape(1, -1))
    made = generate.continue_stream(loaded, stream, None, GenerationConfig(max_new_tokens=8, eos=()))
    np.testing.assert_array_equal(made.ids[0], tensors["generated_ids"].reshape(-1))


def test_scaling_does_nothing_inside_the_trained_positions():
    positions = jnp.arange(32, dtype=jnp.int32)[None]
    plain = layers.rotary_angles(positions, 8, 1e6)
    scaled = layers.rotary_angles(positions, 8, 1e6, kind="dynamic", factor=2.0, original=32)
    np.testing.assert_array_equal(plain, scaled)
    beyond = layers.rotary_angles(positions, 8, 1e6, kind="dynamic", factor=2.0, original=31)
    assert np.abs(np.asarray(beyond) - np.asarray(plain)).max() > 1e-3


def test_the_padding_row_is_never_trained():
    graph, state = nnx.split(nnx.eval_shape(lambda: TINY.build(rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), state))
    tokens = jnp.array([[1, 2, 2, 5]])
    grad = np.asarray(jax.jit(jax.grad(lambda model: model.embed(tokens).sum()))(model).embedding[...])
    assert (grad[2] == 0).all()
    assert (grad[[1, 5]] == 1).all()


def published(**changes):
    return {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "internlm2",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000, "vocab_size": 92553, "bias": False,
    } | changes  # fmt: skip


def test_published_sizes():
    config = internlm2.InternLM2Config.from_hf(published())
    assert config == internlm2.VARIANTS["internlm2.5-7b"]
    assert config.torch_sizes == {"H": 32, "K": 8, "d": 128, "g": 6}
    assert internlm2.InternLM2Config.from_hf(published(rope_scaling=None)).rope_kind == "default"


def test_what_is_not_built():
    with pytest.raises(ValueError, match="only layers without biases"):
        internlm2.InternLM2Config.from_hf(published(bias=True))
    with pytest.raises(ValueError, match="built are dynamic"):
        internlm2.InternLM2Config.from_hf(published(rope_scaling={"type": "yarn", "factor": 4.0}))
    with pytest.raises(ValueError, match="built are yarn"):
        qwen2.rope_scaling({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("yarn",))
