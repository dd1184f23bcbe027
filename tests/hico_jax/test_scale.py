"""Many devices give what one gives: loss and gradients, with packing and compression on; and answers.

`-m slow` runs nano on every sensible mix of axes; the default run has the tiny model on one mix that uses them all.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from data_pipeline import layout
from hico_jax import losses, registry
from hico_jax.batch import Batch, DropSchedule
from hico_jax.models.hico import HiCoConfig
from hico_jax.parallel import context, sharding, zigzag
from hico_jax.parallel.mesh import MeshConfig, make_mesh

KINDS = {
    "none": DropSchedule(),
    "uniform": DropSchedule("uniform", (1, 2), (1.0, 0.6, 0.3)),
    "both": DropSchedule("uniform0_attention", (1, 2), (1.0, 0.6, 0.3)),
}
MESHES = [
    (MeshConfig(1, 1, 2, 1), "ring"), (MeshConfig(1, 1, 4, 1), "gather"), (MeshConfig(1, 1, 8, 1), "ring"),
    (MeshConfig(1, 2, 4, 1), "usp"), (MeshConfig(1, 2, 2, 2), "gather"), (MeshConfig(2, 1, 2, 2), "ring"),
    (MeshConfig(1, 1, 2, 2, slices=2), "ring"), (MeshConfig(1, 8, 1, 1), "auto"),
]  # fmt: skip


def problem(name: str, kind: str) -> tuple[HiCoConfig, Batch]:
    """A model and two rows: two packed conversations, and one of a longer film."""
    config = dataclasses.replace(registry.model_config(name), drop=KINDS[kind])
    g, rng = config.geometry(), np.random.default_rng(0)

    def row(text: int, clips: int, answer: int) -> layout.Row:
        ids = [*rng.integers(3, 50, 4).tolist(), -200, *rng.integers(3, 50, text).tolist()]
        labels = [-100] * (len(ids) - answer) + ids[-answer:]
        shape = (clips, g.frames_per_clip, g.image_px, g.image_px, 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        return layout.row(ids, labels, [layout.Visual.film(clips * g.frames_per_clip, g)], g, clips=pixels)

    return config, layout.collate([layout.pack([row(9, 2, 4), row(6, 1, 3)], g), row(12, 4, 5)], g)


def weights(config: HiCoConfig) -> tuple[Any, Any]:
    """Structure and drawn weights: no initializer is compiled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def value(path: Any, leaf: Any) -> np.ndarray:
        of_norm = any(getattr(key, "key", None) == "scale" for key in path)
        return np.ones(leaf.shape, np.float32) if of_norm else rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    return graph, jax.tree_util.tree_map_with_path(value, state)


def step(config: HiCoConfig, batch: Batch, sizes: MeshConfig, strategy: str) -> tuple[float, Any]:
    """Loss and gradients on a mesh."""
    count = math.prod(sizes.sizes) * sizes.slices
    mesh = make_mesh(sizes, jax.devices()[:count])
    graph, state = weights(config)

    def loss_of(state: Any, batch: Batch) -> Any:
        model = nnx.merge(graph, state)
        stream = model(batch)
        share = losses.balance(stream.weights, stream.segments, "example")
        loss = losses.next_token(stream.x, model.llm.unembed_weight(), stream.targets, share, chunk=16)
        return loss.total / loss.weight

    with jax.set_mesh(mesh), context.using(strategy):
        state = jax.device_put(state, sharding.shardings(state, mesh))
        number, shares = sharding.rows_of(mesh)
        rows = len(batch.tokens) // shares
        mine = jax.tree.map(lambda a: a[number * rows : (number + 1) * rows], batch)
        mine = sharding.put(zigzag.deal(mine, mesh.shape["sequence"]), mesh)
        loss, grads = jax.jit(jax.value_and_grad(loss_of))(state, mine)
        if jax.process_count() > 1:  # else NumPy puts the parts together
            grads = jax.jit(lambda g: g, out_shardings=NamedSharding(mesh, PartitionSpec()))(grads)
            return float(loss), jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), grads)
        return float(loss), jax.tree.map(np.asarray, grads)


