from __future__ import annotations

import sys

import pytest

from hico_jax.report import progress


def test_a_log_gets_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("videos") as tick:
        for done in range(1001):
            tick(done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0].strip() for line in lines] == [f"videos {done:,}/1,000" for done in range(0, 1001, 100)]
    assert lines[-1].endswith("0 s left")
    assert "\r" not in "".join(lines)


def test_nothing_to_do_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("videos") as tick:
        tick(0, 0)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with progress.bar("videos") as tick:
        tick(3, 10)
    assert "s left" not in capsys.readouterr().out
