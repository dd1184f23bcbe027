"""What every entry of the registry promises. A new architecture is tested by being listed."""

from __future__ import annotations

import dataclasses
import functools
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


@functools.cache
def abstract(config: HiCoConfig) -> Any:
    """The model as shapes."""
    return nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))


def filled(config: HiCoConfig) -> Any:
    """The model with random numbers everywhere, layer scales and biases too: no initializer is compiled."""
    graph, state = nnx.split(abstract(config))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), jnp.float32), state))


# One model for each architecture; those that make the same model are tested together.
TINIES = {tiny_with(part, arch): f"{part}-{arch}" for part, arch in PARTS}


@dataclasses.dataclass
class Seen:
    """A tiny model, what it was shown, and what came of it on one device."""

    config: HiCoConfig
    model: Any
    batch: Batch
    hidden: np.ndarray
    grads: Any


# What is computed is tiny and compiling it is not: unoptimized programs are made in half the time.
QUICK = {"xla_backend_optimization_level": 0}
hidden = jax.jit(lambda model, batch: model(batch).x, compiler_options=QUICK)


@functools.partial(jax.jit, compiler_options=QUICK)
def learn(model: Any, batch: Batch) -> Any:
    def loss(model: Any) -> Any:
        x = model(batch).x
        return jnp.square(x @ model.llm.unembed_weight()).mean(), x

    return jax.grad(loss, has_aux=True)(model)


@pytest.fixture(scope="module", params=list(TINIES), ids=list(TINIES.values()))
def seen(request: pytest.FixtureRequest) -> Seen:
    """Everything below asks about this one computation, so that each model is compiled as seldom as can be."""
    model, batch = filled(request.param), fake(request.param, rows=4, clips=1, images=1)
    grads, x = learn(model, batch)
    return Seen(request.param, model, batch, np.asarray(x), grads)


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
    model = abstract(registry.model_config(name))
    assert (name in SIZES) == bool(registry.MODELS[name].source)
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
    shapes = abstract(config)
    batch = fake(config, rows=1, clips=2, images=1)
    out = jax.eval_shape(lambda m, b: m(b).x, shapes, batch)
    geometry = config.geometry()
    assert geometry.tokens_per_clip == (256 if name == "internvl_hico_r64" else 64)
    assert out.shape == (1, 12 + 2 * geometry.tokens_per_clip + 64, config.llm.embed_dim)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", list(registry.MODELS))
def test_torch_names_cover_every_parameter_once(name: str) -> None:
    config = registry.model_config(name)
    names = parameter_names(nnx.state(abstract(config)))
    rules = load.rules(config)
    paths = [r.path for r in rules]
    assert len(set(paths)) == len(paths)
    assert set(names) <= set(paths)
    assert {r.path for r in rules if not r.optional} <= set(names)


def test_it_gives_finite_states_of_the_promised_shape(seen: Seen) -> None:
    assert seen.hidden.shape == (*seen.batch.shape, seen.config.llm.embed_dim)
    assert np.isfinite(seen.hidden).all()


def test_gradients_are_finite_and_reach_every_parameter(seen: Seen) -> None:
    state = nnx.state(seen.grads)
    for name, grad in zip(parameter_names(state), jax.tree.leaves(state), strict=True):
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 0, name


def test_eight_devices_give_what_one_gives(seen: Seen) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    with jax.set_mesh(mesh):
        graph, state = nnx.split(seen.model)
        state = jax.device_put(state, sharding.shardings(state, mesh))
        placed = jax.device_put(seen.batch, sharding.batch_shardings(seen.batch, mesh))
        eight = hidden(nnx.merge(graph, state), placed)
    np.testing.assert_allclose(eight, seen.hidden, atol=2e-4)  # float32 sums in another order, through five layers


def test_padding_and_an_empty_clip_change_nothing(seen: Seen) -> None:
    batch = seen.batch
    before = batch.clips.shape[1] * seen.config.geometry().tokens_per_clip

    def pad(a: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(a, ((0, 0), (0, 4)), constant_values=fill)

    further = np.where(batch.slots >= before, before, 0)  # one more clip: the image's slots move on
    padded = dataclasses.replace(
        batch,
        **{name: pad(getattr(batch, name), 0) for name in ("tokens", "positions", "segments", "targets", "weights")},
        slots=pad(batch.slots + further.astype(np.int32), -1),
        clips=np.concatenate([batch.clips, np.zeros_like(batch.clips)], axis=1),
    )
    made = hidden(seen.model, padded)[:, : batch.shape[1]]
    np.testing.assert_allclose(made, seen.hidden, atol=1e-5)
