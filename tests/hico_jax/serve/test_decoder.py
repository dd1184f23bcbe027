"""Files are read in a process of their own, within limits, and nothing that they do reaches beyond it."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from data_pipeline import video
from data_pipeline.frames import Sampling
from hico_jax.serve.decoder import Decoder, Limits, MediaError

SEEN = Sampling("dynamic_fps1", 8, 16, 4)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def read(decoder: Decoder, path: pathlib.Path, **limits: float) -> tuple[dict, np.ndarray]:
    told, *chunks = decoder.read(str(path), limits=Limits(**limits), px=8, sampling=SEEN, chunk=4)  # type: ignore[arg-type]
    return told, np.concatenate(chunks)


def test_frames_are_those_read_here(decoder: Decoder, films: list[pathlib.Path]) -> None:
    told, frames = read(decoder, films[0])
    want = video.read_frames(films[0], sampling=SEEN, size=(8, 8))
    np.testing.assert_array_equal(frames, want.frames)
    assert (told["indices"], told["fps"], told["duration_s"]) == (want.indices.tolist(), want.fps, want.duration_s)


def test_limits_are_said_in_one_sentence(decoder: Decoder, films: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    for limits, message in (
        ({"duration_s": 5}, "lasts 12 s; at most 5 s"), ({"source_frames": 9}, "has 12 frames; at most 9"),
        ({"pixels": 100}, "64x64 are too large"), ({"seconds": 0.01}, "more memory or time"),
    ):  # fmt: skip
        with pytest.raises(MediaError, match=message) as error:
            read(decoder, films[0], **limits)
        assert str(tmp_path.parent) not in str(error.value)
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"(?i)exceeds limit|more than"):
        list(decoder.read(str(tmp_path / "a.png"), limits=Limits(pixels=1000), picture=True))
    _, pixels = decoder.read(str(tmp_path / "a.png"), picture=True)
    assert pixels.shape == (1, 300, 300, 3)
    (tmp_path / "b.mp4").write_bytes(films[0].read_bytes()[:900])
    with pytest.raises(MediaError):
        read(decoder, tmp_path / "b.mp4")


def test_a_dead_helper_is_replaced(decoder: Decoder, films: list[pathlib.Path]) -> None:
    read(decoder, films[0])
    assert decoder.process is not None
    decoder.process.kill()
    decoder.process.wait()
    time.sleep(0.05)
    assert read(decoder, films[0])[1].shape == (12, 8, 8, 3)
