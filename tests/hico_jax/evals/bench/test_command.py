"""`hico eval` end to end: a tiny model on official-format files of every benchmark, and mistakes in one line."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from hico_jax import cli
from hico_jax.evals.bench import runner, tasks
from tests.parrot import Parrot

ROOT = pathlib.Path(__file__).resolve().parents[4]


def line(name: str, model: pathlib.Path, official: Any, out: pathlib.Path, *more: str) -> list[str]:
    paths = [word for key, value in official[name].items() for word in (f"--{key}", value)]
    return ["eval", name, "--model", str(model), *paths, "--out", str(out), "--max-frames", "8", *more]


@pytest.mark.parametrize("name", ["mvbench"])
def test_a_model_is_scored(
    name: str, exported: pathlib.Path, official: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(name, exported, official, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tasks.BENCHMARKS))
def test_a_model_is_scored_on_every_benchmark(
    name: str, exported: pathlib.Path, official: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(name, exported, official, tmp_path, capsys)


@pytest.mark.parametrize("name", list(tasks.BENCHMARKS))
def test_every_benchmark_is_reported(
    name: str,
    exported: pathlib.Path,
    official: Any,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything but the model itself, whose programs take a while to compile."""
    monkeypatch.setattr(runner, "ModelAnswerer", lambda *_, **__: Parrot())
    scored(name, exported, official, tmp_path, capsys)


def scored(name: str, exported: pathlib.Path, official: Any, tmp_path: pathlib.Path, capsys: Any) -> None:
    assert cli.main(line(name, exported, official, tmp_path, "--limit", "2")) == cli.OK
    out = capsys.readouterr().out
    assert "reference" in out
    assert "strict" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["counts"].get("answered", 0) + summary["counts"].get("empty", 0) == summary["number"]
    assert summary["card"]["max_frames"] == 8
    assert summary["card"]["prompt"] == "as the reference's harness, byte for byte"
    assert len(summary["environment"]["commit"]) >= 7
    for rule in ("reference", "strict"):
        score = summary[rule]["score"]
        assert 0 <= score["low"] <= (score["share"] or 0) <= score["high"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert tasks.BENCHMARKS[name].title in page
    table = (tmp_path / "report.md").read_text()
    assert "| questions | reference matcher | strict matcher |" in table


def test_the_same_command_asks_nothing_twice(
    exported: pathlib.Path,
    official: Any,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "ModelAnswerer", lambda *_, **__: Parrot())
    for shard in ("0/2", "1/2"):
        assert cli.main(line("mlvu", exported, official, tmp_path, "--shard", shard)) == cli.OK
        said = capsys.readouterr().out
        assert ("questions are left to the other shares" in said) == (shard == "0/2")
    files = {p: p.read_bytes() for p in tmp_path.glob("answers.*.jsonl")}
    assert len(files) == 2
    assert cli.main(line("mlvu", exported, official, tmp_path)) == cli.OK
    assert all(p.read_bytes() == content for p, content in files.items())
    capsys.readouterr()
    assert cli.main(line("mlvu", exported, official, tmp_path, "--drop", "uniform:1:1,0.5")) == cli.MISUSED
    assert "made with other settings: drop" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["video-mme", "--annotations", "{o}"], "did you mean videomme?"),
        (["zzz", "--annotations", "{o}"], "known are mvbench"),
        (["mvbench", "--annotations", "{o}/gone"], "gone"),
        (["mvbench", "--annotations", "{o}", "--videos", "{o}/gone"], "no such folder of videos"),
    ],
)
def test_mistakes(
    arguments: list[str], words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    given = [a.format(o=tmp_path) for a in arguments]
    assert cli.main(["eval", *given, "--model", str(tmp_path)]) == cli.MISUSED
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_no_video_at_all(official: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--annotations", official["mlvu"]["annotations"], "--videos", str(tmp_path)]
    assert cli.main(["eval", "mlvu", "--model", str(tmp_path), *where]) == cli.MISUSED
    assert "none of the videos is there" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_twenty_times_it_reports_the_same(
    exported: pathlib.Path, official: Any, tmp_path: pathlib.Path
) -> None:  # fmt: skip
    """SIGKILL at random moments, from importing to writing."""

    def start(out: pathlib.Path) -> subprocess.Popen[bytes]:
        arguments = line("mvbench", exported, official, out)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen([sys.executable, "-m", "hico_jax", *arguments], cwd=ROOT, env=environment)

    assert start(tmp_path / "cold").wait() == 0  # compiles, which later runs need not
    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    lasted = time.monotonic() - began
    rng, kills = np.random.default_rng(0), 0
    while kills < 20:
        process = start(tmp_path / "parts")
        time.sleep(float(rng.uniform(0.2, 0.9)) * lasted)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "parts" / "summary.json").is_file():  # it had finished: take some answers away and go on
            (path,) = (tmp_path / "parts").glob("answers.*.jsonl")
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: int(rng.integers(0, 6))]))
            (tmp_path / "parts" / "summary.json").unlink()
    assert start(tmp_path / "parts").wait() == 0
    whole, parts = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "parts"))
    for found in (whole, parts):
        del found["environment"]
    assert whole == parts
