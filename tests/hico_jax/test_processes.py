"""Two processes joined by `jax.distributed` read rows, save, vote on what is sound, restore.

Training: benchmarks/elastic.py.
"""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

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
    stepper._mesh = mesh
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
