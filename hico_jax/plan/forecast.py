"""Memory and time of a step from formulas, at once. `compile.py` asks the compiler the same.

In: an `Experiment`, a topology, the shape of a batch. Out: a `Forecast` of one device.

FLOPs count causal attention at half and what is computed again separately, as the field does when it quotes MFU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from hico_jax import optim
from hico_jax.config import Experiment
from hico_jax.models.llm import decoder
from hico_jax.parallel import context, spread
from hico_jax.parallel.mesh import MeshConfig
from hico_jax.plan.chips import Topology

EFFICIENCY = (
    0.56  # share of the peak while computing: 55.9 % is the best published for heads of 128 at a million tokens
)
USABLE = 0.95  # share of HBM a program may have


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch: rows, places of a row, clips of a row."""

    rows: int
    tokens: int
    clips: int


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One device of a step."""

    memory: Mapping[str, float]  # bytes by what holds them
    flops: float  # of the model, all devices
    again: float  # computed a second time, all devices
    compute_s: float
    exposed_s: float  # travel that compute does not hide
    ring_bound: float  # tokens a device from which the ring hides its travel
    strategy: str
    mesh: MeshConfig

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s


def shape_of(experiment: Any, own: Mapping[str, Any]) -> Shape:
    """The batch: what flags say, else the configuration's longest row and its global batch; film fills what it may."""
    geometry = experiment.model.geometry()
    tokens = own.get("tokens") or experiment.data.max_length or geometry.max_length
    rows = own.get("rows") or (1 if "tokens" in own else experiment.data.batch_size)
    clips = own.get("clips")
    if clips is None:
        clips = max(0, tokens - min(4096, tokens // 8)) // geometry.tokens_per_clip
        if "tokens" not in own and experiment.data.max_frames:
            clips = min(clips, experiment.data.max_frames // geometry.frames_per_clip)
    return Shape(rows, tokens, clips)


def choose_mesh(shape: Shape, topology: Topology) -> MeshConfig:
    """A mesh for a batch: each row on as few devices as rows allow, weights split over all."""
    each = topology.count // topology.slices
    rows = max(1, shape.rows // topology.slices)
    split = math.gcd(rows, each)
    return MeshConfig(data=1, fsdp=split, sequence=each // split, tensor=1, slices=topology.slices)


def recommend(experiment: Experiment, topology: Topology, shape: Shape) -> tuple[Experiment, MeshConfig]:
    """The mesh and micro-batches that fit with the fewest devices a row; of none that fits, the one that needs least.

    Each device, or group of devices that shares a row, has one row at a time; the rest is accumulated.
    """
    each, found = topology.count // topology.slices, []
    for sequence in (2**i for i in range(each.bit_length()) if each % 2**i == 0):
        share = each // sequence * topology.slices
        if shape.rows % share:
            continue
        mesh = MeshConfig(1, each // sequence, sequence, 1, slices=topology.slices, context=experiment.mesh.context)
        optim = dataclasses.replace(experiment.optim, accumulate=shape.rows // share)
        fitted = dataclasses.replace(experiment, optim=optim, mesh=mesh)
        peak = forecast(fitted, topology, mesh, shape).peak
        if peak <= topology.chip.memory * USABLE:
            return fitted, mesh
        found.append((peak, sequence, fitted, mesh))
    return min(found, key=lambda f: f[:2])[2:]


def resolved(mesh: MeshConfig, topology: Topology) -> MeshConfig:
    """The mesh with its -1 worked out.

    Raises:
      ValueError: it does not multiply to the topology's chips.
    """
    each, sizes = topology.count // mesh.slices, list(mesh.sizes)
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, each // known)
    if math.prod(sizes) * mesh.slices != topology.count:
        raise ValueError(
            f"the mesh data={sizes[0]} fsdp={sizes[1]} sequence={sizes[2]} tensor={sizes[3]} slices={mesh.slices} "
            f"needs {math.prod(sizes) * mesh.slices} chips but {topology.name} has {topology.count}; change "
            "mesh.fsdp or mesh.sequence, or set one of them to -1"
        )
    return MeshConfig(*sizes, slices=mesh.slices, context=mesh.context)


def sizes_of(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """(parameters that train, frozen parameters) of vision, projector and llm."""
    return _sizes_of(experiment.model, experiment.optim.rates)


@functools.cache
def _sizes_of(config: Any, rates: optim.Table) -> dict[str, tuple[int, int]]:
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(params=0)))
    parts = optim.split(model, rates)
    found: dict[str, list[int]] = {name: [0, 0] for name in ("vision", "projector", "llm")}
    for i, half in enumerate((parts.trainable, parts.frozen)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(half):
            found[str(getattr(path[0], "key", path[0]))][i] += math.prod(leaf.shape)
    return {name: (a, b) for name, (a, b) in found.items()}


def forecast(
    experiment: Experiment, topology: Topology, mesh: MeshConfig, shape: Shape, *, training: bool = True
) -> Forecast:
    """What one step (or, not training, one prefill) asks of a device."""
    llm, vision, chip = experiment.model.llm, experiment.model.vision, topology.chip
    sizes = sizes_of(experiment)
    count, per_clip = topology.count, experiment.model.geometry().tokens_per_clip
    shards = mesh.fsdp * mesh.sequence * mesh.tensor
    parts = experiment.optim.accumulate if training else 1
    rows_here = max(1.0, shape.rows / (mesh.slices * mesh.data * mesh.fsdp) / parts)
    here = rows_here * shape.tokens / mesh.sequence  # tokens of a device
    heads = llm.num_heads * llm.head_dim
    trains, frozen = sum(t for t, _ in sizes.values()), sum(f for _, f in sizes.values())
    layer = (sum(sizes["llm"]) - llm.vocab_size * llm.embed_dim * (1 if llm.tied else 2)) / llm.num_layers
    patches = (vision.image_px // vision.patch_px) ** 2 * vision.frames_per_clip
    clips_here = math.ceil(shape.rows * shape.clips / count)

    kv_bytes = 4.0 * shape.tokens * llm.num_kv_heads * llm.head_dim * rows_here
    strategy = (
        "none"
        if mesh.sequence == 1
        else mesh.context
        if mesh.context != "auto"
        else ("gather" if kv_bytes <= context.MOST_GATHERED else "ring")
    )
    keeps = getattr(llm, "remat_keeps", "attention") == "attention"
    width = llm.embed_dim + (heads if keeps else 0)
    unembed = llm.vocab_size * llm.embed_dim / mesh.tensor
    pixels = clips_here * vision.frames_per_clip * 3.0 * vision.image_px**2
    tower, tower_trains = sum(sizes["vision"]), sizes["vision"][0] * training
    group = spread.group_size(max(1, clips_here), vision.image_px**2 * vision.frames_per_clip // 256)
    most = decoder.FRUGAL_SLICE if not training else decoder.MESH_SLICE if count > 1 else decoder.SLICE
    wide = 2.0 * min(here, most * rows_here) * llm.mlp_dim / mesh.tensor  # one activation of an MLP
    attention_alive = here * (18 if training else 12) * heads / mesh.tensor  # float32 queries, sums, their parts
    memory = {
        "parameters": (4.0 if training else 2.0) * (trains + frozen) / shards,
        "optimizer": 8.0 * trains / shards * training,
        # of the batch so far and of a part; and weights in the activations' type, cast before the loop over layers
        "gradients": (4.0 * trains * (1 + (parts > 1)) + 2.0 * sum(sizes["llm"])) / shards * training,
        "pixels": (1 + 1.2 / parts * training) * pixels,  # as given, and as the tower cuts them
        "layer inputs": (2.0 * width + 4.0 * llm.num_heads * keeps) * here * llm.num_layers * training,
        "cache": 0.0 if training else kv_bytes * llm.num_layers / mesh.sequence,
    }
    # The tower is done before the layers start, and the loss before the layers' gradients: one of them lives at a time.
    alive = {
        "layer": (8.0 if training else 4.0) * here * llm.embed_dim
        + (0.0 if keeps else 4.0 * here * heads * training)
        + max(attention_alive, (4 if training else 3) * wide + (6.0 if training else 4.0) * layer / mesh.tensor)
        + (kv_bytes * (3 if training else 1) if strategy == "gather" else 0.0),
        "tower": 2.0 * tower
        + 8.0 * tower_trains
        + 2.0 * group * patches * vision.embed_dim * ((2 * vision.num_blocks if tower_trains else 2) + 12)
        - memory["layer inputs"],
        "loss": 12.0 * min(experiment.train.loss_chunk, here) * rows_here * llm.vocab_size * training,
    }
    memory["largest of layer, tower, loss"] = max(0.0, *alive.values())

    times = 3.0 if training else 1.0
    tokens = float(shape.rows * shape.tokens)
    linear = 2.0 * (layer * llm.num_layers + (unembed if training else 0)) * tokens
    attention = 2.0 * shape.rows * float(shape.tokens) ** 2 * heads * llm.num_layers
    seen = shape.rows * shape.clips * patches
    tower_flops = 2.0 * sum(sizes["vision"]) * seen + 4.0 * seen * patches * vision.embed_dim * vision.num_blocks
    tower_times = times if sizes["vision"][0] or not training else 1.0
    flops = times * (linear + attention) + tower_times * tower_flops
    again = (
        (linear + (0 if keeps else attention) + 2 * tower_flops * (tower_times > 1)) if training and llm.remat else 0.0
    )
    compute = (flops + again) / (count * chip.peak * EFFICIENCY)

    c = here
    bound = ring_bound(llm, chip.ratio, training)
    steps = mesh.sequence - 1
    sent = 4.0 * c * llm.num_kv_heads * llm.head_dim / mesh.tensor
    hop_compute = 2.0 * c * c * heads / mesh.tensor / (chip.peak * EFFICIENCY)
    exposed = 0.0
    if strategy == "ring":
        exposed = steps * llm.num_layers * max(0.0, sent / chip.link - hop_compute) * times
    elif strategy in ("gather", "usp"):
        exposed = llm.num_layers * steps * sent / (chip.link * chip.links) * times
    # Weights of the next layer come while this one computes; what is slower than its compute shows.
    weights = (
        (3 if training else 1)
        * 2.0
        * layer
        * (shards / mesh.tensor - 1)
        / (shards / mesh.tensor)
        / (chip.link * chip.links)
    )
    exposed += llm.num_layers * max(0.0, weights - compute / llm.num_layers)
    film = max(0, mesh.sequence - 1) / max(1, mesh.sequence) * shape.clips * per_clip * llm.embed_dim * 2.0 * rows_here
    exposed += (2 if training else 1) * film / chip.link  # visual tokens on their way home
    return Forecast(memory, flops, again, compute, exposed, bound, strategy, mesh)


def ring_bound(llm: Any, ratio: float, training: bool = True) -> float:
    """Tokens a device from which compute hides the ring: `2 (K/H) (C/W)` forward at the peak, 12/5 for 2 backward.

    A step computes `2 c^2 H d` and sends `4 c K d` bytes; backward 5 products against bf16 keys and values and float32
    gradients of both.
    """
    return (12 / 5 if training else 2.0) * llm.num_kv_heads / llm.num_heads * ratio


def check_memory(
    found: Forecast,
    topology: Topology,
    experiment: Experiment,
    shape: Shape,
    *,
    peak: float | None = None,
    training: bool = True,
) -> None:
    """Refuse what does not fit, with the three settings that would help most; `peak` is the compiler's figure.

    Raises:
      ValueError: too little HBM.
    """
    need, has = found.peak if peak is None else peak, topology.chip.memory * USABLE
    if need <= has:
        return
    helps, what = [], "step" if training else "prefill"
    for words, changed, place, mesh, batch in _changes(experiment, topology, found, shape, training):
        then = forecast(changed, place, mesh, batch, training=training).peak
        if then < 0.98 * found.peak:
            helps.append((then, words))
    told = [f"{words} ({then / 2**30:.1f} GiB)" for then, words in sorted(set(helps))[:3]] or ["chips with more memory"]
    raise ValueError(
        f"the {what} needs {need / 2**30:.1f} GiB a chip but {topology.chip.name} has {has / 2**30:.1f} GiB to use, "
        f"{(need - has) / 2**30:.1f} GiB too few; what would help, each alone, by forecast: {'; '.join(told)}"
    )


def _changes(
    experiment: Experiment, topology: Topology, found: Forecast, shape: Shape, training: bool
) -> Iterator[tuple[str, Experiment, Topology, MeshConfig, Shape]]:
    """Single changes that may need less memory: in words, and what is forecast then."""
    llm, mesh, replace = experiment.model.llm, found.mesh, dataclasses.replace

    def of_llm(**new: Any) -> Experiment:
        return replace(experiment, model=replace(experiment.model, llm=replace(llm, **new)))

    if training and not llm.remat:
        yield "--config.model.llm.remat=True", of_llm(remat=True), topology, mesh, shape
    elif training and llm.remat_keeps != "nothing":
        keeps = "--config.model.llm.remat_keeps=nothing"
        yield keeps, of_llm(remat_keeps="nothing"), topology, mesh, shape
    if mesh.fsdp % 2 == 0:
        longer = replace(mesh, fsdp=mesh.fsdp // 2, sequence=2 * mesh.sequence)
        words = f"--config.mesh.fsdp={longer.fsdp} --config.mesh.sequence={longer.sequence}"
        yield words, experiment, topology, longer, shape
    if found.strategy == "gather":
        yield "--config.mesh.context=ring", experiment, topology, replace(mesh, context="ring"), shape
    fitted, best = recommend(experiment, topology, shape) if training else (experiment, mesh)
    if (best.fsdp, best.sequence, fitted.optim.accumulate) != (mesh.fsdp, mesh.sequence, experiment.optim.accumulate):
        words = f"--config.mesh.fsdp={best.fsdp} --config.mesh.sequence={best.sequence} --config.optim.accumulate="
        yield f"{words}{fitted.optim.accumulate}", fitted, topology, best, shape
    parts = shape.rows // (mesh.slices * mesh.data * mesh.fsdp)
    if training and parts > experiment.optim.accumulate:  # one row a device at a time
        split = replace(experiment, optim=replace(experiment.optim, accumulate=parts))
        yield f"--config.optim.accumulate={parts}", split, topology, mesh, shape
    if shape.tokens >= 8192:
        less = replace(shape, tokens=shape.tokens // 2, clips=shape.clips // 2)
        yield f"rows of {less.tokens:,} tokens", experiment, topology, mesh, less
    twice = replace(topology, shape=(*topology.shape[:-1], 2 * topology.shape[-1]))
    for axis in ("fsdp", "sequence"):
        wider = replace(mesh, **{axis: 2 * getattr(mesh, axis)})
        if axis == "sequence" or shape.rows % (2 * mesh.slices * mesh.data * mesh.fsdp) == 0:
            yield f"--topology={twice.name} with mesh.{axis}={getattr(wider, axis)}", experiment, twice, wider, shape
