"""A film to frames: any container PyAV reads, GIFs, folders of frames, single pictures. And frames to a film.

Frame i is always the i-th frame shown, whatever the time stamps say; the frame rate is the stream's average. Faults
are one `VideoError` naming the file. Memory does not grow with the film.

In: a path and how to sample. Out: frames uint8 [T, height, width, 3], their indices, frame rate and duration.
Next: data_pipeline/chat.py
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import fractions
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import av
import numpy as np

from data_pipeline import decode, stills
from data_pipeline.containers import VideoError, guard, sniff
from data_pipeline.frames import DEFAULT, Sampling, clip_window, folder_indices, frame_indices
from data_pipeline.image import resize
from hico_jax.shapes import Int, UInt8, ndarray

__all__ = [
    "READERS",
    "Frames",
    "VideoError",
    "VideoInfo",
    "choose",
    "iter_frames",
    "open_video",
    "read_frames",
    "write_video",
]

READERS = ("decord", "av", "gif", "img", "frame", "lazy")  # the reference's names; only the time arithmetic differs


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What is known of a film without reading its frames."""

    path: str
    kind: str  # "film", "gif", "folder" or "picture"
    num_frames: int
    fps: float
    duration_s: float
    width: int  # upright
    height: int
    rotation: int = 0  # degrees counterclockwise that were needed to make it upright
    damaged: bool = False  # part of the file could not be read; num_frames counts what can be


@dataclasses.dataclass(frozen=True)
class Frames:
    """Frames and the numbers that the time message needs."""

    frames: UInt8[ndarray, "T height width 3"]
    indices: Int[ndarray, " T"]
    fps: float
    duration_s: float


def open_video(path: str | os.PathLike[str], reader: str | None = None) -> VideoInfo:
    """Count frames and read sizes without decoding the film.

    The count comes from listing the packets, not from the header, which may lie. `reader` takes one of the reference's
    names; what the file is decides how it is read, and "av" decides that the duration is the one the stream states.

    Raises:
      VideoError: the file is missing, damaged or not a film.
      ValueError: unknown reader.
    """
    path = os.fspath(path)
    if reader is not None and reader not in READERS:
        raise ValueError(f"video_read_type is {reader!r}; it must be one of {', '.join(READERS)}")
    kind = sniff(path)
    if kind == "gif":
        count, width, height = stills.gif_size(path)
        return VideoInfo(path, kind, count, 1.0, float(count), width, height)
    if kind == "folder":
        files, fps = stills.folder_files(path), stills.folder_fps(path)
        height, width, _ = next(stills.iter_folder(files, [0])).shape
        return VideoInfo(path, kind, len(files), fps, len(files) / fps, width, height)
    if kind == "picture":
        height, width, _ = next(stills.iter_picture(path, [0])).shape
        return VideoInfo(path, kind, 1, 1.0, 1.0, width, height)
    film = decode.film_index(path)
    fps, duration = film.fps, film.num_frames / film.fps
    if (reader == "av" or film.container == "avi") and film.stated_s > 0:
        fps, duration = film.num_frames / film.stated_s, film.stated_s
    return VideoInfo(path, "film", film.num_frames, fps, duration, film.width, film.height, film.rotation, film.damaged)


def choose(
    info: VideoInfo,
    sampling: Sampling = DEFAULT,
    *,
    start: float | None = None,
    end: float | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Int[ndarray, " T"], float]:
    """Indices of the frames to see and the duration to tell the model, of the whole or of the part in seconds.

    Raises:
      VideoError: the part holds no frame, or the sampling chooses none.
    """
    if (start is None) != (end is None):
        start, end = start or 0.0, info.duration_s if end is None else end
    try:
        if info.kind == "folder":
            indices, duration = folder_indices(info.num_frames, info.fps, sampling, start_s=start, end_s=end, rng=rng)
        else:
            first, count, duration = 0, info.num_frames, info.duration_s
            if start is not None and end is not None:
                first, count, duration = clip_window(count, info.fps, start, end)
            indices = first + frame_indices(count, info.fps, sampling, rng)
    except ValueError as error:
        raise VideoError(f"{info.path}: {error}") from error
    if not len(indices):
        raise VideoError(f"{info.path}: sampling {sampling.sample!r} chooses no frame of {info.num_frames}")
    return np.minimum(indices, info.num_frames - 1), duration


def read_frames(
    path: str | os.PathLike[str],
    *,
    sampling: Sampling = DEFAULT,
    start: float | None = None,
    end: float | None = None,
    reader: str | None = None,
    size: tuple[int, int] | None = None,
    rng: np.random.Generator | None = None,
) -> Frames:
    """Sample a film, or its part from `start` to `end` seconds, optionally squashed to (height, width).

    Raises:
      VideoError: the film cannot be read, or the part holds no frame.
    """
    info = open_video(path, reader)
    indices, duration = choose(info, sampling, start=start, end=end, rng=rng)
    order = np.argsort(indices, kind="stable")
    height, width = size or (info.height, info.width)
    out = np.empty((len(indices), height, width, 3), np.uint8)
    for place, frame in zip(order, _iter(info, indices[order], size), strict=True):
        out[place] = frame
    return Frames(out, indices, info.fps, duration)


