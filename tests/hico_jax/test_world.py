from __future__ import annotations

import pathlib
import re
import shlex

import pytest

from hico_jax import cli


def test_a_film_hides_its_card_where_it_was_told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "film.mp4"
    assert cli.main(["world", "--film", str(path), "--seconds", "24", "--needle-at", "9"]) == cli.OK
    first, command, last = capsys.readouterr().out.splitlines()
    assert path.stat().st_size > 0
    found = re.fullmatch(r".*: 24 s; an? (\w+) \w+ at (\d+) s", first)
    assert found
    assert found[2] == "9"
    assert shlex.split(command)[:3] == ["hico", "ask", str(path)]
    assert last.startswith("the answer is: ")


def test_the_same_seed_gives_the_same_film(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        assert cli.main(["world", "--film", str(tmp_path / name) + ".mp4", "--seconds", "8", "--seed", "5"]) == cli.OK
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--film f.mp4 --seconds 24 --needle-at 21", "has room for a card of 4 s until 20 s"),
        ("--out w --preset nanoo", "preset is 'nanoo'"),
    ],
)
def test_a_mistake_is_named(
    line: str, words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["world", *line.split()]) == cli.MISUSED
    assert words in capsys.readouterr().err


def test_a_folder_of_videos(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["world", "--out", str(tmp_path / "w"), "--preset", "tiny"]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("  videos 30/30")
    assert len(lines) <= 12
    assert sorted(p.name for p in (tmp_path / "w").iterdir())[-1] == "world.json"
