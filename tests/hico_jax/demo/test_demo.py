"""The demo's own folder: whose it is, and what is not done twice."""

from __future__ import annotations

import pathlib

import pytest

from hico_jax import demo

SETTINGS = {"size": "quick", "seed": 0}


def test_a_folder_of_others_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="holds other files; choose another folder with --out"):
            demo.prepare(tmp_path, SETTINGS, fresh=fresh)
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_the_same_demo_goes_on(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "new" / "demo"
    demo.prepare(out, SETTINGS, fresh=False)
    (out / "film.mp4").write_bytes(b"x")
    demo.prepare(out, SETTINGS, fresh=False)
    assert (out / "film.mp4").exists()
    demo.prepare(out, SETTINGS, fresh=True)
    assert [p.name for p in out.iterdir()] == [demo.MARK]


def test_another_demo_is_not_mixed_in(tmp_path: pathlib.Path) -> None:
    demo.prepare(tmp_path, SETTINGS, fresh=False)
    with pytest.raises(ValueError, match="a demo with other settings"):
        demo.prepare(tmp_path, {"size": "quick", "seed": 1}, fresh=False)
    demo.prepare(tmp_path, {"size": "quick", "seed": 1}, fresh=True)


def test_a_step_with_a_result_is_not_run_again(tmp_path: pathlib.Path) -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return len(calls)

    for _ in range(2):
        run = demo.Run(tmp_path, 0, total=1)
        run.step("one", "the first", work)
        assert run.results == {"one": 1}
    assert calls == [1]
    run.step("page", "the page", work, keep=False)
    assert not (tmp_path / "results" / "page.json").exists()


def test_a_step_that_fails_leaves_nothing(tmp_path: pathlib.Path) -> None:
    run = demo.Run(tmp_path, 0, total=1)
    with pytest.raises(ZeroDivisionError):
        run.step("one", "the first", lambda: 1 // 0)
    assert not (tmp_path / "results").exists()
