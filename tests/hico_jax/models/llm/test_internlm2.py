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


def shortened(model, places):
    """The same weights, trained on fewer positions."""
    config = dataclasses.replace(model.config, max_positions=places, rope_original=places)
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.state(model))


logits_of = jax.jit(lambda model, stream: generate.logits_of(model, model(stream, None)[0].x))


@pytest.mark.parity
def test_recorded_logits_of_padded_rows(golden, loaded):
    """Padding on the right: the recorded positions count from the row's start, as ours do."""
    tensors = golden.tensors("I_llm_plain_right_padded.safetensors")
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
    model = TINY.build(rngs=nnx.Rngs(0))
    tokens = np.array([[1, 2, 2, 5]])

    def loss(model):
        return jnp.square(model(stream_of(model, tokens), None)[0].x).mean()

    grad = np.asarray(jax.jit(jax.grad(loss))(model).embedding[...])
    assert (grad[2] == 0).all()
    assert np.abs(grad[[1, 5]]).max(1).min() > 0


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
