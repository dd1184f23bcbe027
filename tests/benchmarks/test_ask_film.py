"""A film's minute repeated, and the parts measured."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import ask_film
from data_pipeline import video


def test_a_short_film_is_measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ask.json"
    assert ask_film.main(["--seconds", "8", "--size", "96x64", "--variant", "tiny", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["frames"] == 8
    assert found["watch_s"] > 0
    monkeypatch.setattr(ask_film, "ONCE", 2)
    assert video.open_video(ask_film.repeated(tmp_path, 6, "96x64")).num_frames == 6 * ask_film.FPS
