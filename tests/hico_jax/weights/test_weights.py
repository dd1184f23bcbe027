"""What ships: found by name, small enough, whole, and right about films it never saw."""

from __future__ import annotations

import json
import pathlib

import pytest

import hico_jax
from data_pipeline.tokenizer import load_tokenizer
from hico_jax import weights
from hico_jax.convert import export, hf_config, load
from hico_jax.demo.measure import WHOLE
from hico_jax.evals import needle
from hico_jax.film import Viewer
from hico_jax.generate import GenerationConfig

SIZE = 40_000_000  # bytes, everything together
FILMS = ((0.1, 91_001), (0.5, 91_002), (0.9, 91_003))  # depth and seed; each film has two questions
RIGHT = 5  # of the six

there = pytest.mark.skipif(not weights.shipped("nano"), reason="the weights of nano are not in this copy of the source")


def test_a_folder_of_the_same_name_wins(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "shipped", lambda name: True)
    (tmp_path / "nano").mkdir()
    assert weights.find("nano") == weights.folder("nano")  # it holds no model
    (tmp_path / "nano" / "config.json").write_text("{}")
    assert weights.find("nano") == pathlib.Path("nano")
    assert weights.find(tmp_path / "other") == tmp_path / "other"


def test_weights_that_are_not_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "folder", lambda name: tmp_path / "gone")
    with pytest.raises(ValueError, match=r"^the weights of nano are not in .*gone; get the whole repository"):
        hico_jax.load("nano")


def test_an_unknown_name_hears_what_ships() -> None:
    with pytest.raises(ValueError, match=r"name a shipped model \(nano\)"):
        hico_jax.load("nanno")
    with pytest.raises(ValueError, match=r"name a shipped model \(nano\)"):
        load.read_config(pathlib.Path("nanno"))


@there
def test_what_ships_is_small_and_fits_together() -> None:
    folder = weights.folder("nano")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= SIZE
    raw = json.loads((folder / "config.json").read_text())
    config = hf_config.from_raw(raw, folder.name)
    words = load_tokenizer(folder)
    assert words.vocab_size <= config.llm.vocab_size
    assert (folder / export.GENERATION).read_text() == export.generation_text(words.eos_ids)
    assert config.geometry().tokens_per_clip == 16 * config.vision.frames_per_clip
    load.load(folder)  # every tensor that the configuration describes is there, and no other
    assert "<FIGURE" not in (folder / "MODEL_CARD.md").read_text()


@there
def test_it_answers_about_films_it_never_saw(tmp_path: pathlib.Path) -> None:
    model = hico_jax.load("nano")
    assert model.eos == model.tokenizer.eos_ids
    viewer = Viewer(model.hico, model.tokenizer, sampling=WHOLE, clips_per_step=4)
    asked = []
    for depth, seed in FILMS:
        hidden = needle.hide(tmp_path, 16, depth, seed)
        seen = viewer.watch(hidden.film.path)
        asked += [(seen, q) for q in hidden.film.questions if q.kind in ("card_colour", "card_shape")]
    assert len(asked) == 2 * len(FILMS)
    settings = GenerationConfig(max_new_tokens=needle.MAX_NEW_TOKENS, eos=viewer.tokenizer.eos_ids)
    answers = viewer.ask_many([seen for seen, _ in asked], [q.text for _, q in asked], config=settings)
    wrong = [
        f"{q.text} {a.text}, not {q.answer}" for (_, q), a in zip(asked, answers, strict=True) if a.text != q.answer
    ]
    assert len(wrong) <= len(asked) - RIGHT, wrong
