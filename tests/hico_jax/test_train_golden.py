"""Six AdamW steps of a small model against the recorded ones of the PyTorch reference."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline import layout
from data_pipeline.options import DataConfig
from hico_jax import checkpoint, optim, start, train
from hico_jax.batch import Batch, Geometry
from hico_jax.config import Experiment, TrainConfig
from hico_jax.convert import load

TABLES = {
    "all": ((r".*", "lr"),),
    "projector": ((r"projector/.*", "lr"), (r".*", None)),
    "tower_projector": ((r"(vision|projector)/.*", "lr"), (r".*", None)),
}
CASES = ["train_steps_all", "train_steps_projector", "train_steps_tower_projector"]
pytestmark = pytest.mark.parity


def media_of(case: dict[str, Any], pixels: dict[str, np.ndarray]) -> list[tuple[str, Any, np.ndarray]]:
    """Modality, image size and uint8 frames `[T height width 3]` of every entry of a case's media."""
    found = []
    for entry in case["config"]["media"]:
        if entry["tensor"] == "zeros":
            frames = np.full((1, 224, 224, 3), 128, np.uint8)
        else:
            array = pixels[entry["tensor"]][_slice(entry["slice"])]
            frames = np.moveaxis(array.reshape(-1, *array.shape[-3:]), 1, -1)
        found.append((entry["modality"], entry["image_size"], frames))
    return found


def _slice(text: str) -> slice:
    first, _, last = text.strip("[]").partition(":")
    return slice(int(first), int(last) if last else int(first) + 1)


def batch_of(golden: Any, name: str, geometry: Geometry) -> Batch:
    """The rows of a recorded case, laid out by our own host code."""
    case = golden.case("F_full", name)
    tensors, media = golden.tensors(case["file"]), media_of(case, golden.tensors("pixels.safetensors"))
    rows = []
    for ids, labels, mask in zip(tensors["input_ids"], tensors["labels"], tensors["attention_mask"], strict=True):
        ids, labels = ids[mask.astype(bool)], labels[mask.astype(bool)]
        mine = [media.pop(0) for _ in range(max(1, int((ids < 0).sum())))]  # a text row has one that it does not use
        mine = [m for m in mine if m[0] != "text"]
        clips = [m[2].reshape(-1, 4, 224, 224, 3) for m in mine if m[0] == "video"]
        tiles = [m[2] for m in mine if m[0] == "image"]
        rows.append(
            layout.row(
                ids, labels, [visual_of(m, geometry) for m in mine], geometry,
                clips=np.concatenate(clips) if clips else None, tiles=np.concatenate(tiles) if tiles else None,
            )
        )  # fmt: skip
    assert not media
    batch = layout.collate(rows, geometry)
    values = {name: (getattr(batch, name).astype(np.float32) - 128) / 64 for name in ("clips", "images")}
    return dataclasses.replace(batch, **values)


def visual_of(entry: tuple[str, Any, np.ndarray], geometry: Geometry) -> layout.Visual:
    modality, size, frames = entry
    if modality == "video":
        return layout.Visual.film(len(frames), geometry)
    if len(frames) == 1:
        return layout.Visual.picture(1)
    across, down = round(size[0] / 224), round(size[1] / 224)
    return layout.Visual.picture(len(frames), (down, across))


@pytest.fixture(scope="module")
def loaded(golden: Any) -> load.Loaded:
    return load.load(golden.folder / "F_umt224_ckpt", activations="float32")


@pytest.fixture(scope="module")
def batches(golden: Any, loaded: load.Loaded) -> list[Batch]:
    geometry = loaded.config.geometry()
    return [batch_of(golden, name, geometry) for name in ("umt224_video_train", "umt224_mixed_batch_train")]


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
    step = jax.jit(functools.partial(train.train_step, graphdef=graphdef, tx=tx, settings=settings))
    state = start.TrainState(jnp.int32(0), trainable, frozen, tx.init(trainable))
    got: dict[str, list[float]] = {"loss": [], "grad_norm": [], "lr": []}
    for i in range(asked["steps"]):
        state, numbers = step(state, jax.tree.map(jnp.asarray, batches[i % 2]))
        for key in got:
            got[key].append(float(numbers[key]))
    # float32 against float32 in another order of sums; the reference's own distance to float64 is up to 3e-6
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm_before_clip"], rtol=1e-5)
    np.testing.assert_allclose(got["lr"], want["lr"], rtol=1e-6)
    model = nnx.merge(graphdef, state.trainable, state.frozen)
    ours = torch_tensors(model)
    for key, norm in asked["param_norms_after"].items():
        np.testing.assert_allclose(np.linalg.norm(ours[key].astype(np.float64)), norm, rtol=2e-6, err_msg=key)
    for key in want:
        if key.startswith("after."):
            np.testing.assert_allclose(ours[key[6:]], want[key], rtol=0, atol=2e-6, err_msg=key)


def torch_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's parameters under the reference's names."""
    config = model.config
    arrays = checkpoint.flatten(nnx.state(model))
    sizes = {**config.llm.torch_sizes}
    out: dict[str, np.ndarray] = {}
    for rule in load.rules(config):
        if rule.path not in arrays:
            continue
        array = np.asarray(arrays[rule.path])
        part = sizes if rule.path.startswith("llm/") else {"H": config.vision.num_heads}
        for i in range(array.shape[0] if rule.stacked else 1):
            source = array[i] if rule.stacked else array
            out[rule.torch.replace("{i}", str(i))] = rule.to_torch(source, part)
    return out
