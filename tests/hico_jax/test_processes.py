"""Two processes joined by `jax.distributed` read rows, save, vote on what is sound, restore.

Training: benchmarks/elastic.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipeline.tokenizer import train_bpe

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHILD = """
import pathlib, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hico_jax import checkpoint, registry
from hico_jax.batch import Batch
from hico_jax.config import CheckpointConfig
from hico_jax.parallel import hosts, sharding
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.step import Stepper

hosts.join(60)
folder = pathlib.Path(sys.argv[1])
# Fewer rows in a process than devices in all: each still gets rows of its own.
for sizes, share in ((MeshConfig(1, 8, 1, 1), (jax.process_index(), 2)), (MeshConfig(1, 1, 8, 1), (0, 1))):
    mesh = make_mesh(sizes)
    assert sharding.rows_of(mesh) == share
    whole = Batch.fake(registry.model_config("tiny").geometry(), rows=8, seed=1)
    stepper = object.__new__(Stepper)
    stepper._mesh, stepper._parts, stepper.copied = mesh, 1, 0
    with jax.set_mesh(mesh):
        placed = stepper.put(jax.tree.map(lambda a: a[share[0] :: share[1]], whole))
        totals = jax.jit(lambda b: (b.tokens.sum(), b.clips.astype(jnp.int32).sum()))(placed)
    assert placed.tokens.shape[0] == 8, placed.tokens.shape
    expected = int(whole.tokens.sum()), int(whole.clips.astype(np.int64).sum())
    assert tuple(map(int, totals)) == expected, (sizes, totals, expected)
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[::4])
split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("fsdp",), ()))
make = jax.jit(lambda n: ({"w": jnp.arange(8.0) * n}, {"count": n}), out_shardings=({"w": split}, {"count": whole}))
with jax.set_mesh(mesh):
    saved = checkpoint.Checkpointer(str(folder), CheckpointConfig(keep=5))
    for step in (1, 2):
        saved.save(step, *make(np.int32(step)), {"data": step})
    saved.close()
    if jax.process_index() == 0:
        for file in (folder / "checkpoints" / "2" / "params").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:-3])
    multihost_utils.sync_global_devices("damaged")
    saved = checkpoint.Checkpointer(str(folder), CheckpointConfig(keep=5))
    found = saved.restore(*make(np.int32(0)))
    assert found.meta["step"] == 1 and "damaged" in found.skipped[0], found
    assert saved.steps() == [1]
    mine = found.params["w"].addressable_shards[0]
    assert (np.asarray(mine.data) == np.arange(8.0)[mine.index]).all()
    assert int(np.asarray(found.optimizer["count"].addressable_shards[0].data)) == 1
    saved.close()
"""


def test_two_processes_read_their_rows_and_restore_the_newest_sound_checkpoint(tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "HICO_PROCESSES": "2",
        "HICO_COORDINATOR": f"localhost:{port}",
    }  # fmt: skip
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    started = [
        subprocess.Popen(command, env=shared | {"HICO_PROCESS": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in started:
        said = process.communicate(timeout=240)[1]
        assert process.returncode == 0, said[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_on_films_of_which_each_decodes_half(tmp_path: pathlib.Path) -> None:
    """Losses are those of one process with both devices; a film whose end cannot be read is masked on both."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "ball"}]
    for i in range(4):
        (tmp_path / f"f{i}").mkdir()
        for frame in range(16):
            Image.new("RGB", (8, 8), (10 * frame, 50 * i, 200)).save(tmp_path / f"f{i}" / f"{frame:02}.png")
    films = [{"id": f"f{i}", "video": f"f{i}", "conversations": talk} for i in range(4)]
    (tmp_path / "all.json").write_text(json.dumps(films))
    train_bpe(["What is seen? The video lasts for seconds."] * 4, 300).save(tmp_path / "words")
    flags = {
        "data.annotations": tmp_path / "all.json", "data.data_root": tmp_path, "data.tokenizer": tmp_path / "words",
        "data.batch_size": 2, "data.min_frames": 16, "data.max_frames": 16, "data.length_step": 64,
        "data.max_bad_fraction": 1.0, "mesh.sequence": 2, "mesh.fsdp": 1, "train.steps": 4,
        "checkpoint.every": 100, "train.num_samples": 0,
    }  # fmt: skip

    def losses(name: str, processes: int) -> list[tuple[float, float]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = os.environ | {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(2 // processes),
            "HICO_PROCESSES": str(processes), "HICO_COORDINATOR": f"localhost:{port}",
        }  # fmt: skip
        command = [sys.executable, "-m", "hico_jax", "train", "--config=configs/debug_tiny.py"]
        command += [f"--config.{k}={v}" for k, v in (flags | {"workdir": tmp_path / name}).items()]
        command += ["--config.train.distributed=True"] if processes > 1 else []
        started = [
            subprocess.Popen(
                command, env=shared | {"HICO_PROCESS": str(i)}, cwd=ROOT, stderr=subprocess.PIPE, text=True
            )
            for i in range(processes)
        ]
        for process in started:
            said = process.communicate(timeout=400)[1]
            assert process.returncode == 0, said[-3000:]
        written = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(line["loss"], line["bad"]) for line in map(json.loads, written) if "loss" in line]

    np.testing.assert_allclose(losses("two", 2), losses("one", 1), rtol=1e-5)
    for frame in (14, 15):
        (tmp_path / "f3" / f"{frame:02}.png").write_bytes(b"not a picture")
    hurt, alone = losses("two hurt", 2), losses("one hurt", 1)
    assert [bad for _, bad in hurt][-1] == 2  # once in each of two epochs
    np.testing.assert_allclose(hurt, alone, rtol=1e-5)
