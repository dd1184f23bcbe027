"""What a run is before it runs: parameters and bytes by part, the step's shapes and operations. Nothing is allocated.

In: an `Experiment` and a mesh. Out: lines of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from hico_jax import checkpoint
from hico_jax.batch import Batch, abstract
from hico_jax.config import Experiment
from hico_jax.start import TrainState, abstract_start
from hico_jax.step import step_cost


def table(state: TrainState) -> list[str]:
    """Parameters and bytes on one device, by part: weights, gradients (as large as what trains) and moments."""
    rows: dict[str, list[int]] = {}
    for column, tree in ((0, state.trainable), (1, state.frozen)):
        for name, array in checkpoint.flatten(tree).items():
            part = "/".join(name.split("/")[:2]) if name.startswith("lora/") else name.split("/")[0]
            row = rows.setdefault(part, [0, 0, 0])
            row[column] += math.prod(array.shape)
            row[2] += _bytes_here(array)
    lines = [f"{'':14}{'trains':>16}{'frozen':>16}{'bytes/device':>16}"]
    lines += [f"{part:14}{trains:16,}{frozen:16,}{size:16,}" for part, (trains, frozen, size) in rows.items()]
    grads = sum(_bytes_here(a) for a in jax.tree.leaves(state.trainable))
    moments = sum(_bytes_here(a) for a in jax.tree.leaves(state.optimizer))
    lines += [f"{'gradients':46}{grads:16,}", f"{'optimizer':46}{moments:16,}"]
    total = grads + moments + sum(row[2] for row in rows.values())
    return [*lines, f"{'together':46}{total:16,}"]


def _bytes_here(array: Any) -> int:
    shape = array.sharding.shard_shape(array.shape) if getattr(array, "sharding", None) is not None else array.shape
    return math.prod(shape) * array.dtype.itemsize


def memory(devices: Iterable[Any]) -> list[str]:
    """What each device says it has and uses; nothing where it does not say, as on a CPU."""
    told: list[tuple[Any, Mapping[str, int]]] = [(d, d.memory_stats() or {}) for d in devices]
    return [
        f"{d}: {s['bytes_in_use'] / 2**30:.2f} of {s['bytes_limit'] / 2**30:.2f} GiB in use"
        for d, s in told if "bytes_limit" in s
    ]  # fmt: skip


def largest_batch(experiment: Experiment) -> Batch:
    """The largest batch the configuration allows, as shapes: full rows, and films of as many frames as fit."""
    geometry, data = experiment.model.geometry(), experiment.data
    room = data.max_length or geometry.max_length
    most = max(data.max_frames, data.min_frames) or room
    clips = min(most // geometry.frames_per_clip, (room - 32) // geometry.tokens_per_clip)
    fake = Batch.fake(geometry, rows=1, clips=1, text=16)
    rows, length, px = data.batch_size, room, geometry.image_px
    shapes = abstract(fake)
    two = lambda a: jax.ShapeDtypeStruct((rows, length), a.dtype)
    return shapes.replace(  # type: ignore[attr-defined]
        tokens=two(fake.tokens), slots=two(fake.slots), positions=two(fake.positions), segments=two(fake.segments),
        targets=two(fake.targets), weights=two(fake.weights),
        clips=jax.ShapeDtypeStruct((rows, clips, geometry.frames_per_clip, px, px, 3), fake.clips.dtype),
        images=jax.ShapeDtypeStruct((rows, 0, px, px, 3), fake.images.dtype),
    )  # fmt: skip


def dry_run(experiment: Experiment, mesh: Mesh) -> list[str]:
    """Everything `hico train --dry_run` prints: what would be made, and what a step would cost."""
    with jax.set_mesh(mesh):
        state = abstract_start(experiment, mesh).state
    batch = largest_batch(experiment)
    rows, length = batch.shape
    count = {"tokens": rows * length, "frames": batch.clips.shape[1] * rows * batch.clips.shape[2]}
    flops = step_cost(experiment, state)(count)
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(batch))
    return [
        f"{experiment.stage}: {experiment.model_name} on {mesh.size} devices ({sizes}), {experiment.train.steps} steps",
        *table(state),
        f"largest batch: {rows} rows of {length} tokens and {batch.clips.shape[1]} clips, {size / 2**20:,.0f} MiB "
        f"on the host, in {experiment.optim.accumulate} micro-batches",
        f"a step of it: {flops / 1e12:,.2f} TFLOP ({flops / mesh.size / 1e12:,.2f} on each device)",
        "nothing was read or written (--dry_run)",
    ]
