"""The host's benchmark in a short form: it runs, and both ways give the same pixels."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import host


def test_a_pass_over_a_short_film(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "host.json"
    assert host.main(["--seconds", "2", "--repeats", "1", "--size", "160x96", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [r["film"] for r in rows] == list(host.STRUCTURES)
    assert all(r["same"] and r["ours"] > 0 and r["ratio"] > 0 for r in rows)
    assert "| usual |" in capsys.readouterr().out
