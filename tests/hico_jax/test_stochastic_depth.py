"""Branches dropped in training: repeated after a resume, the same on any mesh and in any micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.options import DataConfig
from hico_jax import metrics, optim, registry, step, train
from hico_jax.batch import Batch
from hico_jax.config import CheckpointConfig, Experiment, TrainConfig
from hico_jax.models import hico
from hico_jax.models.vision import internvit
from hico_jax.parallel import zigzag
from hico_jax.parallel.mesh import MeshConfig, make_mesh

TOWER = dataclasses.replace(internvit.VARIANTS["tiny"], drop_path=0.5)
MODEL = dataclasses.replace(registry.model_config("tiny"), vision=TOWER)


class Source:
    """The same batch at every step; may do something before it yields."""

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self.position, self.before = 0, before

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Batch:
        self.position += 1
        self.before(self.position)
        return Batch.fake(MODEL.geometry(), rows=4, seed=1, vocab=MODEL.llm.vocab_size)

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def losses(workdir: pathlib.Path, source: Source, model: Any = MODEL, accumulate: int = 1, **more: Any) -> list[float]:
    """Four steps of a run whose weights stay as they are: only what is dropped differs from step to step."""
    experiment = Experiment(
        "test", "tiny", model, DataConfig(batch_size=4),
        optim.OptimConfig(lr=1e-12, accumulate=accumulate, rates=((r"projector/.*", "lr"), (r".*", None))),
        train=TrainConfig(steps=4, log_every=1), checkpoint=CheckpointConfig(every=4), workdir=str(workdir),
        mesh=more.get("mesh", MeshConfig()),
    )  # fmt: skip
    train.fit(experiment, source, devices=jax.devices()[: more.get("devices", 1)])
    return [line["loss"] for line in metrics.read(str(workdir))]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("straight"), Source())


def test_every_step_drops_others_and_a_resumed_run_the_same(straight: list[float], tmp_path: pathlib.Path) -> None:
    """The tower is frozen: the reference drops its branches all the same."""
    assert len(set(straight)) == 4

    def stop(position: int) -> None:
        if position == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert len(losses(tmp_path, Source(stop))) == 2
    assert losses(tmp_path, Source()) == straight


@pytest.mark.slow
def test_meshes_micro_batches_and_recomputing_drop_the_same(straight: list[float], tmp_path: pathlib.Path) -> None:
    model = dataclasses.replace(MODEL, vision=dataclasses.replace(TOWER, remat=True))
    found = losses(tmp_path, Source(), model, accumulate=2, mesh=MeshConfig(1, 2, 2, 2), devices=8)
    np.testing.assert_allclose(found, straight, rtol=1e-5)


def test_a_clips_key_is_its_rows_and_its_number() -> None:
    rows = jax.vmap(lambda n: jax.random.key_data(jax.random.key(n)))(jnp.arange(3))
    few, many, tiles = hico.clip_keys(rows, 0, 2), hico.clip_keys(rows, 0, 5), hico.clip_keys(rows, 1, 2)
    assert few is not None
    assert many is not None
    np.testing.assert_array_equal(few.reshape(3, 2, -1), many.reshape(3, 5, -1)[:, :2])
    assert len({tuple(k) for k in np.concatenate([many, tiles]).tolist()}) == 21
    assert hico.clip_keys(None, 0, 2) is None


def test_only_towers_with_a_rate_draw_and_a_rows_place_does_not_matter() -> None:
    batch = Batch.fake(MODEL.geometry(), rows=4, clips=1, seed=1, vocab=MODEL.llm.vocab_size)
    other = zigzag.deal(jax.tree.map(lambda a: a[::-1], batch), 4, multiple=8)  # other places, padded, and dealt

    @functools.partial(jax.jit, static_argnames="vision")
    def keys(batch: Batch, number: int, vision: Any = TOWER) -> Any:
        settings = Experiment("test", "tiny", dataclasses.replace(MODEL, vision=vision), DataConfig(batch_size=4))
        return step.row_keys(settings, jnp.int32(number), batch)

    found = np.asarray(keys(batch, 3))
    assert len({tuple(k) for k in found.tolist()}) == 4
    np.testing.assert_array_equal(keys(other, 3), found[::-1])
    assert (found != keys(batch, 4)).any(1).all()
    assert keys(batch, 3, dataclasses.replace(TOWER, drop_path=0.0)) is None
    assert keys(batch, 3, registry.model_config("tiny").vision) is None


def filled(config: hico.HiCoConfig) -> Any:
    """Random numbers of a fixed seed: no initializer is compiled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), state))


def test_every_device_drops_what_one_would() -> None:
    """Five clips for eight devices: some encode padding."""
    model = filled(MODEL)
    clips = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 5, 4, 56, 56, 3), np.uint8))
    none, keys = jnp.zeros((1, 0, 56, 56, 3), jnp.uint8), jax.random.key_data(jax.random.key(0))[None]
    encode = jax.jit(lambda m, k: m.encode(clips, none, k))
    alone = encode(model, keys)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 1, 2))):
        np.testing.assert_allclose(encode(model, keys), alone, atol=1e-4 * float(jnp.abs(alone).max()))


def test_an_answer_drops_nothing() -> None:
    """Without keys, or with a rate of 0, no random number is asked for."""
    batch = jax.tree.map(jnp.asarray, Batch.fake(MODEL.geometry(), rows=1, seed=1, vocab=MODEL.llm.vocab_size))
    keys = jax.random.key_data(jax.random.key(0))[None]
    still = dataclasses.replace(MODEL, vision=dataclasses.replace(TOWER, drop_path=0.0))

    def draws(config: hico.HiCoConfig, keys: Any) -> bool:
        model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        return "random_bits" in str(jax.make_jaxpr(lambda m, b: m.encode(b.clips, b.images, keys))(model, batch))

    assert draws(MODEL, keys)
    assert not draws(MODEL, None)
    assert not draws(still, keys)
