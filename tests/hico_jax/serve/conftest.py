"""A tiny model with a tokenizer, films that differ, and settings that end soon."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from data_pipeline import video
from data_pipeline.frames import Sampling
from data_pipeline.tokenizer import Tokenizer
from hico_jax import ask
from hico_jax.api import Model
from hico_jax.batch import DropSchedule
from hico_jax.film import Viewer
from hico_jax.generate import NO_DROP
from hico_jax.models.hico import HiCo

GUIDED = DropSchedule("uniform0_attention", (1, 2), (1.0, 0.6, 0.3))


@pytest.fixture(scope="session")
def make_model(asked_model: HiCo, words: Tokenizer) -> Callable[..., Model]:
    """The tiny model of `tests/hico_jax/conftest.py` under a schedule of the drop."""
    made: dict[DropSchedule, Model] = {}

    def make(drop: DropSchedule = NO_DROP) -> Model:
        if drop not in made:
            model = Model(ask.with_drop(asked_model, drop))
            viewer = Viewer(model.hico, words, sampling=Sampling("dynamic_fps1", 8, 16, 4), clips_per_step=2)
            model.__dict__ |= {"tokenizer": words, "viewer": viewer}
            made[drop] = model
        return made[drop]

    return make


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Twelve, eight and sixteen seconds of coloured squares, no two alike."""
    folder = tmp_path_factory.mktemp("films")
    made = []
    for seed, seconds in ((1, 12), (2, 8), (3, 16)):
        colours = np.random.default_rng(seed).integers(0, 256, (seconds, 4, 4, 3), dtype=np.uint8)
        made.append(video.write_video(folder / f"{seed}.mp4", colours.repeat(16, 1).repeat(16, 2), 1.0))
    return made
