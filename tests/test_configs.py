"""Every configuration file loads, freezes, builds abstractly at full size and shards over a mesh."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from hico_jax import config, optim, registry, start
from hico_jax.batch import Batch
from hico_jax.models import layers
from hico_jax.parallel import sharding
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.step import Stepper

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = ["stage1_align", "stage2_pretrain", "stage3_sft", "stage4_highres"]
VARIANTS = [(stage, name) for stage in STAGES for name in registry.MODELS]


def load(name: str, *args: str) -> Any:
    return importlib.import_module(f"configs.{name}").get_config(*args)


def default_of(name: str) -> str:
    tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "get_config")
    return ast.literal_eval(function.args.defaults[0])


@pytest.mark.parametrize("name", [*STAGES, "debug_tiny"])
def test_the_docstring_says_what_to_expect_and_how_to_run(name: str) -> None:
    doc = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text())) or ""
    assert "Run:" in doc
    assert "Expect:" in doc
    assert f"hico train --config=configs/{name}.py" in doc
    assert config.freeze(load(name)) == config.freeze(load(name, default_of(name)))


@pytest.mark.parametrize(("stage", "variant"), VARIANTS)
def test_every_variant_freezes_and_reads_back(stage: str, variant: str) -> None:
    found = config.freeze(load(stage, variant))
    assert config.from_json(config.to_json(found)) == found
    assert found.stage == stage.split("_")[0]


@pytest.mark.parametrize(("stage", "variant"), [*((s, v) for s in STAGES for v in ("umt_qwen2_7b", "nano"))])
def test_it_builds_abstractly_and_every_large_weight_is_split(stage: str, variant: str) -> None:
    found = config.freeze(load(stage, variant))
    model = nnx.eval_shape(lambda: found.model.build(rngs=nnx.Rngs(0)))
    parts = optim.split(model, found.optim.rates)  # every parameter has a row
    trains = {name.split("/")[0] for name in optim.parameter_names(parts.trainable)}
    assert trains == {
        "stage1": {"projector"}, "stage4": {"vision", "projector"},
    }.get(found.stage, {"vision", "projector", "llm"})  # fmt: skip
    mesh = make_mesh(found.mesh, jax.devices())
    places = jax.tree.leaves(sharding.shardings(nnx.state(model), mesh))
    arrays = jax.tree.leaves(nnx.state(model))
    for array, place in zip(arrays, places, strict=True):
        shard = place.shard_shape(array.shape)
        if array.size > 1 << 20:
            assert array.size // 8 == jax.numpy.prod(jax.numpy.array(shard)), (array.shape, shard)
    assert layers.num_params(model) == sum(a.size for a in arrays)


def test_the_numbers_are_those_of_the_reference() -> None:
    one, two, three, four = (config.freeze(load(s)) for s in STAGES)
    assert [e.optim.lr for e in (one, two, three, four)] == [1e-3, 1e-5, 1e-5, 1e-5]
    assert [e.data.batch_size for e in (one, two, three, four)] == [512, 256, 256, 256]
    assert [e.data.max_frames for e in (one, two, three, four)] == [4, 8, 512, 512]
    assert [e.data.min_frames for e in (one, two, three, four)] == [4, 4, 64, 64]
    assert [e.data.max_length or e.model.max_length for e in (one, two, three, four)] == [8192, 32768, 32768, 32768]
    assert [e.data.template for e in (one, two, three, four)] == ["plain", "qwen_2", "qwen_2", "qwen_2"]
    assert [e.model.vision.image_px for e in (one, two, three, four)] == [224, 224, 224, 448]
    for e in (one, two, three, four):
        assert (e.optim.beta1, e.optim.beta2, e.optim.eps, e.optim.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
        assert (e.optim.warmup_ratio, e.optim.clip_norm, e.train.seed, e.data.num_epochs) == (0.03, 1.0, 42, 1)
        assert e.model.llm.remat
        assert e.model.vision.remat


def test_both_rates_of_the_tower_are_reachable() -> None:
    applied = config.freeze(load("stage3_sft", "umt_qwen2_7b"))
    intended = config.freeze(load("stage3_sft", "umt_qwen2_7b,rates=intended"))
    names = ["vision/w", "llm/w"]
    assert optim.assign(names, (*applied.optim.rates, (r"llm/.*", None))) == {"vision/w": "lr", "llm/w": "lr"}
    assert optim.assign(names, intended.optim.rates) == {"vision/w": 2e-6, "llm/w": "lr"}


def _step(settings: Any, mesh: MeshConfig, num_devices: int, batch: Batch) -> tuple[Any, dict[str, float]]:
    placed = make_mesh(mesh, jax.devices()[:num_devices])
    with jax.set_mesh(placed):
        begun = start.init_state(settings, placed)
        stepper = Stepper(settings, begun, placed, lambda _: None)
        state, numbers = stepper(begun.state, stepper.put(batch))
    return state.optimizer, {name: float(value) for name, value in numbers.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_nano_on_eight_devices_is_that_of_one(stage: str, tmp_path: pathlib.Path) -> None:
    found = config.freeze(load(stage, "nano"))
    plain = dataclasses.replace(found.optim, eps=1e6, warmup_steps=0, schedule="constant", clip_norm=0.0)
    settings = dataclasses.replace(
        found, optim=plain, workdir=str(tmp_path), train=dataclasses.replace(found.train, steps=2)
    )
    batch = Batch.fake(settings.model.geometry(), rows=8, clips=2, images=1, text=16)
    one, numbers = _step(settings, MeshConfig(1, 1, 1, 1), 1, batch)
    for mesh in (MeshConfig(2, 2, 1, 2), MeshConfig(1, 2, 2, 2), MeshConfig(1, 1, 8, 1)):
        eight, again = _step(settings, mesh, 8, batch)
        for name, value in numbers.items():
            assert again[name] == pytest.approx(value, rel=1e-5), (mesh, name)
        for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=2e-6)  # moments: the gradients


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["nano", "nano_hd"])
def test_a_prefill_of_nano_on_eight_devices_is_that_of_one(name: str) -> None:
    settings = registry.model_config(name)
    batch = Batch.fake(settings.geometry(), rows=8, clips=4, text=16).replace(targets=None, weights=None)
    hidden = []
    for mesh, count in ((MeshConfig(1, 1, 1, 1), 1), (MeshConfig(2, 2, 1, 2), 8), (MeshConfig(1, 8, 1, 1), 8)):
        placed = make_mesh(mesh, jax.devices()[:count])
        with jax.set_mesh(placed):
            model = settings.build(rngs=nnx.Rngs(0))
            model = jax.device_put(model, sharding.shardings(model, placed))
            on_mesh = jax.device_put(batch, sharding.batch_shardings(batch, placed))
            hidden.append(np.asarray(jax.jit(lambda m, b: m(b).x)(model, on_mesh)))
    for other in hidden[1:]:
        np.testing.assert_allclose(other, hidden[0], rtol=1e-4, atol=1e-4)


def test_stage_four_takes_the_high_resolution_twin() -> None:
    assert config.freeze(load("stage4_highres", "nano")).model_name == "nano_hd"
    assert config.freeze(load("stage4_highres", "umt_qwen2_7b")).model_name == "umt_hd_qwen2_7b"


def test_options_after_the_colon_are_typed() -> None:
    common = importlib.import_module("configs.common")
    assert common.parse("nano,a=3,b=true,c=0.5", a=1, b=False, c=0.1) == ("nano", {"a": 3, "b": True, "c": 0.5})
    for text, message in (("nano,a=x", "option a is 'x'; it must be int"), ("nano,b=1", "it must be true or false")):
        with pytest.raises(ValueError, match=message):
            common.parse(text, a=1, b=False)
