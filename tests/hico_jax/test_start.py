from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipeline.options import DataConfig
from hico_jax import checkpoint, config, registry, start
from hico_jax.config import Experiment, InitConfig, TrainConfig
from hico_jax.convert import load
from hico_jax.models import layers
from hico_jax.optim import OptimConfig
from hico_jax.parallel.mesh import MeshConfig, make_mesh

ONE = make_mesh(MeshConfig(), jax.devices()[:1])
PROJECTOR_ONLY = ((r"projector/.*", "lr"), (r".*", None))


def experiment(workdir: pathlib.Path | str = "", **changes: Any) -> Experiment:
    model = registry.model_config("tiny")
    return dataclasses.replace(
        Experiment("test", "tiny", model, DataConfig(batch_size=4), train=TrainConfig(steps=6)),
        workdir=str(workdir), **changes,
    )  # fmt: skip


def params(begun: start.Start) -> dict[str, np.ndarray]:
    flat = checkpoint.flatten(start.params_dict(begun.state.trainable, begun.state.frozen))
    return {name: np.asarray(a) for name, a in flat.items()}


def save(begun: start.Start, exp: Experiment, step: int) -> None:
    saved = checkpoint.Checkpointer(exp.workdir, exp.checkpoint)
    meta = {"data": {"at": step}, "config": json.loads(config.to_json(exp))}
    both = start.params_dict(begun.state.trainable, begun.state.frozen)
    saved.save(step, both, checkpoint.to_dict(begun.state.optimizer), meta)
    saved.close()


@pytest.fixture(scope="module")
def random_start() -> start.Start:
    return start.init_state(experiment(), ONE)


def test_random_weights_follow_the_seed(random_start: start.Start) -> None:
    assert random_start.origin == "random weights, seed 42"
    model = experiment().model.build(rngs=nnx.Rngs(params=42))
    for name, value in checkpoint.flatten(nnx.state(model)).items():
        # jit and eager round the scaling of a random number differently, by its last bit
        np.testing.assert_allclose(params(random_start)[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_what_is_frozen_is_counted() -> None:
    exp = experiment(optim=OptimConfig(rates=PROJECTOR_ONLY))
    begun = start.init_state(exp, ONE)
    abstract = nnx.eval_shape(lambda: exp.model.build(rngs=nnx.Rngs(0)))
    assert layers.num_params(begun.state.trainable) == layers.num_params(abstract.projector)
    assert layers.num_params(begun.state.frozen) == layers.num_params(abstract) - layers.num_params(abstract.projector)


def test_the_order_of_initialization(tmp_path: pathlib.Path, random_start: start.Start) -> None:
    parent = experiment(tmp_path / "parent")
    save(random_start._replace(state=jax.tree.map(lambda a: a + 1, random_start.state)), parent, 6)
    # Another resolution and another table of rates: neither is in the parameters.
    tower = dataclasses.replace(parent.model.vision, image_px=64)
    child = experiment(
        tmp_path / "child", init=InitConfig(parent=parent.workdir), optim=OptimConfig(rates=PROJECTOR_ONLY),
        model=dataclasses.replace(parent.model, vision=tower),
    )  # fmt: skip
    begun = start.init_state(child, ONE)
    assert begun.origin == f"parameters of {parent.workdir}, step 6"
    assert begun.meta is None
    assert int(begun.state.step) == 0
    for name, value in params(random_start).items():
        np.testing.assert_array_equal(params(begun)[name], value + 1, err_msg=name)
    moments = jax.tree.leaves(begun.state.optimizer)
    assert all((np.asarray(m) == 0).all() for m in moments)

    moved = begun.state._replace(optimizer=jax.tree.map(lambda a: a + 3, begun.state.optimizer))
    save(begun._replace(state=moved), child, 2)
    resumed = start.init_state(child, ONE, checkpoint.Checkpointer(child.workdir, child.checkpoint))
    assert resumed.origin == "resumed at step 2"
    assert resumed.meta is not None
    assert resumed.meta["data"] == {"at": 2}
    assert int(resumed.state.step) == 2
    for a, b in zip(jax.tree.leaves(resumed.state.optimizer), jax.tree.leaves(moved.optimizer), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_unfinished_parent_is_told(tmp_path: pathlib.Path, random_start: start.Start) -> None:
    parent = experiment(tmp_path)
    save(random_start, parent, 2)
    begun = start.init_state(experiment(init=InitConfig(parent=parent.workdir)), ONE)
    assert "WARNING: that run has not finished its 6 steps" in begun.origin


def test_a_parent_of_other_sizes_is_refused(tmp_path: pathlib.Path, random_start: start.Start) -> None:
    parent = experiment(tmp_path)
    save(random_start, parent, 2)
    model = dataclasses.replace(parent.model, llm=dataclasses.replace(parent.model.llm, vocab_size=80))
    with pytest.raises(ValueError, match="params/llm/embedding: found 64x32 float32, expected 80x32 float32"):
        start.init_state(experiment(model=model, init=InitConfig(parent=parent.workdir)), ONE)


def test_released_weights_replace_what_they_hold(golden: Any) -> None:
    folder = golden.folder / "F_umt224_ckpt"
    found = load.load(folder, activations="float32")
    weights = InitConfig(weights=(str(folder),))
    exp = experiment(model=found.config, init=weights, optim=OptimConfig(rates=PROJECTOR_ONLY))
    begun = start.init_state(exp, ONE)
    count = len(checkpoint.flatten(nnx.state(found.model)))
    assert begun.origin == f"{count} arrays of {folder}; others random"
    for name, value in checkpoint.flatten(nnx.state(found.model)).items():
        np.testing.assert_array_equal(params(begun)[name], value, err_msg=name)


def test_the_state_is_split_over_the_mesh() -> None:
    mesh = make_mesh(MeshConfig(1, 4, 1, 2))
    with jax.set_mesh(mesh):
        begun = start.init_state(experiment(), mesh)
    whole = split = 0
    for name, array in checkpoint.flatten(begun.state.optimizer).items():
        if array.ndim:
            whole += array.size
            split += array.addressable_shards[0].data.size
            assert array.sharding.mesh == mesh, name
    assert split < whole / 5  # of 8; norms and biases are small and stay whole
