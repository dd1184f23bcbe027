"""Compressors put into a trained model, at the same number of tokens a frame where they can have it.

None has parameters, so the same weights serve all; a model trained with another one would do better with it. Dropping
inside the language model (FastV, PyramidDrop) starts from every patch and ends with the same number.

In: a model. Out: `Method`s.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.batch import DropSchedule
from hico_jax.models.compress.keep import KeepConfig
from hico_jax.models.compress.pick import PickConfig
from hico_jax.models.compress.pool import PoolConfig
from hico_jax.models.compress.tome import ToMeConfig
from hico_jax.models.hico import HiCo

ROOM = 1 << 20  # rows may be as long as they get: every patch of a long film


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to compress, and what to call it."""

    name: str
    title: str
    compressor: Any
    drop: DropSchedule = dataclasses.field(default_factory=DropSchedule)
    control: bool = False
    shown: str = "film"  # or what a control is shown instead, one of `runner.SHOWN`


def patches_per_frame(model: HiCo) -> int:
    """What the tower gives of each frame of a clip."""
    config = model.config.vision
    clip = jax.ShapeDtypeStruct(
        (1, config.frames_per_clip, config.image_px, config.image_px, 3), jnp.dtype(model.config.dtype)
    )
    return jax.eval_shape(lambda m, c: m.vision(c), model, clip).shape[1] // config.frames_per_clip


def usual_schedule(layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """A quarter of the tokens left after two thirds of the layers, as the paper's two stages in shape."""
    first = max(1, layers // 7)
    return (first, max(first + 1, layers * 9 // 14)), (1.0, 0.5, 0.25)


def schedule_of(model: HiCo) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Layers and ratios of the video level: the model's own, or the usual ones."""
    own = model.config.drop
    return (own.layers, own.ratios) if own.num_stages else usual_schedule(model.config.llm.num_layers)


def methods(
    model: HiCo,
    tokens_per_frame: int | None = None,
    schedule: tuple[tuple[int, ...], tuple[float, ...]] | None = None,
) -> list[Method]:
    """All of them, merging first. `schedule` has layers and ratios of the video level (`schedule_of`).

    Raises:
      ValueError: more tokens than the tower gives patches.
    """
    own, patches, layers = model.config.compressor, patches_per_frame(model), model.config.llm.num_layers
    kept = own.tokens_per_frame if tokens_per_frame is None else tokens_per_frame
    if not 1 <= kept <= patches:
        raise ValueError(f"--tokens-per-frame is {kept}; the tower gives {patches} patches of a frame")
    image = own.tokens_per_image
    square = math.isqrt(patches)
    while square * square > kept and square > 1 and (-(-square // 2)) ** 2 >= kept:
        square = -(-square // 2)
    share = kept / patches
    stages = sorted({max(1, layers * i // 4) for i in (1, 2, 3)})
    everything = KeepConfig(patches, patches)
    deep = min(2, layers - 1)
    merged = ToMeConfig(kept, image)
    stages_of, ratios = schedule or schedule_of(model)
    video = f"{', '.join(f'{r:g}' for r in ratios[1:])} left after layers {', '.join(map(str, stages_of))}"
    return [
        Method("merge", "token merging (HiCo)", merged),
        Method("merge-frame", "token merging without time", ToMeConfig(kept, image, scope="frame")),
        Method("pool", "average pooling", PoolConfig(kept, image)),
        Method("pool-time", "average pooling over time", PoolConfig(kept, image, "time")),
        Method("pool-2x2", "spatial 2x2 pooling", PoolConfig(square * square, square * square, "2x2")),
        Method("even", "uniform sampling", PickConfig(kept, image)),
        Method("salient", "selection, VisionZip style", PickConfig(kept, image, "salient")),
        Method("novel", "selection, DyCoke style", PickConfig(kept, image, "novel")),
        Method("fastv", f"all patches, attention drop after layer {deep} (FastV style)", everything,
               DropSchedule("attention", (deep,), (1.0, share))),
        Method("pyramid", f"all patches, attention drop after layers {', '.join(map(str, stages))} (PyramidDrop style)",
               everything, DropSchedule("attention", tuple(stages),
                                        (1.0, *(share ** ((i + 1) / len(stages)) for i in range(len(stages)))))),
        Method("none", "no compression", everything),
        Method("drop-uniform", f"merging, uniform drop: {video}", merged, DropSchedule("uniform", stages_of, ratios)),
        Method("drop-attention", f"merging, attention drop: {video}", merged,
               DropSchedule("attention", stages_of, ratios)),
        Method("drop-paper", f"merging, uniform then attention drop: {video}", merged,
               DropSchedule("uniform0_attention", stages_of, ratios)),
        Method("drop-all", f"control: every visual token dropped after layer {deep}", merged,
               DropSchedule("uniform", (deep,), (1.0, 0.0)), control=True),
        Method("shuffled", "control: the frames shuffled", merged, control=True, shown="shuffled"),
        Method("blank", "control: grey frames", merged, control=True, shown="blank"),
        Method("blind", "control: the questions without the video", merged, control=True, shown="nothing"),
    ]  # fmt: skip


def apply(model: HiCo, method: Method) -> HiCo:
    """The same weights under another compressor and drop.

    Raises:
      ValueError: the compressor cannot make its tokens of this tower's patches.
    """
    settings = dataclasses.replace(
        model.config, compressor=method.compressor, drop=method.drop, max_length=max(ROOM, model.config.max_length)
    )
    graph, _ = nnx.split(nnx.eval_shape(lambda: settings.build(rngs=nnx.Rngs(params=0))))
    made = nnx.merge(graph, nnx.state(model))
    px, frames = settings.vision.image_px, settings.vision.frames_per_clip
    clip = jax.ShapeDtypeStruct((1, 1, frames, px, px, 3), np.uint8)
    jax.eval_shape(lambda m, c: m.encode(c, jnp.zeros((1, 0, px, px, 3), jnp.uint8)), made, clip)
    return made


def tokens_by_layer(method: Method, layers: int) -> tuple[float, float]:
    """Visual tokens a frame at the language model's input, and their mean over its layers."""
    first = 0 if method.shown == "nothing" else method.compressor.tokens_per_frame
    bounds = (0, *(method.drop.layers if method.drop.num_stages else ()), layers)
    ratios = method.drop.ratios if method.drop.num_stages else (1.0,)
    total = sum((b - a) * r for a, b, r in zip(bounds, bounds[1:], ratios, strict=False))
    return float(first), first * total / layers