def iter_frames(
    path: str | os.PathLike[str],
    indices: Sequence[int] | ndarray,
    size: tuple[int, int] | None = None,
    chunk: int = 32,
    workers: int = 1,
    *,
    fast: bool = False,
) -> Iterator[UInt8[ndarray, "T height width 3"]]:
    """Frames of rising indices in pieces of at most `chunk`; never holds more than one piece.

    With `workers`, so many pieces of a film are decoded at the same time, each by a thread that opens it for itself,
    and twice as many are held. `fast` squashes films in the decoder's library instead of Pillow: not the same bytes.

    Raises:
      VideoError: the film cannot be read.
      ValueError: an index is outside the film, or indices fall.
    """
    info, indices = open_video(path), np.asarray(indices, np.int64)
    if workers > 1 and info.kind == "film" and len(indices) > chunk and decode.seeks(info.path, indices):
        parts = [indices[i : i + chunk] for i in range(0, len(indices), chunk)]
        yield from _side_by_side(lambda part: np.stack(list(_iter(info, part, size, 1, fast))), parts, workers)
        return
    held: list[ndarray] = []
    for frame in _iter(info, indices, size, fast=fast):
        held.append(frame)
        if len(held) == chunk:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack(held)


def _side_by_side(work: Callable[[ndarray], ndarray], parts: Sequence[ndarray], workers: int) -> Iterator[ndarray]:
    """`work` of each part in order; the next ones run meanwhile."""
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="decoding")
    try:
        under_way = collections.deque(pool.submit(work, part) for part in parts[: 2 * workers])
        for part in (*parts[2 * workers :], *(None,) * len(under_way)):
            yield under_way.popleft().result()
            if part is not None:
                under_way.append(pool.submit(work, part))
    finally:
        pool.shutdown(cancel_futures=True)


def _iter(
    info: VideoInfo, indices: ndarray, size: tuple[int, int] | None, threads: int = 0, fast: bool = False
) -> Iterator[UInt8[ndarray, "height width 3"]]:
    if len(indices) and not 0 <= indices.min() <= indices.max() < info.num_frames:
        raise ValueError(
            f"{info.path} has {info.num_frames} frames; indices {indices.min()} to {indices.max()} do not fit"
        )
    if info.kind == "gif":
        frames = stills.iter_gif(info.path, indices)
    elif info.kind == "folder":
        frames = stills.iter_folder(stills.folder_files(info.path), indices)
    elif info.kind == "picture":
        frames = stills.iter_picture(info.path, indices)
    else:
        frames = decode.iter_film(info.path, indices, threads, size if fast else None)
    for frame in frames:
        if size is not None and frame.shape[:2] == size:
            yield frame
        elif size is not None:
            yield resize(frame, *size)
        elif frame.shape[:2] == (info.height, info.width):
            yield frame
        else:
            raise VideoError(
                f"{info.path}: frames are {info.width}x{info.height} and {frame.shape[1]}x{frame.shape[0]}; "
                "give a size to squash them to"
            )


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8[ndarray, "height width 3"]],
    fps: float,
    *,
    crf: int = 18,
    preset: str = "veryfast",
    gop: int | None = None,
    options: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Write RGB frames as an H.264 mp4. The same frames give the same bytes; the file is complete or absent.

    Odd sizes keep full colour resolution, because halving needs even ones. `gop` is the longest distance between
    keyframes; `options` go to the encoder.

    Raises:
      ValueError: no frames, or frames of different shapes.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # x264's macroblock tree reads memory that it has not written: with it, the same frames sometimes give other bytes.
    settings = {"crf": str(crf), "preset": preset, "mbtree": "0"}
    settings |= ({"g": str(gop)} if gop else {}) | dict(options or {})
    try:
        with guard(os.fspath(path), "writing"):
            _encode(part, frames, fractions.Fraction(fps).limit_denominator(1001), settings)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _encode(part: pathlib.Path, frames: Iterable[ndarray], rate: fractions.Fraction, settings: dict[str, str]) -> None:
    container = {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(os.fspath(part), "w", format="mp4", container_options=container) as film:
        stream, shape = None, (0, 0, 0)
        for frame in frames:
            if stream is None:
                shape = frame.shape
                stream = film.add_stream("libx264", rate=rate, options=settings)
                stream.width, stream.height = shape[1], shape[0]
                stream.pix_fmt = "yuv444p" if shape[0] % 2 or shape[1] % 2 else "yuv420p"
                stream.codec_context.thread_count = 1  # x264 writes the number of threads into the file
            elif frame.shape != shape:
                raise VideoError(f"frames are {shape} and {frame.shape}; a film has one size")
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        if stream is None:
            raise VideoError(f"{part.name[1:].rsplit('.', 2)[0]}: there are no frames to write")
        film.mux(stream.encode())
