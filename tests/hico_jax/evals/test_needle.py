"""The needle test with a tiny model: what is hidden, asked, counted."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from data_pipeline import video
from hico_jax.evals import needle
from hico_jax.film import Viewer


def trial(depth: float, seconds: float, answer: str) -> needle.Trial:
    return needle.Trial(seconds, 8, depth, "card_colour", "Which?", "red", answer, 8, 0.1)


def test_the_same_film_with_and_without_its_card(tmp_path: pathlib.Path) -> None:
    hidden = needle.hide(tmp_path / "a", 16, 0.5, 3)
    blank = needle.hide(tmp_path / "a", 16, 0.5, 3, blank=True)
    again = needle.hide(tmp_path / "b", 16, 0.5, 3)
    assert pathlib.Path(hidden.film.path).read_bytes() == pathlib.Path(again.film.path).read_bytes()
    assert hidden.film.questions == blank.film.questions
    (card,) = hidden.film.scene.cards
    shown, gone = (np.concatenate(list(video.iter_frames(h.film.path, np.arange(16)))) for h in (hidden, blank))
    differs = np.abs(shown.astype(int) - gone).max((1, 2, 3)) > 60  # far above what H.264 loses
    assert np.flatnonzero(differs).tolist() == list(range(int(card.start_s), int(card.end_s)))
    assert card.start_s == 6  # the middle of what a card of four seconds can take


def test_a_grid_of_films(viewer: Viewer, tmp_path: pathlib.Path) -> None:
    counts: list[int] = []
    trials = needle.haystack(
        viewer, tmp_path / "films", lengths=(8, 16), depths=(0.0, 1.0), repeats=1, done=lambda t: counts.append(len(t))
    )
    assert counts == [2, 4, 6, 8]  # two questions a film
    assert {(t.seconds, t.depth) for t in trials} == {(8, 0.0), (8, 1.0), (16, 0.0), (16, 1.0)}
    assert {t.kind for t in trials} == {"card_colour", "card_shape"}
    assert [t.frames for t in trials] == [8] * 4 + [16] * 4
    assert all(t.visual_tokens == t.frames for t in trials)  # tiny keeps one token a frame
    assert list((tmp_path / "films").iterdir()) == []  # films are not left behind
    shares = needle.grid(trials, (8, 16), (0.0, 1.0))
    assert [len(line) for line in shares] == [2, 2]


def test_asking_without_a_film(viewer: Viewer, tmp_path: pathlib.Path) -> None:
    hidden = needle.hide(tmp_path, 8, 0.0, 0)
    trials = list(needle.ask(viewer, hidden, None))
    assert [(t.frames, t.visual_tokens) for t in trials] == [(0, 0)] * 2
    assert list(needle.ask(viewer, hidden, None, kinds=("order",))) == []  # one card has no order


def test_which_of_two_came_first(viewer: Viewer, tmp_path: pathlib.Path) -> None:
    two = needle.hide(tmp_path, 16, 0.0, 0, cards=2)
    found = list(needle.ask(viewer, two, viewer.watch(two.film.path), kinds=("order",)))
    colours = {card.colour for card in two.film.scene.cards}
    assert {t.kind for t in found} == {f"order_{colour}" for colour in colours}
    assert {t.expected for t in found} == {"first", "second"}


def test_rows_are_depths_and_columns_lengths() -> None:
    trials = [trial(0.0, 8, "red"), trial(0.0, 8, "blue"), trial(1.0, 16, "red")]
    assert needle.grid(trials, (8, 16), (0.0, 1.0)) == [[0.5, None], [None, 1.0]]
    assert needle.share(trials) == pytest.approx(2 / 3)
    assert needle.share([]) is None


def test_the_interval_of_a_share() -> None:
    """By the formula in another form: the roots of (p - x)^2 = z^2 x (1 - x) / n."""
    for right, total in ((38, 40), (0, 10), (10, 10), (1, 3)):
        p, z2 = right / total, 1.96**2 / total
        expected = sorted(np.roots([1 + z2, -(2 * p + z2), p * p]))
        np.testing.assert_allclose(needle.interval(right, total), expected, atol=1e-7)
    assert needle.interval(0, 0) == (0.0, 1.0)


def test_shuffled_keeps_every_frame_and_loses_the_order() -> None:
    order = needle.shuffled(64, 5)
    assert sorted(order.tolist()) == list(range(64))
    assert np.abs(np.corrcoef(order, np.arange(64))[0, 1]) < 0.5
    assert (order == needle.shuffled(64, 5)).all()
    assert (order != needle.shuffled(64, 6)).any()
