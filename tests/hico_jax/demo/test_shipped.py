"""The first act of the demo, with a tiny model in the place of the one that ships."""

from __future__ import annotations

import argparse
import json
import pathlib

import pytest

from hico_jax import ask, demo, weights
from hico_jax.demo import shipped
from hico_jax.film import Viewer


def test_a_film_its_answers_and_a_page(
    viewer: Viewer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ask, "load_model", lambda name: (viewer.model, tmp_path))
    monkeypatch.setattr(shipped, "load_tokenizer", lambda folder: viewer.tokenizer)
    monkeypatch.setattr(shipped, "SECONDS", 24)
    result = shipped.first_answer(tmp_path, 0, 0.0)
    said = capsys.readouterr().out
    colour, shape = result["card"].split()
    assert [t["expected"] for t in result["trials"]] == [colour, shape]
    assert f"truth     {colour}" in said
    assert result["frames"] == 24
    assert json.loads((tmp_path / "answers.json").read_text()) == result
    assert "What shape is on the card?" in (tmp_path / "report.html").read_text()


def test_another_film_in_the_same_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled and what a user put there stays, until --fresh."""
    asked: list[int] = []
    monkeypatch.setattr(weights, "shipped", lambda name: True)
    monkeypatch.setattr(shipped, "first_answer", lambda out, seed, began: asked.append(seed))
    notes = tmp_path / "demo" / "notes.txt"
    for seed, fresh, there in ((0, False, True), (1, False, True), (1, True, False)):
        args = argparse.Namespace(out=str(tmp_path / "demo"), train=False, quick=False, fresh=fresh, seed=seed)
        assert demo.main(args) == 0
        if seed == 0:
            notes.write_text("mine")
        assert notes.is_file() == there
        assert demo.held(tmp_path / "demo") == {"size": "shipped", "seed": seed}
    assert asked == [0, 1, 1]


def test_a_training_demo_is_left_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "shipped", lambda name: True)
    demo.prepare(tmp_path, {"size": "full", "seed": 0}, fresh=False)
    (tmp_path / "model").mkdir()
    args = argparse.Namespace(out=str(tmp_path), train=False, quick=False, fresh=True, seed=0)
    with pytest.raises(ValueError, match="a demo with other settings"):
        demo.main(args)
    assert (tmp_path / "model").is_dir()
