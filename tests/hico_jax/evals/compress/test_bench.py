"""`hico bench`: the table and what becomes of lines that cannot be made; the timing itself is tested beside it."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

from data_pipeline.tokenizer import Tokenizer
from hico_jax import cli
from hico_jax.convert import export
from hico_jax.evals.compress import bench
from hico_jax.models.hico import HiCo


@pytest.fixture(scope="module")
def model(asked_model: HiCo, words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    file = words.save(folder / "tokenizer")  # type: ignore[attr-defined]
    return str(export.export(asked_model, folder / "weights", files=[file]))


def test_a_table_goes_on_where_it_stopped(
    model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments[1:5])
        if arguments[2] == 12:
            return {"failed": "exit code 137: killed"}
        return dict.fromkeys(bench.STEPS, 0.5) | {"prefill_mib": 3.0, "peak_mib": {"host": 100.0}}

    monkeypatch.setattr(bench, "_run", run)
    line = ["bench", "--model", model, "--out", str(tmp_path), "--frames", "8,14,64", "--max-tokens", "100"]
    assert cli.main(line) == cli.OK
    out = capsys.readouterr().out
    assert "| 64 | off | 256 | 256 tokens are more than --max-tokens 100 |" in out
    assert "| 12 | off | 48 | exit code 137: killed |" in out
    assert out.count("| 3 | 0.5") == 0
    assert "| 8 | clip level | 8 | 0.5 |" in out
    assert len(asked) == 8  # three ways for 8 and 12 frames, two for 64
    drops = {a[3] for a in asked}
    assert drops == {"", "uniform0_attention:1,2:1,0.5,0.25"}
    assert cli.main(line) == cli.OK
    assert len(asked) == 8
    assert "<svg" in (tmp_path / "bench.html").read_text()
    assert json.loads((tmp_path / "bench.0.jsonl").read_text().splitlines()[0])["frames"] == 8


def test_schedules_fit_any_depth() -> None:
    assert bench.default_drop(28) == "uniform0_attention:4,18:1,0.5,0.25"
    assert bench.default_drop(4) == "uniform0_attention:1,2:1,0.5,0.25"


def test_a_process_that_fails_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    assert bench._run("m", "f", 4, "merge", "", 0) == {"failed": "exit code 3: out of memory"}
    path.write_text("#!/bin/sh\nexec sleep 5\n")
    assert bench._run("m", "f", 4, "merge", "", 0.2) == {"failed": "not done after 0.2 s"}


def test_a_drop_that_does_not_read(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--model", model, "--drop", "half"]) == cli.MISUSED
    assert "does not read as KIND:LAYERS:RATIOS" in capsys.readouterr().err
