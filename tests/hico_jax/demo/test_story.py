"""The page of a demo from results made by hand: every number that matters is on it."""

from __future__ import annotations

import copy
import html
import pathlib
import re
from typing import Any

import pytest
from PIL import Image

from hico_jax.demo import plan, story


def summary(asked: int = 4, right: int = 3) -> dict[str, Any]:
    return {"asked": asked, "right": right, "share": right / asked, "low": 0.3, "high": 0.95}


def counted(**changes: Any) -> dict[str, Any]:
    return {"by_kind": {"card_colour": summary(), "card_shape": summary(4, 1)}, "total": summary(8, 4)} | changes


def trial(answer: str, correct: bool) -> dict[str, Any]:
    return {
        "seconds": 64, "frames": 64, "depth": 0.62, "kind": "card_colour", "question": "Which colour?",
        "expected": "teal", "answer": answer, "correct": correct, "visual_tokens": 256, "answer_s": 0.2,
    }  # fmt: skip


def stage(name: str) -> dict[str, Any]:
    return {
        "name": name, "steps": 4, "seconds": 12.0, "compile_s": 3.0, "loss": [4.5, 3.0, 2.0, 1.25],
        "accuracy": [0.1, 0.2, 0.3, 0.9], "command": f"hico train {name}",
    }  # fmt: skip


RESULTS: dict[str, Any] = {
    "world": {"media": 3, "items": 9, "held_out": []},
    "train": {
        "stages": [stage("three"), stage("four")],
        "resume": {
            "stage": "three", "killed_after": 3, "resumed_from": 2, "steps_run_twice": 1, "identical": True,
            "losses": [[3, 2.0000001, 2.0000001]],
        },
    },
    "ask": {
        "trials": [trial("teal", True), trial("<b>mauve", False)], "card": "teal star", "card_s": [37.0, 41.0],
        "film_s": 64.0, "frames": 64, "first_s": 3.0, "again_s": 0.5, "read_s": 0.2, "encode_s": 0.3, "patches": 1024,
        "kept": {
            "question": "Which colour?", "schedule": "attention, 25% after layer 2", "share": [0.25] * 16, "kept": 64,
            "of": 256,
        },
    },
    "needle": counted(
        lengths=[16, 64], depths=[0.0, 1.0], grid=[[1.0, 0.5], [0.0, None]], trials=[], unseen=counted(seconds=16),
        stages={"three": counted(px=16), "four": counted(px=24), "seconds": 16},
    ),
    "compression": {
        "video_level": [counted(name="off", kept=1.0, visual_tokens=256, seconds=0.5)],
        "clip_level": [counted(name="merged", kept=None, visual_tokens=64, seconds=0.5)],
        "seconds": [64, 16],
    },
    "controls": {n: counted() for n in ("film", "blank", "no film", "order", "order shuffled")} | {"seconds": 16},
    "export": {
        "folder": "out/model", "files": ["config.json", "model.safetensors"], "bytes": 4_200_000, "weights_equal": True,
        "asked": 6, "same": 6,
    },
}  # fmt: skip
SECONDS = {"world": 2.0, "train": 60.0}


@pytest.fixture
def out(tmp_path: pathlib.Path) -> pathlib.Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "film.png")
    return tmp_path


def text_of(out: pathlib.Path, results: dict[str, Any]) -> str:
    story.write(out, plan.QUICK, results, SECONDS)
    page = (out / "report.html").read_text()
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def test_the_page_holds_the_numbers(out: pathlib.Path) -> None:
    text = text_of(out, RESULTS)
    for words in (
        "50.0 %",  # needle questions right
        "4x",  # fewer tokens than patches
        "1 min 02 s",
        "teal star",
        "identical to the last bit",
        "every weight is equal",
        "6 of 6 answers are the same",
        "unseen pair",
        "24 px",
        "card left out",
        "What this does not show",
    ):
        assert words in text, words
    assert "<b>mauve" not in (out / "report.html").read_text()  # an answer is text, not markup
    assert "<b>mauve" in text


def test_failures_are_told(out: pathlib.Path) -> None:
    results = copy.deepcopy(RESULTS)
    results["train"]["resume"]["identical"] = False
    results["export"] |= {"weights_equal": False, "same": 5}
    text = text_of(out, results)
    assert "NOT identical" in text
    assert "weights DIFFER" in text
    assert "5 of 6 answers" in text


def test_the_last_lines_say_what_to_do_next(out: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    story.tell(out, RESULTS, 62.0)
    said = capsys.readouterr().out
    assert "4/8 right" in said
    assert f'hico ask {out / "film.mp4"} "Which colour?" --model {out / "model"} --max-frames 64' in said


def test_smoothing_keeps_the_ends() -> None:
    assert story.smooth([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    assert story.smooth([0.0, 3.0, 6.0], width=3) == [1.5, 3.0, 4.5]


def test_minutes() -> None:
    assert story.clock(125.7) == "2 min 05 s"
