from __future__ import annotations

import itertools
import pathlib
from typing import Any

import av
import numpy as np
import pytest

from data_pipeline.world.films import Needle, haystack, needles
from data_pipeline.world.recipes import held_out
from data_pipeline.world.scene import COLOURS, SHAPES


def _decode(path: str | pathlib.Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def _answers(questions: tuple[Any, ...]) -> dict[str, str]:
    return {q.kind: q.answer for q in questions}


@pytest.mark.parametrize("start_s", [0.0, 13.0, 44.0])
def test_the_card_is_in_the_decoded_frames_it_should_be_in(tmp_path: pathlib.Path, start_s: float):
    needle = Needle("circle", "magenta", start_s)
    film = haystack(tmp_path / "film.mp4", num_seconds=48, seed=1, needles=[needle], px=64)
    frames = _decode(film.path)
    assert frames.shape == (48, 64, 64, 3)
    middle = frames[:, 28:36, 28:36].astype(int).mean((1, 2))
    # H.264 halves the colour's resolution; an even area comes through within a few levels.
    near = np.abs(middle - np.array(COLOURS["magenta"])).max(-1) < 16
    assert np.nonzero(near)[0].tolist() == list(range(int(start_s), int(start_s) + 4))
    assert _answers(film.questions)["card_colour"] == "magenta"
    assert _answers(film.questions)["card_shape"] == "circle"


def test_every_colour_survives_encoding(tmp_path: pathlib.Path):
    cards = [Needle("square", colour, 8.0 * i) for i, colour in enumerate(COLOURS)]
    frames = _decode(haystack(tmp_path / "film.mp4", num_seconds=64, seed=2, needles=cards, px=64).path)
    for i, colour in enumerate(COLOURS):
        seen = frames[8 * i + 2, 28:36, 28:36].reshape(-1, 3).astype(int).mean(0)
        nearest = min(COLOURS, key=lambda name: np.abs(seen - np.array(COLOURS[name])).sum())
        assert nearest == colour


def test_the_blank_control_differs_in_the_card_only(tmp_path: pathlib.Path):
    settings: dict[str, Any] = {"num_seconds": 40, "seed": 3, "needles": needles(3, 40, depth=0.5), "px": 64}
    film = haystack(tmp_path / "film.mp4", **settings)
    blank = haystack(tmp_path / "blank.mp4", **settings, blank=True)
    assert blank.questions == film.questions, "the control asks the same"
    assert blank.scene == film.scene
    assert blank.blank
    difference = np.abs(_decode(film.path).astype(int) - _decode(blank.path)).mean((1, 2, 3))
    inside = np.array(list(film.scene.frames(film.scene.cards[0])))
    assert difference[inside].min() > 25
    assert np.delete(difference, inside).max() < 6, "only what the encoder makes of it"


def test_two_cards_give_order_questions(tmp_path: pathlib.Path):
    cards = [Needle("ring", "blue", 30.0), Needle("star", "red", 5.0)]
    answers = _answers(haystack(tmp_path / "film.mp4", num_seconds=40, seed=4, needles=cards, px=32).questions)
    assert answers["first_colour"] == "red"
    assert answers["second_shape"] == "ring"
    assert answers["order_blue"] == "second"


def test_choices_ask_the_same_with_options(tmp_path: pathlib.Path):
    film = haystack(tmp_path / "film.mp4", num_seconds=16, seed=5, needles=needles(5, 16), px=32)
    assert [q.kind for q in film.choices] == [q.kind for q in film.questions]
    for question, choice in zip(film.questions, film.choices, strict=True):
        assert choice.options["ABCD".index(choice.answer)] == question.answer


def test_the_same_seed_makes_the_same_film(tmp_path: pathlib.Path):
    settings: dict[str, Any] = {"num_seconds": 20, "needles": needles(6, 20), "px": 32}
    first, again, other = (
        haystack(tmp_path / f"{i}.mp4", seed=seed, **settings) for i, seed in enumerate((6, 6, 7))
    )  # fmt: skip
    assert first.scene == again.scene
    np.testing.assert_array_equal(_decode(first.path), _decode(again.path))
    assert (_decode(first.path) != _decode(other.path)).any()


@pytest.mark.parametrize(("depth", "start_s"), [(0.0, 0.0), (0.25, 15.0), (1.0, 60.0)])
def test_depth_places_the_needle(depth: float, start_s: float):
    (needle,) = needles(1, 64, depth=depth)
    assert needle.start_s == start_s


def test_needles_are_held_out_pairs_of_different_colours():
    seen = set()
    for seed in range(60):
        several = needles(seed, 60, count=3)
        assert len({n.colour for n in several}) == 3
        starts = [n.start_s for n in several]
        assert all(b - a >= 4 for a, b in itertools.pairwise(starts))
        assert starts[-1] + 4 <= 60
        assert all(held_out(n.colour, n.content) for n in several)
        seen |= {(n.colour, n.content) for n in several}
    assert len(seen) == 8
    assert {content for _, content in seen} == set(SHAPES)


def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"3 needles of 4\.0 s do not fit 10 s"):
        needles(0, 10, count=3)
    with pytest.raises(ValueError, match=r"depth is 0\.5 for 2 needles"):
        needles(0, 100, count=2, depth=0.5)
    with pytest.raises(ValueError, match="inside the film"):
        haystack(tmp_path / "film.mp4", num_seconds=10, seed=0, needles=[Needle("ring", "red", 8.0)])
    assert not list(tmp_path.iterdir()), "nothing half made is left"
