"""Lines that survive a kill. Stopped and resumed runs are tested with the benchmarks."""

from __future__ import annotations

import pathlib
import re

import pytest

from hico_jax.evals import journal


def test_an_unfinished_line_is_cut_off_and_others_stay(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trials.0.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "x": ')
    assert journal.read(tmp_path, "trials") == [{"id": 1}]
    with journal.Appending(path) as file:
        journal.add(file, {"id": 3})
    assert path.read_text() == '{"id": 1}\n{"id": 3}\n'
    assert journal.read(tmp_path, "answers") == []


def test_other_settings_are_not_mixed_in(tmp_path: pathlib.Path) -> None:
    journal.claim(tmp_path / "a", {"max_frames": 64})
    journal.claim(tmp_path / "a", {"max_frames": 64})
    with pytest.raises(ValueError, match=r"max_frames 64 \(now 512\)"):
        journal.claim(tmp_path / "a", {"max_frames": 512})
    (tmp_path / "a" / "answers.0of1.jsonl").write_text("{}\n")
    journal.claim(tmp_path / "a", {"max_frames": 512}, fresh=True)
    assert not list((tmp_path / "a").glob("answers.*"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "answers.0of1.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"no settings\.json"):
        journal.claim(tmp_path / "b", {})


@pytest.mark.parametrize("line", ["not json", "[]", "3", "{}"])
def test_a_damaged_line_is_named(tmp_path: pathlib.Path, line: str) -> None:
    (tmp_path / "answers.0of1.jsonl").write_text(f'{{"id": "1"}}\n{line}\n')
    with pytest.raises(ValueError, match=re.escape("answers.0of1.jsonl is damaged in line 2")):
        journal.read(tmp_path)
