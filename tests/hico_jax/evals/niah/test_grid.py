"""Trials over lengths and depths: each once, whatever stops the run; cells and joint scores by hand."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from hico_jax.evals.niah import grid, haystack, needles, probe
from hico_jax.models.hico import HiCo


class Echo(probe.Probe):
    """Answers without running a model; may be stopped."""

    asked: list[str]
    trials: list[Any]
    stop_after: int

    def ask(self, hay: Any, trial: Any, asked: needles.Asked) -> probe.Found:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(asked.question)
        self.trials.append((hay, trial, self.model.config.drop))
        right = len(trial.index) % 3 == 0
        return probe.Found(right, -1.0, right, asked.answer, len(trial.index), 0, 0.0)


def echo(model: HiCo, stop_after: int = 10**6) -> Echo:
    made = Echo(model, None)  # type: ignore[arg-type]
    object.__setattr__(made, "asked", [])
    object.__setattr__(made, "trials", [])
    object.__setattr__(made, "stop_after", stop_after)
    object.__setattr__(made, "dropped", lambda: _dropped(made))
    return made


def _dropped(asker: Echo) -> Echo:
    other = echo(probe.Probe.dropped(asker).model)
    object.__setattr__(other, "asked", asker.asked)
    object.__setattr__(other, "trials", asker.trials)
    return other


@pytest.fixture
def hay(asked_model: HiCo) -> haystack.Haystack:
    clips = np.random.default_rng(0).integers(0, 256, (4, 4, 32, 32, 3), np.uint8)
    tokens = haystack.encode_clips(asked_model, clips, 4)
    return haystack.Haystack(tokens, 16, dict(enumerate(clips.reshape(-1, 32, 32, 3))), 16)


def test_a_stopped_run_goes_on(asked_model: HiCo, hay: haystack.Haystack, tmp_path: pathlib.Path) -> None:
    tried = grid.Grid((8, 16), (0.0, 0.4, 1.0))
    hidden = needles.world(2, 32, 0)
    whole = grid.run(echo(asked_model), hay, hidden, tried, tmp_path)
    assert len(whole) == 2 * 2 * 3 * 2 + 2 * 2  # and the control
    (tmp_path / "parts").mkdir()
    asked = 0
    for _ in range(6):
        part = echo(asked_model, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            grid.run(part, hay, hidden, tried, tmp_path / "parts")
        asked += len(part.asked)
    last = echo(asked_model)
    parts = grid.run(last, hay, hidden, tried, tmp_path / "parts")
    assert asked + len(last.asked) == len(whole)
    assert sorted(x["id"] for x in parts) == sorted(x["id"] for x in whole)
    assert {x["visual_tokens"] for x in whole if x["frames"] == 16} == {16, 20}
    phases = {tuple(x["before_frame"]) for x in whole if x["insertion"] == "pixel" and x["frames"] == 16}
    assert phases == {(0,), (6,), (16,), (1,), (7,), (15,)}  # the second needle stands a frame further in its clip
    shares = grid.table(whole, tried, "feature", "forced")
    assert shares == [[1.0, 0.0]] * 3  # 12 and 20 tokens
    assert grid.totals(whole, tried)["pixel"]["forced"]["share"] == 0.5
    assert {x["visual_tokens"] for x in whole if x["insertion"] == grid.CONTROL} == {8, 16}
    assert grid.totals(whole, tried)[grid.CONTROL]["forced"]["number"] == 4
    by_length = grid.control(whole, tried)
    assert [(row["frames"], row["pixel"]["number"], row[grid.CONTROL]["number"]) for row in by_length] == [
        (8, 6, 2), (16, 6, 2),
    ]  # fmt: skip


def test_controls(asked_model: HiCo, hay: haystack.Haystack, tmp_path: pathlib.Path) -> None:
    tried = grid.Grid((8, 16), (0.0, 0.4), controls=grid.CONTROLS)
    hidden, asker = needles.world(3, 32, 0), echo(asked_model)
    assert tried.kept(hidden, 4) is None, "a shuffled film takes every frame"
    lines = grid.run(asker, hay, hidden, tried, tmp_path)
    assert len(lines) == 3 * (2 * 2 * 2 + 4 * 2 + 1)
    of = {(x["insertion"], x["frames"], x["needle"]): i for i, x in enumerate(lines)}
    place = lambda name, needle: lines[of[name, 16, needle]]["depth"]
    assert [place(grid.BLANK, f"world{n}") for n in range(3)] == [0.0, 0.4, 0.0]
    assert [place(grid.DROPPED, f"world{n}") for n in range(3)] == [0.0, 0.4, 0.0]
    assert {x["visual_tokens"] for x in lines if x["insertion"] == grid.BLIND} == {0}

    def seen(name: str, frames: int = 16) -> tuple[Any, np.ndarray]:
        held, trial, drop = asker.trials[of[name, frames, "world1"]]
        return drop, np.asarray(haystack.gather(held.tokens, trial.extra, trial.index))

    film = [hay.pixels[i] for i in range(16)]
    with_grey = np.stack([*film[:7], *[np.full((32, 32, 3), 128, np.uint8)] * 4, *film[7:]]).reshape(-1, 4, 32, 32, 3)
    np.testing.assert_allclose(seen(grid.BLANK)[1], haystack.encode_clips(asked_model, with_grey, 5), atol=1e-5)
    same = next(i for i, x in enumerate(lines) if x["id"] == "pixel/16/0.4/world1/shape")
    held, trial, _ = asker.trials[same]
    drop, tokens = seen(grid.DROPPED)
    np.testing.assert_array_equal(tokens, haystack.gather(held.tokens, trial.extra, trial.index))
    assert drop.kept(20) == (0,)
    assert seen(grid.SHUFFLED)[1].shape == tokens.shape
    order = haystack.mixed(asked_model, hay, 16, 1, np.random.default_rng((0, 16, 1))).frames
    (picture,) = hidden[1].pictures
    frames = np.stack([picture if kind == "needle" else film[i] for kind, i in order]).reshape(-1, 4, 32, 32, 3)
    np.testing.assert_allclose(seen(grid.SHUFFLED)[1], haystack.encode_clips(asked_model, frames, 5), atol=1e-5)
    found = grid.differences(lines, tried, [n.id for n in hidden])
    assert {name: d["forced"]["number"] for name, d in found.items()} == dict.fromkeys(grid.CONTROLS, 6)
    assert found[grid.DROPPED]["forced"]["difference"] == 0.0, "the echo is right by the number of tokens"
    assert grid.run(echo(asked_model, 0), hay, hidden, tried, tmp_path) == lines


def test_chains_span_the_film(asked_model: HiCo, hay: haystack.Haystack, tmp_path: pathlib.Path) -> None:
    tried = grid.Grid((8, 16), (0.5,), chains=True)
    hidden = needles.world_chains(2, 5, 32, 0)
    lines = grid.run(echo(asked_model), hay, hidden, tried, tmp_path)
    assert len(lines) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    assert {x["visual_tokens"] for x in lines if x["frames"] == 8} == {8, 8 + 5 * 4}
    assert {x["depth"] for x in lines} == {None}


def test_joint_scores() -> None:
    tried = grid.Grid((8,), (), ("pixel",), chains=True)
    rights = {"a": (1, 1), "b": (1, 0), "c": (0, 0), "d": (0, 1)}
    lines = [
        {"insertion": "pixel", "frames": 8, "needle": n, "asked": asked, "forced": bool(r), "generated": False}
        for n, pair in rights.items() for asked, r in zip(("caption", "question"), pair, strict=True)
    ]  # fmt: skip
    (row,) = grid.joint(lines, tried)["pixel"]
    found = row["forced"]
    assert (found["caption"]["share"], found["question"]["share"], found["mean"]["share"]) == (0.5, 0.5, 0.5)
    assert (found["both"]["share"], found["only_caption"], found["only_question"]) == (0.25, 1, 1)
    assert row["generated"]["both"]["share"] == 0


def test_pixels_are_kept_only_where_a_needle_cuts() -> None:
    tried = grid.Grid((16,), (0.0, 0.5, 0.7))
    hidden = needles.world(1, 32, 0)
    assert tried.kept(hidden, 4) == {0, 1, 2, 3, *range(8, 16)}  # every phase of a clip, but never the second one
    assert grid.Grid((16,), (0.7,), ("feature",)).kept(hidden, 4) == set()


def test_ways_of_thoughts() -> None:
    tried = grid.Grid((8,), (), ("pixel",), chains=True)
    told = [(1.0, True, True), (0.5, True, False), (0.0, False, False), (0.5, False, True)]
    lines = [
        {"insertion": "pixel", "frames": 8, "needle": str(n), "followed": f, "named": named, "generated": letter}
        for n, (f, named, letter) in enumerate(told)
    ]  # fmt: skip
    (row,) = grid.ways([*lines, {"insertion": grid.CONTROL, "frames": 8, "followed": None}], tried)["pixel"]
    assert {name: row[name]["share"] for name in ("followed", "whole", "named", "letter")} == {
        "followed": 0.5, "whole": 0.25, "named": 0.5, "letter": 0.5,
    }  # fmt: skip
    assert grid.ways([], tried) == {}
    blind = [{**lines[0], "insertion": grid.BLIND, "frames": 0}]
    told_twice = grid.ways(blind, grid.Grid((8, 16), (), ("pixel",), chains=True, controls=(grid.BLIND,)))
    assert [row["frames"] for row in told_twice[grid.BLIND]] == [0], "no film has one length"
