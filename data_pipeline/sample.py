"""One annotated sample to a row: first its layout from numbers alone, then its pixels.

In: a `Sample`. Out: a `Row`.
Next: data_pipeline/layout.py
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from data_pipeline import chat, image, layout, video
from data_pipeline.annotations import Sample
from data_pipeline.frames import Sampling, time_message
from data_pipeline.layout import Visual
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import Tokenizer
from hico_jax.batch import Geometry
from hico_jax.shapes import Bool, UInt8, ndarray


class Lay(NamedTuple):
    """A row without pixels, and where its pixels come from."""

    row: layout.Row
    films: tuple[tuple[video.VideoInfo, ndarray], ...] = ()  # a film and the indices of its frames
    pictures: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[object, ...]:
        """The same for rows with the same pixels."""
        return (*((info.path, indices.tobytes()) for info, indices in self.films), *self.pictures)


def lay_out(
    sample: Sample, config: DataConfig, geometry: Geometry, tokenizer: Tokenizer, rng: np.random.Generator
) -> Lay:
    """Tokenize a sample and place its visual tokens. Reads sizes and frame counts; no pixel is decoded for it.

    Raises:
      ValueError: whatever makes the sample unusable, in one sentence.
    """
    if sample.fault:
        raise ValueError(sample.fault)
    if not any(role == "assistant" and text.strip() for role, text in chat.read_turns(sample.conversation)):
        raise ValueError("the conversation has no answer; give it a turn of the assistant (gpt)")
    try:
        return _lay_out(sample, config, geometry, tokenizer, rng, config.sampling())
    except layout.RowTooLongError as error:
        if config.truncate != "frames" or sample.media == "text":
            raise
        fewer = config.sampling()
        while sample.media == "video":  # the text may shrink a little too: the message counts the frames
            over = -(-error.excess // (geometry.tokens_per_clip * len(sample.paths))) * geometry.frames_per_clip
            most = min(error.frames, fewer.max_frames or error.frames) // config.frame_multiple * config.frame_multiple
            most = (most - over) // config.frame_multiple * config.frame_multiple
            if most < max(config.frame_multiple, geometry.frames_per_clip):
                raise
            fewer = dataclasses.replace(fewer, min_frames=min(fewer.min_frames, most), max_frames=most)
            try:
                return _lay_out(sample, config, geometry, tokenizer, rng, fewer)
            except layout.RowTooLongError as again:
                error = again
        config = dataclasses.replace(config, image_aspect="square")  # one tile for each picture
        return _lay_out(sample, config, geometry, tokenizer, rng, fewer)


def _lay_out(
    sample: Sample, config: DataConfig, geometry: Geometry, tokenizer: Tokenizer, rng: np.random.Generator,
    sampling: Sampling,
) -> Lay:  # fmt: skip
    films, visuals, message = [], [], ""
    if sample.media == "video":
        for path in sample.paths:
            info = video.open_video(path, sample.reader)
            indices, duration = video.choose(info, sampling, start=sample.start, end=sample.end, rng=rng)
            films.append((info, indices))
            visuals.append(Visual.film(len(indices), geometry))
            message = time_message(duration, indices, info.fps, config.time_message)
    elif sample.media == "image":
        sizes = [image.read_size(p) for p in sample.paths]
        visuals = [_picture(size, len(sizes), config, geometry) for size in sizes]
    text = chat.encode_sample(
        tokenizer,
        sample.conversation,
        template=config.template,
        has_media=sample.media != "text",
        message=message,
    )
    try:
        row = layout.row(
            text.ids,
            text.labels,
            visuals,
            geometry,
            max_length=config.max_length or None,
            truncate=config.truncate,
        )
    except layout.RowTooLongError as error:
        error.frames = max((len(indices) for _, indices in films), default=0)
        raise
    return Lay(row, tuple(films), sample.paths if sample.media == "image" else ())


def _picture(size: tuple[int, int], count: int, config: DataConfig, geometry: Geometry) -> Visual:
    if config.image_aspect != "anyres_nopad" or count > 1:
        return Visual.picture()
    cols, rows = image.grid_shape(size, geometry.image_px, config.image_grid)
    return Visual.picture(1 + rows * cols, (rows, cols))


def read_pixels(
    laid: Lay, geometry: Geometry, config: DataConfig, held: Bool[ndarray, " N"] | None = None
) -> layout.Row:
    """The row with its tiles and its clips, or those of them that are `held` here: the others are not decoded.

    Raises:
      ValueError: a file cannot be decoded.
    """
    px, fast = geometry.image_px, config.resize == "fast"
    clips, tiles = None, None
    if laid.films:
        seen = [indices for _, indices in laid.films]
        if held is not None:
            parts = np.split(np.repeat(held, geometry.frames_per_clip), np.cumsum([len(i) for i in seen])[:-1])
            seen = [indices[part] for indices, part in zip(seen, parts, strict=True)]
        clips = np.concatenate([read_clips(f[0], i, geometry, fast) for f, i in zip(laid.films, seen, strict=True)])
    if laid.pictures:
        opened = [image.read_image(p) for p in laid.pictures]
        made = image.picture_tiles(opened, px, aspect=config.image_aspect, grid=config.image_grid)
        tiles = np.concatenate([t for t, _ in made])
    return dataclasses.replace(laid.row, clips=clips, tiles=tiles, held=held if laid.films else None)


def read_clips(
    info: video.VideoInfo, indices: ndarray, geometry: Geometry, fast: bool = False
) -> UInt8[ndarray, "N T px px 3"]:
    """Frames of a film squashed to the tower's square, in clips."""
    px = geometry.image_px
    out = np.empty((len(indices), px, px, 3), np.uint8)
    order = np.argsort(indices, kind="stable")
    at = 0
    for piece in video.iter_frames(info.path, indices[order], (px, px), fast=fast):
        out[order[at : at + len(piece)]] = piece
        at += len(piece)
    return out.reshape(-1, geometry.frames_per_clip, px, px, 3)
