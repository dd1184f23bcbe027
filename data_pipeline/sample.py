"""One annotated sample, or one question, to a row: first its layout from numbers alone, then its pixels.

In: a `Sample`, or messages about a film. Out: a `Row`.
Next: data_pipeline/layout.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline import chat, image, layout, video
from data_pipeline.annotations import Sample
from data_pipeline.frames import time_message
from data_pipeline.layout import Visual
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import Tokenizer
from hico_jax.batch import Batch, Geometry
from hico_jax.shapes import UInt8, ndarray


class Lay(NamedTuple):
    """A row without pixels, and where its pixels come from."""

    row: layout.Row
    films: tuple[tuple[video.VideoInfo, ndarray], ...]  # a film and the indices of its frames
    pictures: tuple[str, ...]
    opened: list[Image.Image] | None


def lay_out(
    sample: Sample, config: DataConfig, geometry: Geometry, tokenizer: Tokenizer, rng: np.random.Generator
) -> Lay:
    """Tokenize a sample and place its visual tokens. Reads sizes and frame counts, decodes nothing but small pictures.

    Raises:
      ValueError: whatever makes the sample unusable, in one sentence.
    """
    films, opened, visuals, message = [], None, [], ""
    if sample.media == "video":
        for path in sample.paths:
            info = video.open_video(path, sample.reader)
            indices, duration = video.choose(info, config.sampling(), start=sample.start, end=sample.end, rng=rng)
            films.append((info, indices))
            visuals.append(Visual.film(len(indices), geometry))
            message = time_message(duration, indices, info.fps, config.time_message)
    elif sample.media == "image":
        opened = [image.read_image(p) for p in sample.paths]
        visuals = [_picture(i, len(opened), config, geometry) for i in opened]
    text = chat.encode_sample(
        tokenizer,
        sample.conversation,
        template=config.template,
        has_media=sample.media != "text",
        message=message,
    )
    row = layout.row(
        text.ids,
        text.labels,
        visuals,
        geometry,
        max_length=config.max_length or None,
        truncate=config.truncate,
    )
    return Lay(row, tuple(films), sample.paths if opened else (), opened)


def _picture(picture: Image.Image, count: int, config: DataConfig, geometry: Geometry) -> Visual:
    if config.image_aspect != "anyres_nopad" or count > 1:
        return Visual.picture()
    cols, rows = image.grid_shape(picture.size, geometry.image_px, image.parse_grid(config.image_grid))
    return Visual.picture(1 + rows * cols, (rows, cols))


def read_pixels(laid: Lay, geometry: Geometry, config: DataConfig) -> layout.Row:
    """The row with its clips and tiles.

    Raises:
      ValueError: a file cannot be decoded.
    """
    px = geometry.image_px
    clips, tiles = None, None
    if laid.films:
        clips = np.concatenate([read_clips(info, indices, geometry) for info, indices in laid.films])
    if laid.opened:
        made = image.picture_tiles(
            laid.opened, px, aspect=config.image_aspect, max_grid=image.parse_grid(config.image_grid)
        )
        tiles = np.concatenate([t for t, _ in made])
    return dataclasses.replace(laid.row, clips=clips, tiles=tiles)


def read_clips(info: video.VideoInfo, indices: ndarray, geometry: Geometry) -> UInt8[ndarray, "N T px px 3"]:
    """Frames of a film squashed to the tower's square, in clips."""
    px = geometry.image_px
    out = np.empty((len(indices), px, px, 3), np.uint8)
    order = np.argsort(indices, kind="stable")
    at = 0
    for piece in video.iter_frames(info.path, indices[order], (px, px)):
        out[order[at : at + len(piece)]] = piece
        at += len(piece)
    return out.reshape(-1, geometry.frames_per_clip, px, px, 3)
