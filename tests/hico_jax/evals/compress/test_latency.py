"""The steps of one film, timed in this process with a tiny model."""

from __future__ import annotations

import pathlib

import numpy as np

from data_pipeline import video
from data_pipeline.tokenizer import Tokenizer
from hico_jax import film
from hico_jax.evals.compress import latency
from hico_jax.models.hico import HiCo


def test_every_step_is_timed(asked_model: HiCo, words: Tokenizer, noise_film: pathlib.Path) -> None:
    found = latency.measure(asked_model, words, str(noise_film), 12)
    for step in ("read", "vision", "merge", "project", "prefill", "decode"):
        assert found[step] > 0, step
    assert found["visual_tokens"] == 12
    assert found["prefill_mib"] > 0
    assert found["cache_mib"] > 0


def test_the_steps_together_are_what_the_model_does(asked_model: HiCo, noise_film: pathlib.Path) -> None:
    """Tower, compressor and projector one by one give what `encode` gives."""
    frames = np.concatenate(list(video.iter_frames(noise_film, np.arange(8), (32, 32))))
    clips = frames.reshape(2, 4, 32, 32, 3)
    steps = latency.project(asked_model, latency.merge(asked_model, latency.see(asked_model, clips)))
    whole = film.encode(asked_model, clips[None], np.zeros((1, 0, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(steps.reshape(1, 8, -1), whole, atol=1e-5)
