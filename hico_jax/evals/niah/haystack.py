"""The haystack, encoded once: every trial is made of its tokens and of the few clips that a needle changes.

At feature level a needle is a clip of its own, four times the same picture, put between the tokens of two frames, as in
the paper. At pixel level it is four frames put between two frames of the film before the tower sees them; clips after
it hold the same frames as before, so only the clips that it cuts through are encoded anew.

In: a film and a model. Out: visual tokens on the device, and for each trial which of them stand where.
Next: hico_jax/evals/niah/probe.py
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from data_pipeline import video
from data_pipeline.image import pad_square, resize
from hico_jax import film
from hico_jax.batch import Geometry
from hico_jax.models.hico import HiCo
from hico_jax.shapes import Array, Float, Int, UInt8, ndarray

INSERTIONS = ("feature", "pixel")
Frame = tuple[str, int]  # ("film", index) or ("needle", which)


@dataclasses.dataclass(frozen=True)
class Haystack:
    """The film's tokens, and the pixels of the frames that needles will be put next to."""

    tokens: Float[Array, "1 S D"]
    num_frames: int
    pixels: Mapping[int, UInt8[ndarray, "px px 3"]] | UInt8[ndarray, "T px px 3"]
    distinct: int  # frames of the film itself, before it is repeated


def indices(path: str | os.PathLike[str], num_frames: int, *, repeat: bool) -> Int[ndarray, " T"]:
    """One frame a second from the start; `repeat` shows the film again where it is too short, as the paper's script.

    Raises:
      VideoError: the film cannot be read.
      ValueError: it is too short.
    """
    info = video.open_video(path)
    stride = max(1, round(info.fps))
    found = np.arange(0, info.num_frames, stride)
    if len(found) < num_frames and not repeat:
        raise ValueError(
            f"{os.fspath(path)} gives {len(found)} frames at one a second; {num_frames} were asked for. Choose fewer "
            "--frames, a longer film, or --repeat"
        )
    return np.resize(found, num_frames)


def encode(
    model: HiCo,
    path: str | os.PathLike[str],
    chosen: Int[ndarray, " T"],
    keep: Iterable[int] | None,
    *,
    clips_per_step: int = 16,
) -> Haystack:
    """Read and encode the chosen frames, a few clips at a time; pixels are kept only of the frames in `keep`.

    None keeps all of them, in a file that has no name and goes with the process.
    """
    geometry, kept = model.config.geometry(), range(len(chosen)) if keep is None else set(keep)
    pixels: Any = {}
    if keep is None:
        shape = (len(chosen), geometry.image_px, geometry.image_px, 3)
        with tempfile.TemporaryFile() as file:
            pixels = np.memmap(file, np.uint8, "w+", shape=shape)
    parts = []
    per_step = clips_per_step * geometry.frames_per_clip
    held: list[ndarray] = []
    for place, frame in enumerate(_frames(path, chosen, geometry.image_px)):
        held.append(frame)
        if place in kept:
            pixels[place] = frame
        if len(held) == per_step or place == len(chosen) - 1:
            parts.append(encode_clips(model, _clips(held, geometry), clips_per_step))
            held = []
    tokens = jnp.concatenate(parts, axis=1)
    return Haystack(tokens, len(chosen), pixels, len(np.unique(chosen)))


def _frames(path: str | os.PathLike[str], chosen: ndarray, px: int) -> Iterator[UInt8[ndarray, "px px 3"]]:
    """Frames padded to squares and resized; a film that is repeated is read again."""
    starts = [0, *(np.flatnonzero(np.diff(chosen) < 0) + 1), len(chosen)]
    for first, stop in itertools.pairwise(starts):
        for chunk in video.iter_frames(path, chosen[first:stop]):
            for frame in chunk:
                yield resize(np.asarray(pad_square(Image.fromarray(frame))), px, px)


def _clips(frames: Sequence[ndarray], geometry: Geometry) -> UInt8[ndarray, "N T px px 3"]:
    stacked = np.stack(frames)
    return stacked.reshape(-1, geometry.frames_per_clip, *stacked.shape[1:])


