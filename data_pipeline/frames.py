"""Which frames of a film are seen, and the sentence that tells the model so. Pure functions of numbers.

In: how many frames a film has, its frame rate, the sampling options. Out: frame indices in display order
and the time message.
Next: data_pipeline/video.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hico_jax.shapes import Int, ndarray

SAMPLES = ("dynamic_fps1", "middle", "rand", "fix_start")  # and "fpsX", such as "fps0.5"


def parse_sample(sample: str) -> float:
    """The rate of an "fpsX" sample, 0.0 for the named ones.

    Raises:
      ValueError: not a known way to sample.
    """
    if sample in SAMPLES:
        return 0.0
    try:
        rate = float(sample[3:]) if sample.startswith("fps") else 0.0
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < float("inf"):
        raise ValueError(f"sample is {sample!r}; it must be one of {', '.join(SAMPLES)}, or 'fpsX' such as 'fps0.5'")
    return rate


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How frames are chosen. The defaults are those of the released inference code.

    `min_frames` wins over `max_frames`, as in the reference: asking for at most 32 with a minimum of 64 gives 64.
    """

    sample: str = "dynamic_fps1"  # one of SAMPLES, or "fpsX"
    min_frames: int = 64
    max_frames: int = 512  # 0 or less: no limit ("middle", "rand" and "fix_start" then need `num_wanted`)
    multiple: int = 8  # `dynamic_fps1` rounds to a multiple of this; the reference trains with 4 and infers with 8
    num_wanted: int | None = None  # frames asked for by "middle", "rand", "fix_start"; None: max_frames
    offset: int | None = None  # frames after the start of each interval; None: its middle ("fix_start": its start)

    def __post_init__(self) -> None:
        parse_sample(self.sample)
        if self.multiple < 1:
            raise ValueError(f"the frame multiple is {self.multiple}; it must be at least 1")
        if self.min_frames < 0:
            raise ValueError(f"min_frames is {self.min_frames}; it must be at least 0")
        if self.wanted < 1 and self.sample in SAMPLES[1:]:
            raise ValueError(f"sample {self.sample!r} needs a number of frames; set max_frames to at least 1")

    @property
    def wanted(self) -> int:
        return self.max_frames if self.num_wanted is None else self.num_wanted


DEFAULT = Sampling()


def frame_indices(
    num_frames: int, fps: float, sampling: Sampling = DEFAULT, rng: np.random.Generator | None = None
) -> Int[ndarray, " T"]:
    """Indices of the frames to see (`get_frame_indices` in the reference).

    `dynamic_fps1` takes one frame a second, rounded down to `multiple`, within the limits. A short film repeats
    its last frame. "fpsX" may give none when the film is shorter than half an interval.

    Raises:
      ValueError: the film has no frames, or no frame rate.

    Example:
      >>> frame_indices(90, 30.0, Sampling(min_frames=1, max_frames=8, multiple=4)).tolist()
      [10, 33, 55, 78]
    """
    if num_frames < 1:
        raise ValueError(f"cannot choose frames from {num_frames}; the film needs at least one")
    if not fps > 0:
        raise ValueError(f"the frame rate is {fps}; it must be above 0")
    rate = parse_sample(sampling.sample)
    if rate:
        return _at_rate(num_frames, fps, rate, sampling.max_frames)
    floor, wanted = sampling.min_frames, sampling.wanted
    dynamic = sampling.sample == "dynamic_fps1"
    if floor > num_frames:
        floor = num_frames // sampling.multiple * sampling.multiple if dynamic else num_frames
    if dynamic:
        wanted = per_second(num_frames / fps, sampling.multiple, sampling.max_frames)
    return _per_interval(num_frames, max(floor, wanted), sampling, rng)


