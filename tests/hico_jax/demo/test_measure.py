"""What the demo counts and says of it, on answers made by hand and on a tiny model."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from hico_jax.batch import DropSchedule
from hico_jax.demo import measure
from hico_jax.evals import needle
from hico_jax.film import Viewer
from hico_jax.generate import GenerationConfig


def trial(kind: str, right: bool) -> needle.Trial:
    return needle.Trial(8, 8, 0.5, kind, "Which?", "red", "red" if right else "blue", 8, 0.1)


def test_a_summary() -> None:
    found = measure.summary([trial("card_colour", True)] * 3 + [trial("card_colour", False)])
    assert (found["asked"], found["right"], found["share"]) == (4, 3, 0.75)
    assert 0 < found["low"] < 0.75 < found["high"] < 1
    assert measure.summary([])["share"] is None


def test_kinds_that_differ_in_a_colour_count_as_one() -> None:
    trials = [trial("card_colour", True), trial("order_red", True), trial("order_blue", False)]
    found = measure.by_kind(trials)
    assert list(found) == ["card_colour", "order"]
    assert found["order"]["share"] == 0.5


def test_schedules_in_words() -> None:
    assert measure.spelled(DropSchedule()) == "off"
    assert measure.spelled(DropSchedule("uniform", (1, 2), (1.0, 0.5, 0.1))) == "uniform, 10% after layer 2"


def test_chance_is_one_of_the_possible_answers() -> None:
    assert measure.chance("card_colour") == 1 / 8
    assert measure.chance("order") == measure.chance("order_red") == 0.5
    with pytest.raises(KeyError):
        measure.chance("weather")


def test_records_say_which_are_right() -> None:
    (right, wrong) = measure.records([trial("card_colour", True), trial("card_colour", False)])
    assert (right["correct"], wrong["correct"]) == (True, False)
    assert right["expected"] == "red"


def test_without_merging_every_patch_is_a_token(viewer: Viewer, tmp_path: pathlib.Path) -> None:
    whole = measure.with_model(viewer, measure.without_merging(viewer.model))
    assert whole.geometry.tokens_per_clip == 4 * viewer.model.config.vision.patches_per_frame
    assert whole.geometry.tokens_per_clip > viewer.geometry.tokens_per_clip
    hidden = needle.hide(tmp_path, 8, 0.5, 0)
    seen = whole.watch(hidden.film.path)
    answer = whole.ask(seen, "What is seen?", config=GenerationConfig(max_new_tokens=1, eos=()))
    assert answer.visual_tokens == 8 * viewer.model.config.vision.patches_per_frame


def test_what_is_kept_along_a_film(viewer: Viewer, tmp_path: pathlib.Path) -> None:
    hidden = needle.hide(tmp_path, 16, 0.5, 0)
    found = measure.kept_along(viewer, viewer.watch(hidden.film.path), hidden, measure.SWITCH)
    assert found["of"] == 16
    assert found["kept"] == 4  # a quarter
    assert len(found["share"]) == 4
    assert np.mean(found["share"]) == 0.25
    assert viewer.model.config.drop == DropSchedule()  # the viewer itself is as it was
