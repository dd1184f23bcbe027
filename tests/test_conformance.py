"""What every entry of the registry promises. A new architecture is tested by being listed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax import registry
from hico_jax.batch import Batch
from hico_jax.convert import load
from hico_jax.models import layers
from hico_jax.models.hico import HiCoConfig
from hico_jax.optim import parameter_names
from hico_jax.parallel import sharding
from hico_jax.parallel.mesh import MeshConfig, make_mesh

PARTS = [(part, arch) for part, found in registry.PARTS.items() for arch in found]
TINY = registry.model_config("tiny")

# Published sizes (the tied embedding of the 1.5B model counted once).
SIZES = {
    "umt_hd_qwen2_5_1_5b": (290_479_104, 3_935_232, 1_543_714_304),
    "umt_qwen2_7b": (290_479_104, 16_522_240, 7_615_616_512),
    "umt_hd_qwen2_7b": (290_479_104, 16_522_240, 7_615_616_512),
    "umt_qwen2_5_7b_1m": (290_479_104, 16_522_240, 7_615_616_512),
    "internvideo2_qwen2_5_7b": (987_337_728, 17_898_496, 7_615_616_512),
    # InternViT-300M, mlp1 and InternLM2.5 with 92,553 tokens, counted from the shapes of spec 1.7a.
    "internvl_hico_r16": (304_012_288, 33_570_816, 7_737_782_272),
    "internvl_hico_r64": (304_012_288, 33_570_816, 7_737_782_272),
}


def tiny_with(part: str, arch: str) -> HiCoConfig:
    """The tiny model with another tower, compressor or language model."""
    return dataclasses.replace(TINY, **{part: registry.PARTS[part][arch].VARIANTS["tiny"]})


def build(config: HiCoConfig, seed: int = 0) -> Any:
    return config.build(rngs=nnx.Rngs(seed))


def hidden(model: Any, batch: Batch) -> jax.Array:
    return jax.jit(lambda m, b: m(b).x)(model, batch)


# One model for each architecture; those that make the same model are tested together.
TINIES = {tiny_with(part, arch): f"{part}-{arch}" for part, arch in PARTS}


@pytest.fixture(scope="module", params=list(TINIES), ids=list(TINIES.values()))
def tiny(request: pytest.FixtureRequest) -> tuple[HiCoConfig, Any]:
    return request.param, build(request.param)


def fake(config: HiCoConfig, **changes: Any) -> Batch:
    return Batch.fake(config.geometry(), vocab=config.llm.vocab_size, **changes)


@pytest.mark.parametrize(("part", "arch"), PARTS)
def test_the_file_holds_what_an_architecture_must(part: str, arch: str) -> None:
    module = registry.PARTS[part][arch]
    assert "tiny" in module.VARIANTS
    assert isinstance(module.TORCH_NAMES, tuple)
    assert {type(v).arch for v in module.VARIANTS.values()} == {arch}


@pytest.mark.parametrize("name", list(registry.MODELS))
def test_every_model_builds_abstractly_with_axes_that_have_rules(name: str) -> None:
    config = registry.model_config(name)
    model = nnx.eval_shape(lambda: build(config))
    if name in SIZES:
        assert tuple(layers.num_params(p) for p in (model.vision, model.projector, model.llm)) == SIZES[name]
    variables = jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))
    for variable in variables:
        axes = variable.get_metadata("axes")
        assert len(axes) <= len(variable.get_value().shape)
        assert {a for a in axes if a is not None} <= sharding.RULES.keys()


@pytest.mark.parametrize("name", [n for n in registry.MODELS if n in SIZES])
def test_a_full_size_forward_has_the_promised_shape(name: str) -> None:
    config = registry.model_config(name)
    shapes = jax.eval_shape(lambda: build(config))
    batch = fake(config, rows=1, clips=2, images=1)
    out = jax.eval_shape(lambda m, b: m(b).x, shapes, batch)
    geometry = config.geometry()
    assert geometry.tokens_per_clip == (256 if name == "internvl_hico_r64" else 64)
    assert out.shape == (1, 12 + 2 * geometry.tokens_per_clip + 64, config.llm.embed_dim)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", list(registry.MODELS))
def test_torch_names_cover_every_parameter_once(name: str) -> None:
    config = registry.model_config(name)
    names = parameter_names(nnx.state(nnx.eval_shape(lambda: build(config))))
    rules = load.rules(config)
    paths = [r.path for r in rules]
    assert len(set(paths)) == len(paths)
    assert set(names) <= set(paths)
    assert {r.path for r in rules if not r.optional} <= set(names)


def test_it_gives_finite_states_of_the_promised_shape(tiny: tuple[HiCoConfig, Any]) -> None:
    config, model = tiny
    batch = fake(config, images=1)
    out = hidden(model, batch)
    assert out.shape == (*batch.shape, config.llm.embed_dim)
    assert np.isfinite(out).all()


def test_gradients_are_finite_and_reach_every_parameter(tiny: tuple[HiCoConfig, Any]) -> None:
    config, model = tiny
    batch = fake(config, images=1)

    def loss(model: Any, batch: Batch) -> jax.Array:
        stream = model(batch)
        logits = stream.x @ model.llm.unembed_weight()
        return jnp.square(logits).sum()

    grads = jax.jit(jax.grad(loss))(model, batch)
    state = nnx.state(grads)
    for name, grad in zip(parameter_names(state), jax.tree.leaves(state), strict=True):
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 0, name


def test_eight_devices_give_what_one_gives(tiny: tuple[HiCoConfig, Any]) -> None:
    config, model = tiny
    batch = fake(config, rows=4)
    one = hidden(model, batch)
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    with jax.set_mesh(mesh):
        graph, state = nnx.split(model)
        state = jax.device_put(state, sharding.shardings(state, mesh))
        eight = hidden(nnx.merge(graph, state), jax.device_put(batch, sharding.batch_shardings(batch, mesh)))
    np.testing.assert_allclose(eight, one, atol=2e-4)  # float32 sums in another order, through five layers


def test_padding_and_an_empty_clip_change_nothing(tiny: tuple[HiCoConfig, Any]) -> None:
    config, model = tiny
    batch = fake(config, clips=1)
    length = batch.shape[1]

    def pad(a: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(a, ((0, 0), (0, 4)), constant_values=fill)

    padded = dataclasses.replace(
        batch,
        **{name: pad(getattr(batch, name), -1 if name == "slots" else 0)
           for name in ("tokens", "slots", "positions", "segments", "targets", "weights")},
        clips=np.concatenate([batch.clips, np.zeros_like(batch.clips)], axis=1),
    )  # fmt: skip
    np.testing.assert_allclose(hidden(model, padded)[:, :length], hidden(model, batch), atol=1e-5)