def per_second(duration_s: float, multiple: int, max_frames: int) -> int:
    """One frame a second, rounded down to a multiple (at least one multiple), at most `max_frames` if positive."""
    wanted = multiple * max(1, int(duration_s // multiple))
    return min(wanted, max_frames) if max_frames > 0 else wanted


def _per_interval(
    num_frames: int, wanted: int, sampling: Sampling, rng: np.random.Generator | None
) -> Int[ndarray, " T"]:
    """One frame from each of `wanted` equal intervals; the last frame again when there are too few."""
    count = min(wanted, num_frames)
    edges = np.linspace(0, num_frames, count + 1).astype(np.int64)
    starts, lasts = edges[:-1], edges[1:] - 1
    if sampling.sample == "rand":
        rng = np.random.default_rng() if rng is None else rng
        room = (lasts > starts).all()  # the reference never takes an interval's last frame
        chosen = rng.integers(starts, lasts) if room else np.sort(rng.permutation(num_frames)[:count])
    elif sampling.sample == "fix_start" or sampling.offset is not None:
        chosen = starts + (sampling.offset or 0)
    else:
        chosen = (starts + lasts) // 2
    return np.concatenate([chosen, np.repeat(chosen[-1:], wanted - count)]).astype(np.int64)


def _at_rate(num_frames: int, fps: float, rate: float, max_frames: int) -> Int[ndarray, " T"]:
    """The frame nearest to the middle of each 1/rate seconds."""
    step = 1 / rate
    times = np.arange(0 + step / 2, num_frames / fps + step / 2, step)
    chosen = np.around(times * fps).astype(np.int64)
    chosen = chosen[chosen < num_frames]
    return chosen[:max_frames] if max_frames > 0 else chosen


def clip_window(num_frames: int, fps: float, start_s: float, end_s: float) -> tuple[int, int, float]:
    """First frame, number of frames and seconds of the part [start, end] of a film (the reference's `decord` reader).

    The end is kept 0.1 s before the end of the film.

    Raises:
      ValueError: nothing is left between start and end.

    Example:
      >>> clip_window(300, 30.0, 2.0, 7.5)
      (60, 165, 5.5)
    """
    start = max(0, start_s)
    end = min(num_frames / fps - 0.1, end_s)
    duration = end - start
    count = int(duration * fps)
    if count < 1:
        raise ValueError(
            f"the part from {start_s:g} s to {end_s:g} s holds no frame; the film lasts {num_frames / fps:.2f} s"
        )
    return int(start * fps), count, duration


def folder_indices(
    num_files: int,
    fps: float,
    sampling: Sampling = DEFAULT,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Int[ndarray, " T"], float]:
    """Indices and duration for a folder of frames (the reference's `img` reader, which has its own arithmetic).

    Without a part, the count follows the true rate but the choice is then repeated as at 1 frame a second. With a
    part, indices run evenly from round(start * fps), at least 1, to round(end * fps).

    Raises:
      ValueError: no files, or an empty part.
    """
    if num_files < 1:
        raise ValueError("cannot choose frames from an empty folder")
    if start_s is not None and end_s is not None:
        available = (min(num_files / fps, end_s) - max(0, start_s)) * fps  # the reference keeps the fraction
        if available <= 0:
            raise ValueError(
                f"the part from {start_s:g} s to {end_s:g} s holds no frame; the folder lasts {num_files / fps:.2f} s"
            )
    else:
        available = num_files
    duration = available / fps
    floor, wanted = sampling.min_frames, sampling.wanted
    dynamic = sampling.sample == "dynamic_fps1"
    if floor > available:
        floor = int(available // sampling.multiple * sampling.multiple if dynamic else available)
    if dynamic:
        wanted = max(floor, per_second(duration, sampling.multiple, sampling.max_frames))
    if start_s is None or end_s is None:
        asked = dataclasses.replace(sampling, min_frames=floor, num_wanted=wanted)
        return frame_indices(num_files, 1.0, asked, rng), duration
    first = max(1, round(start_s * fps))
    last = min(round(end_s * fps), num_files - 1)
    step = (last - first) / max(wanted - 1, 1)
    indices = first + np.round(step * np.arange(wanted)).astype(np.int64)
    return np.clip(indices, 0, num_files - 1), duration


def segment_centres(num_frames: int, num_segments: int) -> Int[ndarray, " T"]:
    """Evenly spaced indices starting half a segment in (`get_index`, which the reference's `lazy` reader uses).

    Example:
      >>> segment_centres(33, 4).tolist()
      [4, 12, 20, 28]
    """
    step = (num_frames - 1) / num_segments
    return int(step / 2) + np.round(step * np.arange(num_segments)).astype(np.int64)


def time_message(duration_s: float, indices: Sequence[int] | ndarray, fps: float, style: str = "short") -> str:
    """The sentence about duration and frames that follows the video placeholder.

    Raises:
      ValueError: unknown style.

    Example:
      >>> time_message(10.0, [0, 149], 30.0)
      '\\nThe video lasts for 10.00 seconds, and 2 frames are uniformly sampled from it. '
    """
    if style == "none":
        return ""
    head = f"\nThe video lasts for {duration_s:.2f} seconds, and {len(indices)} frames are uniformly sampled "
    if style == "short":
        return head + "from it. "
    if style == "long":
        return head + f"at {', '.join(str(round(float(i / fps), 1)) for i in indices)} seconds. "
    raise ValueError(f"time_message is {style!r}; it must be 'short', 'long' or 'none'")
