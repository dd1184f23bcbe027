"""No question twice, none lost, whatever stops the run; and what becomes of questions that cannot be answered."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from hico_jax.evals import journal
from hico_jax.evals.bench import runner, scores, tasks
from tests.parrot import Parrot

MVBENCH = tasks.BENCHMARKS["mvbench"]


def many(items: Any) -> list[tasks.Item]:
    return [dataclasses.replace(x, id=f"{x.id}.{i}", prompt=f"{i} {x.prompt}") for i in range(8) for x in items]


def test_stopped_twenty_times_it_reports_the_same(items: Any, tmp_path: pathlib.Path) -> None:
    """Half of the stops also cut the last line short, as a kill in the middle of a write does."""
    asked = many(items("mvbench"))
    whole = Parrot()
    runner.run(MVBENCH, asked, whole, tmp_path / "whole")
    rng = np.random.default_rng(0)
    heard: list[str] = []
    stops = 0
    while stops < 20:
        parrot = Parrot(stop_after=int(rng.integers(0, 4)))
        try:
            runner.run(MVBENCH, asked, parrot, tmp_path / "parts")
        except KeyboardInterrupt:
            stops += 1
        heard += parrot.asked
        if stops % 2:
            with (tmp_path / "parts" / "answers.0of1.jsonl").open("a") as file:
                file.write('{"id": "half a li')
    last = Parrot()
    runner.run(MVBENCH, asked, last, tmp_path / "parts")
    heard += last.asked
    assert sorted(heard) == sorted(x.id for x in asked)  # each once
    reports = [runner.finished(tmp_path / name, asked) for name in ("whole", "parts")]
    assert reports[0] == reports[1]
    assert scores.summarize(MVBENCH, reports[0]) == scores.summarize(MVBENCH, reports[1])  # type: ignore[arg-type]


def test_shares_of_processes_join(items: Any, tmp_path: pathlib.Path) -> None:
    asked = many(items("mvbench"))
    runner.run(MVBENCH, asked, Parrot(), tmp_path / "one")
    parrots = [Parrot() for _ in range(3)]
    for i, parrot in enumerate(parrots):
        assert runner.finished(tmp_path / "three", asked) is None
        runner.run(MVBENCH, asked, parrot, tmp_path / "three", shard=(i, 3))
    assert runner.finished(tmp_path / "three", asked) == runner.finished(tmp_path / "one", asked)
    again = Parrot()
    runner.run(MVBENCH, asked, again, tmp_path / "three", shard=(0, 2))  # another number of processes goes on
    assert again.asked == []


def test_a_video_is_watched_once(items: Any, tmp_path: pathlib.Path) -> None:
    parrot = Parrot()
    runner.run(MVBENCH, items("mvbench"), parrot, tmp_path)
    assert len(parrot.watched) == 4  # two films, each whole and in part


def test_what_cannot_be_answered_is_wrong_and_counted(items: Any, tmp_path: pathlib.Path) -> None:
    class Mute(Parrot):
        def answer(self, seen: str, item: tasks.Item, max_new_tokens: int) -> runner.Reply:
            if item.id == "long":
                raise ValueError("the row has 999 tokens")
            return runner.Reply(" \n")

    first = items("mvbench")[0]
    asked = [
        first, dataclasses.replace(first, id="gone", video="/nowhere.mp4"), dataclasses.replace(first, id="long"),
        dataclasses.replace(first, id="bad", fault="file[3]: its field 'x' is missing"),
    ]  # fmt: skip
    runner.run(MVBENCH, asked, Mute(), tmp_path)
    lines = runner.finished(tmp_path, asked)
    assert lines is not None
    assert [line["status"] for line in lines] == ["empty", "unreadable", "too long", "invalid"]
    assert [line["strict"]["score"] for line in lines] == [0.0] * 4
    assert "/nowhere.mp4: no such file" in lines[1]["note"]
    found = scores.summarize(MVBENCH, lines)
    assert found["strict"]["score"]["number"] == 4
    assert found["reference"]["score"]["number"] == 3  # the empty answer left, as there


def test_nothing_is_guessed_for_a_video_that_is_not_there(items: Any, tmp_path: pathlib.Path) -> None:
    benchmark = tasks.BENCHMARKS["longvideobench"]
    asked = [dataclasses.replace(x, video="/nowhere.mp4") for x in items("longvideobench")]
    runner.run(benchmark, asked, Parrot(), tmp_path)
    found = scores.summarize(benchmark, journal.read(tmp_path))
    assert found["reference"]["score"]["share"] == 0
    assert found["counts"]["guessed"] == 0


def test_two_processes_do_not_write_one_file(items: Any, tmp_path: pathlib.Path) -> None:
    asked = items("mvbench")
    second = lambda done, total: runner.run(MVBENCH, asked, Parrot(), tmp_path)
    with pytest.raises(ValueError, match="another process is writing it"):
        runner.run(MVBENCH, asked, Parrot(), tmp_path, tick=second)


def test_a_line_holds_what_was_asked_and_said(items: Any, tmp_path: pathlib.Path) -> None:
    runner.run(MVBENCH, items("mvbench")[:1], Parrot(), tmp_path)
    (line,) = (json.loads(x) for x in (tmp_path / "answers.0of1.jsonl").read_text().splitlines())
    assert line["prompt"].endswith("\nOnly give the best option.")
    assert {"answer", "expected", "options", "reference", "strict", "frames", "source", "video"} <= set(line)
