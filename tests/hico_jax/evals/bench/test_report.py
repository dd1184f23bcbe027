"""The page and the table: every score, every oddity, frames; nothing from outside becomes markup."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from hico_jax.evals import journal
from hico_jax.evals.bench import report, runner, scores, tasks
from hico_jax.report import page
from tests.parrot import Parrot


def test_a_page_tells_it_all(items: Any, tmp_path: pathlib.Path) -> None:
    benchmark = tasks.BENCHMARKS["videomme"]
    first, *rest = items("videomme")
    asked = [dataclasses.replace(first, id="<b>gone", video="/nowhere.mp4"), *rest]
    runner.run(benchmark, asked, Parrot(), tmp_path)
    lines = runner.finished(tmp_path, asked)
    assert lines is not None
    summary = scores.summarize(benchmark, lines)
    card = {"model": "weights/x", "max_frames": 512}
    path = report.write(benchmark, summary, lines, card, {"commit": "abc", "command": "hico eval"}, tmp_path)
    text = path.read_text()
    for words in ("&lt;b&gt;gone", "unreadable", "/nowhere.mp4: no such file", "weights/x", "abc", "by duration"):
        assert words in text, words
    assert "<b>gone" not in text
    assert text.count("data:image/jpeg") == len([x for x in lines if x["status"] == "answered"])
    table = (tmp_path / "report.md").read_text()
    assert "- max_frames: 512" in table
    assert "duration: long" in table
    assert all(row.count("|") == 5 for row in table.splitlines() if row.startswith("|"))


def test_a_page_without_answers(tmp_path: pathlib.Path) -> None:
    benchmark = tasks.BENCHMARKS["charades_sta"]
    asked = [tasks.Item(id="x", source="s", groups={"task": "c"}, fault="broken", span=(0, 1))]
    runner.run(benchmark, asked, Parrot(), tmp_path)
    lines = journal.read(tmp_path)
    text = page.render(report.build(benchmark, scores.summarize(benchmark, lines), lines, {"model": "m"}, {}))
    assert "No question was answered" in text
    assert "mIoU" in text


def test_shares_with_intervals() -> None:
    assert report.percent({"share": 0.5, "low": 0.25, "high": 0.75, "number": 8}) == "50.0 % (25.0–75.0)"
    assert report.percent({"share": None, "low": 0, "high": 1, "number": 0}) == "–"
    assert report.percent(None) == "–"
