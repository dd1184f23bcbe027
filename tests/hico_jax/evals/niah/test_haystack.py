"""Trials are put together from a film encoded once: they must equal the film encoded with the needle in it."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from data_pipeline import video
from data_pipeline.image import pad_square, resize
from hico_jax.evals.niah import haystack
from hico_jax.models.hico import HiCo

FRAMES = 16


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Forty frames, two a second, no two alike, not square."""
    frames = np.random.default_rng(3).integers(0, 256, (40, 4, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    return video.write_video(tmp_path_factory.mktemp("hay") / "film.mp4", frames, 2.0)


def pixels_of(film: pathlib.Path, chosen: np.ndarray) -> np.ndarray:
    from PIL import Image

    frames = np.concatenate(list(video.iter_frames(film, chosen)))
    return np.stack([resize(np.asarray(pad_square(Image.fromarray(f))), 32, 32) for f in frames])


def pictures(number: int) -> list[np.ndarray]:
    return list(np.random.default_rng(7).integers(0, 256, (number, 32, 32, 3), np.uint8))


def taken(model: HiCo, hay: haystack.Haystack, trial: haystack.Trial) -> np.ndarray:
    return np.asarray(haystack.gather(hay.tokens, trial.extra, trial.index))


@pytest.mark.parametrize(("where", "number"), [([0], 1), ([8], 1), ([6], 1), ([16], 1), ([15], 1), ([0, 8, 16], 3)])
def test_pixel_trials_equal_the_whole_film_encoded(
    asked_model: HiCo, film: pathlib.Path, where: list[int], number: int
) -> None:
    chosen = haystack.indices(film, FRAMES, repeat=False)
    hay = haystack.encode(
        asked_model, film, chosen, haystack.needed(FRAMES, where, 4), clips_per_step=3
    )  # fmt: skip
    assert len(hay.pixels) <= 4 * number
    shown = pictures(number)
    found = taken(asked_model, hay, haystack.at_pixels(asked_model, hay, shown, FRAMES, where))
    frames: list[np.ndarray] = []
    whole = pixels_of(film, chosen)
    for i in range(FRAMES + 1):
        frames += [p for w, p in zip(where, shown, strict=True) if w == i for _ in range(4)]
        frames += [whole[i]] if i < FRAMES else []
    expected = haystack.encode_clips(asked_model, np.stack(frames).reshape(-1, 4, 32, 32, 3), 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("where", [[0], [5], [16], [0, 5, 16]])
def test_feature_trials_are_slices_put_together(asked_model: HiCo, film: pathlib.Path, where: list[int]) -> None:
    hay = haystack.encode(asked_model, film, haystack.indices(film, FRAMES, repeat=False), ())
    needle = haystack.alone(asked_model, pictures(len(where)))
    trial = haystack.at_features(hay, needle, FRAMES, where, asked_model.config.geometry())
    found = taken(asked_model, hay, trial)[0]
    tokens, alone, first, parts = np.asarray(hay.tokens[0]), np.asarray(needle[0]).reshape(len(where), 4, -1), 0, []
    for place, mine in zip(where, alone, strict=True):
        parts += [tokens[first:place], mine]  # tiny keeps one token a frame
        first = place
    np.testing.assert_array_equal(found, np.concatenate([*parts, tokens[first:FRAMES]]))


def test_a_shorter_film_is_the_beginning_of_the_longest(asked_model: HiCo, film: pathlib.Path) -> None:
    hay = haystack.encode(asked_model, film, haystack.indices(film, FRAMES, repeat=False), {4, 5, 6, 7})
    (shown,) = pictures(1)
    trial = haystack.at_pixels(asked_model, hay, [shown], 8, [6])
    assert len(trial.index) == 8 + 4
    np.testing.assert_array_equal(taken(asked_model, hay, trial)[0, :4], np.asarray(hay.tokens[0, :4]))


def test_one_frame_a_second_and_repeated_films(asked_model: HiCo, film: pathlib.Path) -> None:
    assert haystack.indices(film, 20, repeat=False).tolist() == list(range(0, 40, 2))
    with pytest.raises(ValueError, match="gives 20 frames at one a second; 24 were asked for"):
        haystack.indices(film, 24, repeat=False)
    chosen = haystack.indices(film, 24, repeat=True)
    assert chosen[20:].tolist() == [0, 2, 4, 6]
    hay = haystack.encode(asked_model, film, chosen, ())
    assert (hay.num_frames, hay.distinct) == (24, 20)
    np.testing.assert_allclose(hay.tokens[0, 20:24], hay.tokens[0, :4], atol=1e-6)


@pytest.mark.parametrize("number", [1, 3])
def test_a_shuffled_film_holds_every_frame_once(asked_model: HiCo, film: pathlib.Path, number: int) -> None:
    chosen = haystack.indices(film, FRAMES, repeat=False)
    hay, shown = haystack.encode(asked_model, film, chosen, None), pictures(number)
    np.testing.assert_array_equal(hay.pixels, pixels_of(film, chosen))
    mixed = haystack.mixed(asked_model, hay, FRAMES, number, np.random.default_rng(1), clips_per_step=3)
    straight = haystack.sequence(FRAMES, [0] * number, 4)
    assert sorted(mixed.frames) == sorted(straight)
    assert list(mixed.frames) != straight
    frames = np.stack([shown[i] if kind == "needle" else hay.pixels[i] for kind, i in mixed.frames])
    expected = haystack.encode_clips(asked_model, frames.reshape(-1, 4, 32, 32, 3), 8)
    found = taken(asked_model, mixed.hay, haystack.at_random(asked_model, mixed, shown))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_places() -> None:
    assert haystack.places(10, 0.25, 1) == [2]
    assert haystack.places(10, 1.0, 1) == [10]
    assert haystack.places(10, 0.25, 1, shift=3) == [5]
    assert haystack.places(10, 1.0, 1, shift=3) == [7]
    assert haystack.places(1000, None, 5) == [0, 250, 500, 750, 1000]


def test_only_clips_that_are_cut_are_new() -> None:
    frames = haystack.sequence(12, [6], 4)
    assert len(frames) == 16
    assert sorted(haystack.changed(frames, 4)) == [1, 2]
    assert sorted(haystack.changed(haystack.sequence(12, [4], 4), 4)) == [1]
    assert haystack.changed(haystack.sequence(12, [], 4), 4) == {}
    assert haystack.needed(12, [6], 4) == {4, 5, 6, 7}


def test_memory_is_flat_in_the_number_of_trials(asked_model: HiCo, film: pathlib.Path) -> None:
    where = [[i] for i in range(1, 15)]
    keep = set().union(*(haystack.needed(FRAMES, w, 4) for w in where))
    hay = haystack.encode(asked_model, film, haystack.indices(film, FRAMES, repeat=False), keep)
    (shown,) = pictures(1)

    def held() -> int:
        return sum(a.nbytes for a in jax.live_arrays())

    sizes = []
    for w in where:
        taken(asked_model, hay, haystack.at_pixels(asked_model, hay, [shown], FRAMES, w))
        sizes.append(held())
    assert len(set(sizes[1:])) == 1
