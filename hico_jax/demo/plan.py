"""How large the demo is. Data, not code.

The four stages of the recipe in miniature, short before long: captions with the projector alone, then questions about
pictures, about short films, about longer ones, and last a higher resolution. Every batch of a stage has one shape, so
each stage is compiled once.

Films are asked of the model after stage 3 (as the released models of 224 pixels are); the few steps of stage 4 that
minutes allow do not win back what the new resolution costs a tower this small, and the report shows by how much.

In: nothing. Out: `FULL` and `QUICK`.
Next: hico_jax/demo/training.py
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run: a file of configs/, what is read, and what is tuned."""

    name: str
    config: str  # configs/NAME.py
    annotations: str  # YAML of the world
    steps: int
    tune: tuple[str, ...] = ()  # further --config.KEY=VALUE
    kill_at: int | None = None  # SIGKILL once this step is written, then the same command again


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of one demo."""

    name: str
    promise: str
    preset: str  # of data_pipeline.world
    stages: tuple[Stage, ...]
    asked: str  # the stage whose model answers
    film_s: int  # the long film of the first question, at one frame a second
    lengths: tuple[int, ...]  # of the needle test, in seconds and frames
    depths: tuple[float, ...]
    repeats: int  # films of each length and depth; each is asked two questions
    compare_s: int  # films that measure video-level compression
    compare_films: int
    drops: tuple[tuple[str, float], ...]  # ways of dropping beside none, and the share that stays after two layers
    merge_s: int  # films that measure clip-level merging on and off, and the export
    merge_films: int
    control_s: int  # films of the negative controls
    control_films: int
    unseen_films: int  # films whose card has a pair of colour and shape that training never showed
    stage_films: int  # films that compare the model that answers with that of the last stage


def shape(length: int, clips: int, tiles: int) -> tuple[str, ...]:
    """One shape for every batch: tokens of a row, clips of four frames, image tiles."""
    return (f"data.length_buckets=({length},)", f"data.clip_buckets=({clips},)", f"data.tile_buckets=({tiles},)")


_TOWER_AT_REST = "optim.rates=(('vision/.*', None), ('.*', 'lr'))"


def _stages(*, pictures: int, rows: int, short: int, long: int, high: int, kill_at: int) -> tuple[Stage, ...]:
    quiet = "train.num_samples=0"  # compiling an answer costs as long as ten steps
    stages = (
        Stage("stage1", "stage1_align", "stage1.yaml", 20, (quiet, *shape(48, 1, 1))),
        Stage(
            "stage2", "stage2_pretrain", "images.yaml", pictures, (quiet, f"data.batch_size={rows}", *shape(80, 0, 1))
        ),
        Stage(
            "stage3", "stage3_sft", "short.yaml", short, (quiet, "data.batch_size=12", *shape(136, 3, 0)), kill_at
        ),
        Stage(
            "stage3_long", "stage3_sft", "long.yaml", long,
            (  # two rows at a time: their buffers stay in the processor's caches
                quiet, "data.batch_size=8", "optim.accumulate=4", "data.max_frames=128", "optim.lr=3e-4",
                _TOWER_AT_REST, *shape(608, 32, 0),
            ),
        ),
        Stage(
            "stage4", "stage4_highres", "short.yaml", high,
            (quiet, "data.batch_size=12", "optim.lr=1e-3", *shape(136, 3, 0)),
        ),
    )  # fmt: skip
    return tuple(stage for stage in stages if stage.steps)


FULL = Plan(
    name="full",
    promise="no weights, no accelerator, about ten minutes on two cores",
    preset="nano",
    stages=_stages(pictures=120, rows=24, short=400, long=40, high=20, kill_at=120),
    asked="stage3_long",
    film_s=1200,
    lengths=(64, 128, 256, 512, 1024),
    depths=(0.0, 0.25, 0.5, 0.75, 1.0),
    repeats=2,
    compare_s=256,
    compare_films=12,
    drops=(("attention", 0.5), ("attention", 0.1), ("uniform", 0.1), ("uniform", 0.0)),
    merge_s=64,
    merge_films=8,
    control_s=128,
    control_films=12,
    unseen_films=12,
    stage_films=8,
)

QUICK = Plan(
    name="quick",
    promise="no weights, no accelerator, about three minutes on two cores; the full demo scores higher",
    preset="quick",
    stages=_stages(pictures=100, rows=12, short=100, long=0, high=6, kill_at=50),
    asked="stage3",
    film_s=256,
    lengths=(64, 128, 256),
    depths=(0.0, 0.5, 1.0),
    repeats=1,
    compare_s=64,
    compare_films=4,
    drops=(("attention", 0.1), ("uniform", 0.0)),
    merge_s=64,
    merge_films=4,
    control_s=64,
    control_films=4,
    unseen_films=4,
    stage_films=4,
)
