"""Exact frames of a film by display index, in bounded memory (PyAV).

The packets are listed once without decoding: their times sorted are the display order, whatever the GOP structure.
To reach a frame the reader decodes on, or jumps to the last keyframe shown before it when that saves work; both give
the same frames. Where the list cannot be trusted (no times, no keyframe at the start, AVI, a truncated or damaged
file) the film is decoded once to count what really comes out, and is then always read from the start.

In: a path and indices. Out: RGB uint8 frames, upright; squashed by swscale where the caller asks for it.
Next: data_pipeline/video.py
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Container, Iterator, Sequence
from typing import Any

import av
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipeline.containers import LEAKS, VideoError, guard, sniff
from hico_jax.shapes import Int, UInt8, ndarray

MAX_PIXELS = 1 << 26  # of one frame; larger is refused before anything is decoded
SMALL_PIXELS = 640 * 368  # below this a frame decodes faster without threads
SMALL_BYTES = 1 << 20  # the list of a file below this is small too, so that thousands are kept
SEEK_COST = 12  # a jump costs about as much as decoding this many frames

# Formats that hold colours at half the size, and those that hold them whole.
WHOLE = {"yuv420p": "yuv444p", "yuvj420p": "yuvj444p"}

Packet = tuple[int | None, int | None, bool]  # display time, decode time, keyframe


@dataclasses.dataclass(frozen=True)
class FilmIndex:
    """Where the frames of a film are. `times` is empty when the film can only be read from the start."""

    container: str
    num_frames: int
    fps: float
    stated_s: float  # duration that the stream states, 0 when it states none
    width: int  # upright
    height: int
    turns: int  # quarter turns counterclockwise that make a frame upright
    times: ndarray  # Int64[num_frames]: display time of each frame, in ticks
    keys: ndarray  # Int64[K 2]: display index and decode time of each keyframe
    damaged: bool  # something in the file could not be read

    @property
    def rotation(self) -> int:
        """Degrees counterclockwise by which stored frames are turned."""
        return 90 * self.turns


def film_index(path: str | os.PathLike[str]) -> FilmIndex:
    """List the frames of a film. Kept for the most recent files, for as long as they do not change.

    Raises:
      VideoError: not a film, no video stream, nothing that decodes.
    """
    path = os.path.abspath(path)
    container = sniff(path)
    if container in ("folder", "gif", "picture"):
        raise VideoError(f"{path}: this is a {container}, not a film")
    status = os.stat(path)
    read = _small if status.st_size < SMALL_BYTES else _large
    return read(path, container, status.st_mtime_ns, status.st_size)


def seeks(path: str | os.PathLike[str], indices: Int[ndarray, " T"]) -> bool:
    """Whether a film can be begun at its middle: tried once, or every piece would decode all before it."""
    path = os.path.abspath(path)
    index = film_index(path)
    if not len(index.times) or not len(indices):
        return False
    with guard(path, "decoding"):
        return next(_jumping(path, index, indices[len(indices) // 2 :][:1], 1), None) is not None


def iter_film(
    path: str | os.PathLike[str],
    indices: Sequence[int] | ndarray,
    threads: int = 0,
    size: tuple[int, int] | None = None,
) -> Iterator[UInt8[ndarray, "height width 3"]]:
    """The frame of each index, in order. Indices may repeat but not fall. One frame is held at a time.

    A frame that does not decode in a damaged film is replaced by the one shown before it, as players do. `threads` of
    the decoder; 0 chooses by the size of its frames. `size` (height, width) squashes with swscale's averages of areas,
    several times as fast as `image.resize` and a level or two off it.

    Raises:
      VideoError: the film cannot be read.
      ValueError: an index is outside the film, or indices fall.
    """
    path = os.path.abspath(path)
    index = film_index(path)
    wanted = np.asarray(indices, np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= index.num_frames):
        raise ValueError(f"{path} has {index.num_frames} frames; index {wanted.max()} is outside")
    if (np.diff(wanted) < 0).any():
        raise ValueError("frame indices must not fall; sort them first")
    if not wanted.size:
        return
    unique, counts = np.unique(wanted, return_counts=True)
    upright_of = _Upright(index, size)
    with guard(path, "decoding"):
        for frame, count in zip(_frames(path, index, unique, threads), counts, strict=True):
            upright = upright_of(frame)
            for _ in range(count):
                yield upright


# --- listing -----------------------------------------------------------------------------------------------------


def _index(path: str, container: str, _mtime: int, _size: int) -> FilmIndex:
    with guard(path, "reading"), _open(path, container) as film:
        stream = _video_stream(path, film)
        context = stream.codec_context
        if context.width * context.height > MAX_PIXELS:
            raise VideoError(f"{path}: frames of {context.width}x{context.height} are too large to decode")
        packets, listed, damaged = _packets(film, stream)
        damaged |= listed < stream.frames
        stated = float(stream.duration * stream.time_base) if stream.duration else float((film.duration or 0) / 1e6)
        rate = stream.average_rate or stream.guessed_rate
        exact = not damaged and container != "avi" and _ordered(packets)
    times, keys = _sorted(packets) if exact else (np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
    first, count, seen = _probe(path, container, whole=not exact)
    if first is None:
        raise VideoError(f"{path}: no frame can be decoded")
    if exact:
        count = len(times)
    elif rate is None and len(seen) > 1 and seen[-1] > seen[0]:
        rate = (len(seen) - 1) / (seen[-1] - seen[0])
    turns = round(first.rotation / 90) % 4
    width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
    if not rate:
        rate = count / stated if stated > 0 else 25.0
    return FilmIndex(container, count, float(rate), stated, width, height, turns, times, keys, damaged)


_small, _large = functools.lru_cache(maxsize=8192)(_index), functools.lru_cache(maxsize=64)(_index)


def _open(path: str, container: str) -> Any:
    options = {
        "format_whitelist": "matroska,webm" if container == "matroska" else container,
        "protocol_whitelist": "file",
    }
    return av.open(path, format=container, options=options, metadata_errors="replace")


def _video_stream(path: str, film: Any) -> Any:
    pictures = [s for s in film.streams.video if not int(s.disposition) & 0x400]  # 0x400: attached cover picture
    if not pictures:
        raise VideoError(f"{path}: there is no video in this file" + (", only sound" if film.streams.audio else ""))
    stream = pictures[0]
    if stream.codec_context is None:
        raise VideoError(f"{path}: the video codec of this file is not supported")
    return stream


def _packets(film: Any, stream: Any) -> tuple[list[Packet], int, bool]:
    """Packets that are shown, in file order; how many there are with the hidden ones; was something unreadable?"""
    found: list[Packet] = []
    listed, damaged = 0, False
    try:
        for packet in film.demux(stream):
            if packet.size == 0 and packet.dts is None:
                continue  # the flush packet at the end
            listed += 1
            damaged |= packet.is_corrupt
            if not packet.is_discard:
                found.append((packet.pts, packet.dts, packet.is_keyframe))
    except LEAKS:
        damaged = True
    return found, listed, damaged


def _ordered(packets: list[Packet]) -> bool:
    """Can display order be read off the packets? They need distinct times, none before the first keyframe."""
    times = {pts for pts, _, _ in packets}
    if not packets or None in times or len(times) != len(packets) or any(dts is None for _, dts, _ in packets):
        return False
    return packets[0][2] and packets[0][0] == min(t for t in times if t is not None)


def _sorted(packets: list[Packet]) -> tuple[ndarray, ndarray]:
    times = np.sort(np.array([pts for pts, _, _ in packets], np.int64))
    keys = np.array([(pts, dts) for pts, dts, key in packets if key], np.int64)
    keys = keys[np.argsort(keys[:, 0])]
    keys[:, 0] = np.searchsorted(times, keys[:, 0])
    return times, keys


def _probe(path: str, container: str, *, whole: bool) -> tuple[Any, int, list[float]]:
    """The first frame that decodes; with `whole`, also how many do and when they are shown."""
    first, count, seen = None, 0, []
    with _open(path, container) as film:
        for frame in _decode(film, _video_stream(path, film)):
            first = frame if first is None else first
            if not whole:
                break
            count += 1
            if frame.time is not None:
                seen.append(frame.time)
    return first, count, seen


# --- decoding ----------------------------------------------------------------------------------------------------


def _decode(film: Any, stream: Any, wanted: Container[int] | None = None) -> Iterator[Any]:
    """Frames in display order from where the file stands; packets that do not decode are passed over.

    With `wanted` (display times) other frames may be missing: those that no frame leans on are not decoded, about half
    of a usual H.264 film. Only that format says for certain which they are.
    """
    context = stream.codec_context
    packets = film.demux(stream)
    if context.name != "h264":
        wanted = None
    skips = False
    while True:
        try:
            packet = next(packets, None)
        except LEAKS:
            packet = None  # the rest of the file is unreadable: give what was read
        if wanted is not None:
            skip = packet is not None and packet.pts is not None and packet.pts not in wanted
            if skip != skips:
                context.skip_frame, skips = "NONREF" if skip else "DEFAULT", skip
        try:
            frames = context.decode(packet)
        except EOFError:
            return
        except LEAKS:
            frames = []
        yield from frames
        if packet is None:
            return


def _frames(path: str, index: FilmIndex, wanted: ndarray, threads: int) -> Iterator[Any]:
    """One decoded frame per wanted index (rising), jumping where that is cheaper and known to be exact."""
    done = 0
    if len(index.times):
        for frame in _jumping(path, index, wanted, threads):
            if frame is None:
                break
            yield frame
            done += 1
    if done < len(wanted):
        yield from _from_start(path, index, wanted[done:], threads)


def _jumping(path: str, index: FilmIndex, wanted: ndarray, threads: int) -> Iterator[Any]:
    """As `_frames`; gives None and ends when the file does not behave as its packets promised."""
    keys, times = index.keys, index.times
    with _open(path, index.container) as film:
        stream = _video_stream(path, film)
        _set_threads(stream.codec_context, index, threads)
        needed = set(times[wanted].tolist())
        source, position = _decode(film, stream, needed), 0  # `position`: index of the frame that comes next
        for target in wanted:
            key = keys[np.searchsorted(keys[:, 0], target, side="right") - 1, 0]
            jumped = key - position > SEEK_COST
            if jumped:  # by display time: sought by its decode time, an mp4 with B frames lands a keyframe too early
                film.seek(int(times[key]), stream=stream, backward=True, any_frame=False)
                source = _decode(film, stream, needed)
            frame = None
            for frame in source:
                if jumped and (frame.pts is None or frame.pts > times[target] or not _is_start(frame)):
                    frame = None  # landed late, or where frames still lean on earlier ones
                    break
                jumped = False
                if frame.pts is None or frame.pts >= times[target]:
                    break
            if frame is None or frame.pts != times[target]:
                yield None
                return
            position = int(target) + 1
            yield frame


def _is_start(frame: Any) -> bool:
    return bool(frame.key_frame) and int(frame.pict_type) in (0, 1)  # 1: intra; 0: the codec does not say


def _from_start(path: str, index: FilmIndex, wanted: ndarray, threads: int) -> Iterator[Any]:
    """Decode everything up to the last wanted frame, telling frames by time where times are known, else by counting."""
    with _open(path, index.container) as film:
        stream = _video_stream(path, film)
        _set_threads(stream.codec_context, index, threads)
        last, at, frames = None, -1, _decode(film, stream)
        following = next(frames, None)
        for target in wanted:
            while following is not None:
                place = at + 1
                if len(index.times) and following.pts is not None:
                    place = int(np.searchsorted(index.times, following.pts))
                if place > target and last is not None:
                    break
                last, at, following = following, place, next(frames, None)
                if at >= target:
                    break
            if last is None:
                raise VideoError(f"{path}: no frame can be decoded")
            yield last


def _set_threads(context: Any, index: FilmIndex, threads: int) -> None:
    threads = threads or min(4, os.cpu_count() or 1)
    alone = threads == 1 or index.width * index.height <= SMALL_PIXELS
    context.thread_type = "NONE" if alone else "AUTO"
    context.thread_count = 1 if alone else threads


class _Upright:
    """Frames as eight-bit RGB, at the film's own size or at another, turned as its metadata asks.

    One for each film that is read: a frame's own reformatter would plan the conversion anew each time.
    """

    def __init__(self, index: FilmIndex, size: tuple[int, int] | None) -> None:
        height, width = size or (index.height, index.width)
        self.width, self.height = (height, width) if index.turns % 2 else (width, height)
        self.turns, self.squashes = index.turns, size is not None
        self.scaling, self.converting = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: Any) -> UInt8[ndarray, "height width 3"]:
        if self.squashes:  # straight to RGB, swscale would halve the colours of the small picture once more
            frame = self._to(frame, self.scaling, WHOLE.get(frame.format.name, "rgb24"), interpolation="AREA")
        rgb = self._to(frame, self.converting, "rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, self.turns))

    def _to(self, frame: Any, reformatter: VideoReformatter, pixels: str, **how: Any) -> Any:
        return reformatter.reformat(frame, width=self.width, height=self.height, format=pixels, threads=1, **how)