def encode_clips(model: HiCo, clips: UInt8[ndarray, "N T px px 3"], clips_per_step: int) -> Float[Array, "1 S D"]:
    """Tokens of clips, padded to one shape so that the tower is compiled once."""
    per_clip, parts = model.config.geometry().tokens_per_clip, []
    for first in range(0, len(clips), clips_per_step):
        part = clips[first : first + clips_per_step]
        full = np.zeros((1, clips_per_step, *clips.shape[1:]), np.uint8)
        full[0, : len(part)] = part
        none = np.zeros((1, 0, *clips.shape[2:]), np.uint8)
        parts.append(film.encode(model, full, none)[:, : len(part) * per_clip])
    return jnp.concatenate(parts, axis=1)


def alone(model: HiCo, pictures: Sequence[UInt8[ndarray, "px px 3"]]) -> Float[Array, "1 S D"]:
    """Tokens of each picture as a clip of its own, in which it is shown again and again."""
    repeated = np.stack([np.repeat(p[None], model.config.geometry().frames_per_clip, 0) for p in pictures])
    return encode_clips(model, repeated, len(pictures))


def places(num_frames: int, depth: float | None, pictures: int, shift: int = 0) -> list[int]:
    """Before which frame each picture stands: at the depth, or for a chain spread from the first to the last frame.

    `shift` moves a single picture by some frames. Pixel trials use it to meet clips at every phase: between two clips
    a needle is a clip of its own, and both kinds of insertion are the same.
    """
    if pictures == 1:
        assert depth is not None
        place = int(depth * num_frames)
        return [place + shift if place + shift <= num_frames else place - shift]
    return [int(j * num_frames / (pictures - 1)) for j in range(pictures)]


def sequence(num_frames: int, where: Sequence[int], repeats: int) -> list[Frame]:
    """The frames of a film with needles in it, in order; each picture is shown `repeats` times."""
    frames: list[Frame] = []
    first = 0
    for which, place in enumerate(where):
        frames += [("film", i) for i in range(first, place)] + [("needle", which)] * repeats
        first = place
    return frames + [("film", i) for i in range(first, num_frames)]


