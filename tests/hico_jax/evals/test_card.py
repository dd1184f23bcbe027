"""What a protocol card holds."""

from __future__ import annotations

import hashlib
import pathlib

from data_pipeline.frames import Sampling
from hico_jax.evals import card
from hico_jax.models.hico import HiCo


def test_a_card_names_what_a_score_depends_on(asked_model: HiCo) -> None:
    found = card.model(asked_model, "weights")
    assert found["compressor"]["arch"] == "tome"
    assert (found["tokens_per_frame"], found["dtype"], found["image_px"]) == (1.0, "float32", 32)
    assert found["parameters"] > 10_000
    assert card.sampling(Sampling("fps2", 4, 8, 4)) == {
        "sample": "fps2", "min_frames": 4, "max_frames": 8, "multiple": 4,
    }  # fmt: skip


def test_the_environment_and_memory() -> None:
    found = card.environment()
    assert found["jax"][0].isdigit()
    assert "cpu" in found["devices"]
    assert card.peak_memory_mib()["host"] > 50


def test_a_digest_follows_the_bytes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    assert card.digest([tmp_path / "a"]) == hashlib.sha256(b"one").hexdigest()[:16]