def check(name: str, kind: str, meshes: list[tuple[MeshConfig, str]]) -> None:
    config, batch = problem(name, kind)
    loss, grads = step(config, batch, MeshConfig(1, 1, 1, 1), "auto")
    for sizes, strategy in meshes:
        found, found_grads = step(config, batch, sizes, strategy)
        assert abs(found - loss) <= 1e-5, (sizes, strategy)
        for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())), err_msg=str(sizes))


def test_one_mix_of_all_axes_gives_loss_and_gradients_of_one_device() -> None:
    check("tiny", "both", [(MeshConfig(1, 2, 2, 2), "ring")])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nano", "nano_hd"])
def test_every_mix_of_axes_gives_loss_and_gradients_of_one_device(name: str, kind: str) -> None:
    check(name, kind, MESHES)


def test_a_batch_that_is_not_dealt_is_refused() -> None:
    config, batch = problem("tiny", "none")
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    with (
        jax.set_mesh(make_mesh(MeshConfig(1, 2, 4, 1))),
        pytest.raises(ValueError, match=r"dealt to 1 devices but the mesh splits rows over 4; deal it with"),
    ):
        jax.eval_shape(lambda s, b: nnx.merge(graph, s)(b).x, state, batch)


CHILD = """
import sys
import jax
jax.config.update("jax_default_matmul_precision", "highest")
from hico_jax.parallel import hosts
hosts.join(300)
from tests.hico_jax import test_scale
test_scale.in_processes(*sys.argv[1:])
"""
OVER_PROCESSES = [
    (MeshConfig(1, 2, 1, 2), "auto"), (MeshConfig(1, 1, 4, 1), "ring"), (MeshConfig(1, 2, 2, 1), "usp"),
    (MeshConfig(2, 1, 2, 1), "gather"),
]  # fmt: skip


def in_processes(name: str, kind: str, file: str) -> None:
    """Of one of several processes: loss and gradients on every mesh over all of them, into a file."""
    config, batch = problem(name, kind)
    found = {}
    for number, (sizes, strategy) in enumerate(OVER_PROCESSES):
        loss, grads = step(config, batch, sizes, strategy)
        found |= {f"{number} loss": np.float64(loss)}
        found |= {f"{number} {i}": g for i, g in enumerate(jax.tree.leaves(grads))}
    if jax.process_index() == 0:
        np.savez(file, **found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "kind", "processes"), [("nano", "both", 2), ("nano", "both", 4)])
def test_processes_give_loss_and_gradients_of_one_device(
    name: str, kind: str, processes: int, tmp_path: pathlib.Path
) -> None:
    """Four devices in 2 or 4 processes; a row may lie on devices of several."""
    config, batch = problem(name, kind)
    loss, grads = step(config, batch, MeshConfig(1, 1, 1, 1), "auto")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2]), "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // processes), "HICO_PROCESSES": str(processes),
        "HICO_COORDINATOR": f"localhost:{port}",
    }  # fmt: skip
    command = [sys.executable, "-c", CHILD, name, kind, str(tmp_path / "found.npz")]
    started = [
        subprocess.Popen(command, env=env | {"HICO_PROCESS": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    for process in started:
        said = process.communicate(timeout=3000)[1]
        assert process.returncode == 0, said[-3000:]
    found = np.load(tmp_path / "found.npz")
    for number, (sizes, _) in enumerate(OVER_PROCESSES):
        assert abs(float(found[f"{number} loss"]) - loss) <= 1e-5, sizes
        for i, b in enumerate(jax.tree.leaves(grads)):
            scale = max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(found[f"{number} {i}"], b, atol=1e-5 * scale, err_msg=str(sizes))