def changed(frames: Sequence[Frame], frames_per_clip: int) -> dict[int, tuple[Frame, ...]]:
    """Clips that are no clip of the film itself, by their place: those that must be encoded."""
    found = {}
    for clip in range(len(frames) // frames_per_clip):
        mine = tuple(frames[clip * frames_per_clip : (clip + 1) * frames_per_clip])
        kind, start = mine[0]
        whole = kind == "film" and start % frames_per_clip == 0
        if not whole or mine != tuple(("film", start + i) for i in range(frames_per_clip)):
            found[clip] = mine
    return found


def needed(num_frames: int, where: Sequence[int], frames_per_clip: int) -> set[int]:
    """Film frames whose pixels a pixel-level trial takes."""
    clips = changed(sequence(num_frames, where, frames_per_clip), frames_per_clip)
    return {i for clip in clips.values() for kind, i in clip if kind == "film"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """Which tokens stand where: an index into the haystack's tokens followed by `extra`."""

    index: Int[ndarray, " S"]
    extra: Float[Array, "1 S2 D"]


def at_features(
    hay: Haystack, needle: Float[Array, "1 S2 D"], num_frames: int, where: Sequence[int], geometry: Geometry
) -> Trial:
    """The needle's own tokens between those of two frames (`eval_vision_niah` in the reference).

    A clip's tokens have no order in time, so a place inside a clip cuts its group of tokens, as there.
    """
    per_frame, per_clip = geometry.tokens_per_clip // geometry.frames_per_clip, geometry.tokens_per_clip
    size, pieces, first = hay.tokens.shape[1], [], 0
    for which, place in enumerate(where):
        pieces += [np.arange(first, place * per_frame), size + which * per_clip + np.arange(per_clip)]
        first = place * per_frame
    pieces.append(np.arange(first, num_frames * per_frame))
    return Trial(np.concatenate(pieces).astype(np.int32), needle)


def at_pixels(
    model: HiCo,
    hay: Haystack,
    pictures: Sequence[UInt8[ndarray, "px px 3"]],
    num_frames: int,
    where: Sequence[int],
) -> Trial:
    """The tokens of the film with the pictures among its frames; only clips that they cut through are encoded."""
    geometry = model.config.geometry()
    per_clip, frames_per_clip = geometry.tokens_per_clip, geometry.frames_per_clip
    frames = sequence(num_frames, where, frames_per_clip)
    new = changed(frames, frames_per_clip)
    shown = {"film": hay.pixels, "needle": dict(enumerate(pictures))}
    clips = np.stack([np.stack([shown[kind][i] for kind, i in clip]) for clip in new.values()])
    order = {clip: n for n, clip in enumerate(new)}
    size, index = hay.tokens.shape[1], []
    for clip in range(len(frames) // frames_per_clip):
        whole = frames[clip * frames_per_clip][1] // frames_per_clip
        index.append((size + order[clip] * per_clip if clip in order else whole * per_clip) + np.arange(per_clip))
    most = 2 * len(where)  # a picture cuts through two clips at most; one shape serves every depth
    extra = encode_clips(model, clips, most)
    extra = jnp.pad(extra, ((0, 0), (0, most * per_clip - extra.shape[1]), (0, 0)))
    return Trial(np.concatenate(index).astype(np.int32), extra)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A film shuffled together with the frames of a needle that is not there yet: encoded once for all needles.

    Clips with a needle's frame are encoded for each; the tokens that stand for them here are of black frames.
    """

    hay: Haystack
    frames: tuple[Frame, ...]
    open: tuple[int, ...]  # clips that hold a frame of the needle


def mixed(
    model: HiCo, hay: Haystack, num_frames: int, pictures: int, rng: np.random.Generator, *, clips_per_step: int = 16
) -> Mixed:
    """The first `num_frames` of a film whose pixels are all kept, and room for a needle, in an order of no meaning."""
    geometry = model.config.geometry()
    whole = sequence(num_frames, [0] * pictures, geometry.frames_per_clip)
    frames = tuple(whole[i] for i in rng.permutation(len(whole)))
    black = np.zeros((geometry.image_px, geometry.image_px, 3), np.uint8)
    parts, step = [], clips_per_step * geometry.frames_per_clip
    for first in range(0, len(frames), step):
        shown = [black if kind == "needle" else hay.pixels[i] for kind, i in frames[first : first + step]]
        parts.append(encode_clips(model, _clips(shown, geometry), clips_per_step))
    held = sorted({place // geometry.frames_per_clip for place, (kind, _) in enumerate(frames) if kind == "needle"})
    return Mixed(Haystack(jnp.concatenate(parts, axis=1), len(frames), hay.pixels, hay.distinct), frames, tuple(held))


def at_random(model: HiCo, film: Mixed, pictures: Sequence[UInt8[ndarray, "px px 3"]]) -> Trial:
    """The shuffled film with this needle's frames where they fell."""
    geometry = model.config.geometry()
    per_clip, per = geometry.tokens_per_clip, geometry.frames_per_clip
    shown = {"film": film.hay.pixels, "needle": dict(enumerate(pictures))}
    clips = np.stack([
        np.stack([shown[kind][i] for kind, i in film.frames[clip * per : (clip + 1) * per]]) for clip in film.open
    ])  # fmt: skip
    extra = encode_clips(model, clips, len(clips))
    index = np.arange(film.hay.tokens.shape[1], dtype=np.int32).reshape(-1, per_clip)
    for n, clip in enumerate(film.open):
        index[clip] = index.size + n * per_clip + np.arange(per_clip)
    return Trial(index.reshape(-1), extra)


@jax.jit
def gather(
    hay: Float[Array, "1 S D"], extra: Float[Array, "1 S2 D"], index: Int[Array, " W"]
) -> Float[Array, "1 W D"]:  # fmt: skip
    """The trial's visual tokens. The haystack is read where it lies; nothing of its size is copied but the result."""
    size = hay.shape[1]
    old = jnp.take(hay, jnp.minimum(index, size - 1), axis=1)
    new = jnp.take(extra, jnp.clip(index - size, 0, extra.shape[1] - 1), axis=1)
    return jnp.where((index < size)[None, :, None], old, new)
