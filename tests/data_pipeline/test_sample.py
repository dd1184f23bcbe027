from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data_pipeline import sample as samples
from data_pipeline.annotations import Sample
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import train_bpe
from hico_jax.batch import Geometry

GEOMETRY = Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=4, tokens_per_image=4, max_length=400)
CONFIG = DataConfig(annotations="x", min_frames=4, max_frames=8)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def small():
    return train_bpe(["What is seen? The video lasts for seconds, and frames are uniformly sampled from it."] * 4, 330)


def talk(question="<image>\nWhat?", answer="a ball"):
    return ({"from": "human", "value": question}, {"from": "gpt", "value": answer})


def make(sample, small, config=CONFIG):
    laid = samples.lay_out(sample, config, GEOMETRY, small, RNG)
    return samples.read_pixels(laid, GEOMETRY, config)


def test_a_film(film, film_kit, small):
    row = make(Sample("a", "s", "video", (str(film),), talk()), small)
    assert (row.num_clips, row.num_tiles) == (1, 0)
    assert row.clips.shape == (1, 4, 8, 8, 3)
    assert row.tiles is None
    text = small.decode(row.tokens[row.slots < 0], skip_special=False)
    assert "user\n\nThe video lasts for 2.00 seconds, and 4 frames are uniformly sampled from it. \nWhat?" in text
    assert (row.slots >= 0).sum() == 4
    learnt = row.labels[row.labels >= 0]
    assert "a ball" in small.decode(learnt)


def test_frames_stand_in_order_in_their_clips(film, film_kit, small):
    large = dataclasses.replace(GEOMETRY, image_px=80)
    config = dataclasses.replace(CONFIG, sample="middle")
    laid = samples.lay_out(Sample("a", "s", "video", (str(film),), talk()), config, large, small, RNG)
    clips = samples.read_pixels(laid, large, config).clips
    assert clips.shape == (2, 4, 80, 80, 3)
    numbers = [film_kit.read_number(f) for f in clips.reshape(-1, 80, 80, 3)]
    assert numbers == laid.films[0][1].tolist() == [2, 8, 14, 21, 27, 33, 39, 46]


def test_films_are_squashed_as_the_option_says(film, small):
    exact, fast = (
        make(Sample("a", "s", "video", (str(film),), talk()), small, dataclasses.replace(CONFIG, resize=how)).clips
        for how in ("exact", "fast")
    )
    assert exact.shape == fast.shape
    assert (exact != fast).any()


def test_pictures(tmp_path, small):
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    one = make(Sample("a", "s", "image", (path,), talk()), small)
    assert one.tiles.shape == (3, 8, 8, 3)
    assert one.slots[one.slots >= 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    two = make(Sample("a", "s", "image", (path, path), talk("<image>\n<image>\nSame?")), small)
    assert two.tiles.shape == (2, 8, 8, 3)
    square = make(Sample("a", "s", "image", (path,), talk()), small, dataclasses.replace(CONFIG, image_aspect="square"))
    assert square.num_tiles == 1
    assert "lasts" not in small.decode(square.tokens)


def test_text(small):
    row = make(Sample("a", "s", "text", (), talk("What is <image>?")), small)
    assert (row.clips, row.tiles, row.num_clips) == (None, None, 0)
    assert "<image>" in small.decode(row.tokens)


def test_a_caption(film, small):
    config = dataclasses.replace(CONFIG, template="plain")
    row = make(Sample("a", "s", "video", (str(film),), talk("<image>", "a ball")), small, config)
    assert row.slots[:4].tolist() == [0, 1, 2, 3]
    assert small.decode(row.tokens[4:]) == "a ball\n"


@pytest.mark.parametrize(
    ("sample", "changed", "fault"),
    [
        (Sample("a", "s", "video", ("/none.mp4",), talk()), {}, r"/none\.mp4: no such file"),
        (Sample("a", "s", "image", ("/none.png",), talk()), {}, r"/none\.png: no such file"),
        (Sample("a", "s", "video", ("FILM",), talk("What?")), {}, "0 <image> placeholders for 1"),
        (Sample("a", "s", "video", ("FILM",), talk()), {"max_length": 20}, r"the limit is 20; raise data\.max_length"),
        (Sample("a", "s", "video", ("FILM",), talk()), {"frame_multiple": 2, "min_frames": 6}, "6 frames do not make"),
        (Sample("a", "s", "video", ("FILM",), talk(), start=7.0, end=8.0), {}, "holds no frame"),
    ],
)
def test_faults(sample, changed, fault, film, small):
    sample = dataclasses.replace(sample, paths=tuple(str(film) if p == "FILM" else p for p in sample.paths))
    with pytest.raises(ValueError, match=fault):
        samples.lay_out(sample, dataclasses.replace(CONFIG, **changed), GEOMETRY, small, RNG)
