"""How large the demo is. Data, not code."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: a file of configs/, what is read, and what is tuned."""

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
    film_s: int  # the long film of the first question, at one frame a second
    lengths: tuple[int, ...]  # of the needle test, in seconds and frames
    depths: tuple[float, ...]
    repeats: int  # films of each length and depth; each is asked two questions
    compare_s: int  # films that measure video-level compression
    compare_films: int
    merge_s: int  # films that measure clip-level merging on and off
    merge_films: int
    control_s: int  # films of the negative controls
    control_films: int
