"""Compile the real training step or prefill for devices that are not here, and read what the compiler says.

In: an `Experiment`, the mesh of a topology, the shape of a batch. Out: a `Compiled`: memory, collectives, time.
Nothing is computed and no array exists; `libtpu` is the whole TPU compiler and needs no TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hico_jax import generate, start, step
from hico_jax.batch import Batch
from hico_jax.config import Experiment
from hico_jax.parallel import context, sharding
from hico_jax.plan import program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device."""

    peak_bytes: int
    argument_bytes: int  # parameters, optimizer, batch
    temporary_bytes: int  # activations, gathered weights, buffers
    host_bytes: int
    compile_s: float
    collectives: Mapping[str, tuple[int, int]] | None  # kind -> how many run, bytes a device receives; or unknown
    text: str = ""  # the program, where it can be had


def record(found: Compiled) -> dict[str, Any]:
    """The figures as plain numbers."""
    sent = found.collectives
    return {
        "peak_gib": round(found.peak_bytes / 2**30, 2), "argument_gib": round(found.argument_bytes / 2**30, 2),
        "temporary_gib": round(found.temporary_bytes / 2**30, 2), "host_gib": round(found.host_bytes / 2**30, 2),
        "compile_s": round(found.compile_s, 1),
        "collectives": None if sent is None else {k: list(v) for k, v in sent.items()},
    }  # fmt: skip


def _program(compiled: Any, folder: str) -> str:
    """The text of a program: from the compiler's own file, as jaxlib cannot read all that libtpu makes; or empty."""
    for file in pathlib.Path(folder).glob("*.jit_*.after_optimizations.txt"):
        return file.read_text()
    try:
        return compiled.as_text()
    except Exception:  # not one type over versions, and a plan is worth having without it
        return ""


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a named TPU topology, for example `v5p:4x4x4`.

    Raises:
      ValueError: no TPU compiler is installed, or it does not know the name.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it looks for a TPU's metadata for a minute
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # or it complains of both on many lines
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:  # the compiler's own words are many lines of C++
        if "lockfile" in str(error):
            raise ValueError(
                "another process holds the TPU compiler, or one that died left its lock; wait for it, delete "
                "/tmp/libtpu_lockfile, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 to compile beside it"
            ) from None
        if "libtpu" in str(error).lower() and "not found" in str(error).lower():
            raise ValueError("no TPU compiler is installed; pip install -e '.[tpu-compile]'") from None
        raise ValueError(
            f"the TPU compiler does not know the topology {topology!r} ({str(error).splitlines()[0][:120]}); "
            "names read v5e:4x4, v5p:4x4x4, v6e:8x8"
        ) from None


def train_step(
    experiment: Experiment, mesh: Mesh, *, rows: int, tokens: int, clips: int, keep_text: bool = False
) -> Compiled:
    """Compile one optimizer step on a batch of `rows` rows of `tokens` tokens and `clips` clips each."""
    experiment = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, steps=experiment.train.steps or 1000)
    )
    with jax.set_mesh(mesh), context.using(experiment.mesh.context):
        begun = start.abstract_start(experiment, mesh)
        update = functools.partial(step.train_step, graphdef=begun.graphdef, tx=begun.optimizer, settings=experiment)
        places = jax.tree.map(lambda a: a.sharding, begun.state)
        jitted = jax.jit(update, donate_argnums=0, out_shardings=(places, None))
        return _compile(jitted, (begun.state, _batch(experiment, mesh, rows, tokens, clips)), keep_text)


def prefill(experiment: Experiment, mesh: Mesh, *, rows: int, tokens: int, clips: int, room: int = 1024) -> Compiled:
    """Compile encoding and prefill of such a batch, in the model's own precision, with `room` for an answer."""
    with jax.set_mesh(mesh), context.using(experiment.mesh.context):
        graph, weights = nnx.split(nnx.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(params=0))))
        dtype = jnp.dtype(experiment.model.dtype)
        weights = jax.tree.map(
            lambda a, p: jax.ShapeDtypeStruct(a.shape, dtype, sharding=p), weights, sharding.shardings(weights, mesh)
        )

        def run(weights: Any, batch: Batch) -> Any:
            model = nnx.merge(graph, weights)
            stream = model.splice(batch, model.encode(batch.clips, batch.images))
            stream = stream.replace(targets=None, weights=None)
            return generate.prefill(model.llm, stream, batch.drop, schedule=model.config.drop, room=room)

        return _compile(jax.jit(run), (weights, _batch(experiment, mesh, rows, tokens, clips)), False)


def _batch(experiment: Experiment, mesh: Mesh, rows: int, tokens: int, clips: int) -> Batch:
    geometry = experiment.model.geometry()
    px, frames = geometry.image_px, geometry.frames_per_clip
    whole = lambda dtype: jax.ShapeDtypeStruct((rows, tokens), dtype)
    made = Batch(
        tokens=whole(jnp.int32), slots=whole(jnp.int32), positions=whole(jnp.int32), segments=whole(jnp.int32),
        targets=whole(jnp.int32), weights=whole(jnp.float32),
        clips=jax.ShapeDtypeStruct((rows, clips, frames, px, px, 3), jnp.uint8),
        images=jax.ShapeDtypeStruct((rows, 0, px, px, 3), jnp.uint8),
        ring=mesh.shape[sharding.SEQUENCE],
    )  # fmt: skip
    places = sharding.batch_shardings(made, mesh)
    return jax.tree.map(lambda a, p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=p), made, places)


def _compile(jitted: Any, args: tuple[Any, ...], keep_text: bool) -> Compiled:
    lowered = jitted.lower(*args)
    with tempfile.TemporaryDirectory(prefix="hico_plan_") as folder:
        # Some twenty files. LIBTPU_INIT_ARGS can ask too, but gets 18 for every fusion, at twice the time in all.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if sharding.platform() == "tpu" else None
        began = time.monotonic()
        compiled = lowered.compile(compiler_options=dump)
        seconds = time.monotonic() - began
        text = _program(compiled, folder)
    memory = compiled.memory_analysis()
    return Compiled(
        peak_bytes=int(memory.peak_memory_in_bytes), argument_bytes=int(memory.argument_size_in_bytes),
        temporary_bytes=int(memory.temp_size_in_bytes),
        host_bytes=int(memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes),
        compile_s=seconds, text=text if keep_text else "",
        collectives=program.by_kind(program.collectives_of(text)) if text else None,
    )  # fmt: skip


def gib(size: float) -> str:
    """Bytes as GiB.

    Example:
      >>> gib(3 << 29)
      '1.5 GiB'
    """
    return f"{np.round(size / 2**30, 1):.1f} GiB"
