"""Memory and time of a step from formulas, at once. `compile.py` asks the compiler the same.

In: an `Experiment`, a topology, the shape of a batch. Out: a `Forecast` of one device.

FLOPs count causal attention at half and what is computed again separately, as the field does when it quotes MFU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from hico_jax import lora, start
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


def sizes_of(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """(parameters that train, frozen parameters) of vision, projector and llm; adapters count where they sit."""
    return {name: (trains, frozen) for name, (trains, frozen, _) in _weights_of(experiment).items()}


_KNOWN: dict[Any, dict[str, tuple[int, int, int]]] = {}


def _weights_of(experiment: Experiment) -> dict[str, tuple[int, int, int]]:
    """`sizes_of`, and the bytes that training holds them in."""
    key = experiment.model, experiment.optim.rates, experiment.lora
    if key not in _KNOWN:
        model = nnx.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(params=0)))
        parts = start.split(experiment, model)
        found: dict[str, list[int]] = {name: [0, 0, 0] for name in ("vision", "projector", "llm")}
        for i, half in enumerate((parts.trainable, parts.frozen)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(half):
                names = [str(getattr(part, "key", part)) for part in path]
                of = found[names[1] if names[0] == lora.PREFIX else names[0]]
                of[i] += math.prod(leaf.shape)
                of[2] += math.prod(leaf.shape) * leaf.dtype.itemsize
        _KNOWN[key] = {name: (a, b, c) for name, (a, b, c) in found.items()}
    return _KNOWN[key]


class _Load(NamedTuple):
    """What memory and time both ask for, of one device where nothing else is said."""

    rows: float  # at a time
    tokens: float  # at a time
    clips: int
    patches: int  # of a clip
    layer: float  # weights of a layer of the language model, whole
    heads: int  # numbers of a token's queries
    kv: int  # numbers of a token's keys
    row_kv: float  # bytes of a layer's keys and values, of whole rows
    shards: int  # devices that the weights are split over
    strategy: str


def _load(experiment: Experiment, topology: Topology, mesh: MeshConfig, shape: Shape, training: bool) -> _Load:
    llm, vision = experiment.model.llm, experiment.model.vision
    rows = max(1.0, shape.rows / (mesh.slices * mesh.data * mesh.fsdp) / (experiment.optim.accumulate * training or 1))
    tables = llm.vocab_size * llm.embed_dim * (1 if llm.tied else 2)
    row_kv = 4.0 * shape.tokens * llm.num_kv_heads * llm.head_dim * rows
    auto = "gather" if row_kv <= context.MOST_GATHERED else "ring"
    return _Load(
        rows=rows,
        tokens=rows * shape.tokens / mesh.sequence,
        clips=math.ceil(shape.rows * shape.clips / topology.count),
        patches=(vision.image_px // vision.patch_px) ** 2 * vision.frames_per_clip,
        layer=(sum(sizes_of(experiment)["llm"]) - tables) / llm.num_layers,
        heads=llm.num_heads * llm.head_dim,
        kv=llm.num_kv_heads * llm.head_dim,
        row_kv=row_kv,
        shards=mesh.fsdp * mesh.sequence * mesh.tensor,
        strategy="none" if mesh.sequence == 1 else auto if mesh.context == "auto" else mesh.context,
    )


def forecast(
    experiment: Experiment, topology: Topology, mesh: MeshConfig, shape: Shape, *, training: bool = True
) -> Forecast:
    """What one step (or, not training, one prefill) asks of a device."""
    load, chip = _load(experiment, topology, mesh, shape, training), topology.chip
    flops, again = _flops(experiment, shape, load, training)
    compute = (flops + again) / (topology.count * chip.peak * EFFICIENCY)
    return Forecast(
        memory=_memory(experiment, topology, mesh, load, training), flops=flops, again=again, compute_s=compute,
        exposed_s=_exposed(experiment, topology, mesh, shape, load, training, compute),
        ring_bound=ring_bound(experiment.model.llm, chip.ratio, training), strategy=load.strategy, mesh=mesh,
    )  # fmt: skip


def _memory(
    experiment: Experiment, topology: Topology, mesh: MeshConfig, load: _Load, training: bool
) -> dict[str, float]:
    """Bytes of a device by what holds them."""
    llm, vision, count = experiment.model.llm, experiment.model.vision, topology.count
    weights, here = _weights_of(experiment), load.tokens
    parts = experiment.optim.accumulate if training else 1
    trains, frozen, held = (sum(of[i] for of in weights.values()) for i in range(3))
    of_llm, tower, tower_trains = sum(weights["llm"][:2]), sum(weights["vision"][:2]), weights["vision"][0] * training
    keeps = getattr(llm, "remat_keeps", "attention") == "attention"
    width = llm.embed_dim + (load.heads if keeps else 0)
    pixels = load.clips * vision.frames_per_clip * 3.0 * vision.image_px**2
    group = spread.group_size(max(1, load.clips), vision.image_px**2 * vision.frames_per_clip // 256)
    most = decoder.FRUGAL_SLICE if not training else decoder.MESH_SLICE if count > 1 else decoder.SLICE
    wide = 2.0 * min(here, most * load.rows) * llm.mlp_dim / mesh.tensor  # one activation of an MLP
    # Of a step of the ring backward: d_q so far, its new part and their sum in float32; q, out, d_out and the part in
    # half precision; of keys and values both gradients in float32, and three pairs: own, here, coming.
    attention = here * (20 * (load.heads + load.kv) if training else 12 * load.heads) / mesh.tensor
    memory = {
        "parameters": (held if training else 2.0 * (trains + frozen)) / load.shards,
        "optimizer": 8.0 * trains / load.shards * training,
        # of the batch so far and of a part; and weights in the activations' type, cast before the loop over layers
        "gradients": (4.0 * trains * (1 + (parts > 1)) + 2.0 * of_llm) / load.shards * training,
        "pixels": (1 + 1.2 / parts * training) * pixels,  # as given, and as the tower cuts them
        "layer inputs": (2.0 * width + 4.0 * llm.num_heads * keeps) * here * llm.num_layers * training,
        "cache": 0.0 if training else load.row_kv * llm.num_layers / mesh.sequence,
    }
    # The tower is done before the layers start, and the loss before the layers' gradients: one of them lives at a time.
    alive = {
        "layer": (8.0 if training else 4.0) * here * llm.embed_dim
        + max(
            attention + (0.0 if keeps else 4.0 * here * load.heads * training),
            # The MLP backward: beside its slice, the stream's gradients and what attention was computed again for.
            (12.0 if keeps else 18.0) * here * llm.embed_dim * training
            + (4 if training else 3) * wide
            + (3.0 if training else 4.0) * load.layer / mesh.tensor,
        )
        + (load.row_kv * (3 if training else 1) if load.strategy == "gather" else 0.0),
        "tower": 2.0 * tower
        + 8.0 * tower_trains
        + 2.0 * group * load.patches * vision.embed_dim * ((2 * vision.num_blocks if tower_trains else 2) + 12)
        - memory["layer inputs"],
        "loss": 12.0 * min(experiment.train.loss_chunk, here) * load.rows * llm.vocab_size * training,
    }
    memory["largest of layer, tower, loss"] = max(0.0, *alive.values())
    return memory


def _flops(experiment: Experiment, shape: Shape, load: _Load, training: bool) -> tuple[float, float]:
    """Of the model, and those computed again, on all devices."""
    llm, vision, sizes = experiment.model.llm, experiment.model.vision, sizes_of(experiment)
    tokens = float(shape.rows * shape.tokens)
    linear = 2.0 * (load.layer * llm.num_layers + llm.vocab_size * llm.embed_dim * training) * tokens
    attention = 2.0 * shape.rows * float(shape.tokens) ** 2 * load.heads * llm.num_layers
    seen = float(shape.rows * shape.clips * load.patches)
    tower = 2.0 * sum(sizes["vision"]) * seen + 4.0 * seen * load.patches * vision.embed_dim * vision.num_blocks
    if not training:
        return linear + attention + tower, 0.0
    # Forward, and back to what lies below; gradients of weights are taken of what trains alone.
    of_llm, of_tower = (trains / (trains + frozen) for trains, frozen in (sizes["llm"], sizes["vision"]))
    flops = (2 + of_llm) * linear + 3 * attention + (2 + of_tower if of_tower else 1) * tower
    if not llm.remat:
        return flops, 0.0
    keeps = getattr(llm, "remat_keeps", "attention") == "attention"
    return flops, linear + (0.0 if keeps else attention) + 2 * tower * (of_tower > 0)


def _exposed(
    experiment: Experiment, topology: Topology, mesh: MeshConfig, shape: Shape, load: _Load, training: bool,
    compute_s: float,
) -> float:  # fmt: skip
    """Seconds of travel that compute does not hide."""
    llm, chip, times = experiment.model.llm, topology.chip, 3 if training else 1
    steps, wide_link = mesh.sequence - 1, chip.link * chip.links
    sent = 4.0 * load.tokens * load.kv / mesh.tensor
    exposed = 0.0
    if load.strategy == "ring":
        hop_s = 2.0 * load.tokens**2 * load.heads / mesh.tensor / (chip.peak * EFFICIENCY)
        exposed = steps * llm.num_layers * max(0.0, sent / chip.link - hop_s) * times
    elif load.strategy in ("gather", "usp"):
        exposed = llm.num_layers * steps * sent / wide_link * times
    # Weights of the next layer come while this one computes; what is slower than its compute shows.
    away = 1 - mesh.tensor / load.shards
    exposed += llm.num_layers * max(0.0, times * 2.0 * load.layer * away / wide_link - compute_s / llm.num_layers)
    film = shape.clips * experiment.model.geometry().tokens_per_clip * llm.embed_dim * 2.0 * load.rows
    film *= (2 if training else 1) * steps / mesh.sequence  # visual tokens on their way home, and their gradient back
    return exposed + film / chip.link


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
