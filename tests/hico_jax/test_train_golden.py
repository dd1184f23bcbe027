"""Six AdamW steps of a small model against the recorded ones of the PyTorch reference."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.options import DataConfig
from hico_jax import optim, start, step
from hico_jax.batch import Batch
from hico_jax.config import Experiment, TrainConfig
from hico_jax.convert import load
from tests import golden_rows

TABLES = {
    "all": ((r".*", "lr"),),
    "projector": ((r"projector/.*", "lr"), (r".*", None)),
    "tower_projector": ((r"(vision|projector)/.*", "lr"), (r".*", None)),
}
CASES = [
    "train_steps_all", "train_steps_projector",
    pytest.param("train_steps_tower_projector", marks=pytest.mark.slow),  # what trains here trains in the first, too
]  # fmt: skip
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def loaded(golden: Any) -> load.Loaded:
    return load.load(golden.folder / "F_umt224_ckpt", activations="float32")


@pytest.fixture(scope="module")
def batches(golden: Any, loaded: load.Loaded) -> list[Batch]:
    geometry = loaded.config.geometry()
    return [golden_rows.batch_of(golden, name, geometry) for name in ("umt224_video_train", "umt224_mixed_batch_train")]


@pytest.mark.parametrize("name", CASES)
def test_six_steps_equal_the_reference(
    golden: Any, loaded: load.Loaded, batches: list[Batch], name: str, tmp_path: pathlib.Path
) -> None:
    case = golden.case("T_training", name)
    asked, want = case["config"], golden.tensors(case["file"])
    optim_config = optim.OptimConfig(
        lr=asked["lr_peak"], rates=TABLES[asked["trainable"]], warmup_steps=asked["warmup_steps"]
    )
    settings = Experiment(
        "golden", "", loaded.config, DataConfig(), optim_config, train=TrainConfig(steps=asked["total_steps"])
    )
    # A copy: a step gives its state's buffers away, and the loaded model serves every case.
    graphdef, trainable, frozen = optim.split(jax.tree.map(jnp.copy, loaded.model), optim_config.rates)
    tx = optim.optimizer(optim_config, asked["total_steps"], trainable)
    update = jax.jit(functools.partial(step.train_step, graphdef=graphdef, tx=tx, settings=settings))
    state = start.TrainState(jnp.int32(0), trainable, frozen, tx.init(trainable))
    got: dict[str, list[float]] = {"loss": [], "grad_norm": [], "lr": []}
    for i in range(asked["steps"]):
        state, numbers = update(state, jax.tree.map(jnp.asarray, batches[i % 2]))
        for key in got:
            got[key].append(float(numbers[key]))
    # float32 against float32 in another order of sums; the reference's own distance to float64 is up to 3e-6
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm_before_clip"], rtol=1e-5)
    np.testing.assert_allclose(got["lr"], want["lr"], rtol=1e-6)
    model = nnx.merge(graphdef, state.trainable, state.frozen)
    ours = golden_rows.torch_tensors(model)
    for key, norm in asked["param_norms_after"].items():
        np.testing.assert_allclose(np.linalg.norm(ours[key].astype(np.float64)), norm, rtol=2e-6, err_msg=key)
    for key in want:
        if key.startswith("after."):
            np.testing.assert_allclose(ours[key[6:]], want[key], rtol=0, atol=2e-6, err_msg=key)
