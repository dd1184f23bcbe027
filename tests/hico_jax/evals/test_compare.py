"""`hico compare` on folders as the commands leave them, and mistakes in one line."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from hico_jax import cli


def folder(path: pathlib.Path, lines: Sequence[dict[str, Any]], name: str = "trials", **settings: Any) -> str:
    path.mkdir(parents=True)
    (path / f"{name}.0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "settings.json").write_text(json.dumps(settings))
    return str(path)


def trial(i: int, right: bool, frames: int = 64) -> dict[str, Any]:
    return {
        "id": f"pixel/{frames}/0.5/n{i}", "insertion": "pixel", "frames": frames, "depth": 0.5, "needle": f"n{i}",
        "asked": "colour", "expected": "red", "forced": right, "generated": True,
    }  # fmt: skip


def test_needles(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [trial(i, True, f) for i in range(30) for f in (64, 128)]
    second = [trial(i, i % 3 > 0 or f == 64, f) for i in range(29) for f in (64, 128)]
    a = folder(tmp_path / "a", first, drop="attention", model="m")
    b = folder(tmp_path / "b", second, drop="uniform", model="m")
    assert cli.main(["compare", a, b, "--json", str(tmp_path / "found.json")]) == cli.OK
    out = capsys.readouterr().out
    assert "58 questions that both answered\n  drop: 'attention', 'uniform'\n  2 questions that only one" in out
    assert "| pixel, 64 frames | 29 | +0.0 (" in out
    found = json.loads((tmp_path / "found.json").read_text())
    by = found["differences"]
    assert list(by) == ["all", "pixel, 64 frames", "pixel, 128 frames"]
    assert by["pixel, 128 frames"]["forced"]["difference"] == pytest.approx(10 / 29)
    assert by["pixel, 128 frames"]["forced"]["low"] > 0
    assert by["all"]["forced"]["films"] == 29
    assert by["all"]["generated"]["better"] == 0
    assert found["settings"] == {"drop": ["attention", "uniform"]}


def test_answers_of_two_methods(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(name: str, task: str, score: float) -> dict[str, Any]:
        return {
            "id": name, "groups": {"task": task}, "video": "v", "expected": "A", "strict": {"score": score},
            "reference": {"score": 0.0},
        }  # fmt: skip

    a = folder(tmp_path / "c" / "merge", [answer("x", "order", 1.0), answer("y", "count", 1.0)], "answers")
    b = folder(tmp_path / "c" / "pool", [answer("x", "order", 0.0), answer("y", "count", 1.0)], "answers")
    assert cli.main(["compare", a, b]) == cli.OK
    out = capsys.readouterr().out
    assert "| order | 1 | +100.0 (" in out
    assert "| count | 1 | +0.0 (" in out


def test_mistakes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", [trial(0, True)])
    other = folder(tmp_path / "b", [trial(0, True) | {"expected": "blue"}])
    third = folder(tmp_path / "c", [trial(1, True)])
    kind = folder(tmp_path / "d", [], "answers")
    (tmp_path / "e").mkdir()
    for second, expected in (
        (other, "expects 'red' in one and 'blue' in the other"),
        (third, "no question in common"),
        (kind, "holds trials but"),
        (str(tmp_path / "e"), "holds no answers"),
    ):
        assert cli.main(["compare", a, second]) == cli.MISUSED
        err = capsys.readouterr().err
        assert expected in err
        assert err.count("\n") == 1
