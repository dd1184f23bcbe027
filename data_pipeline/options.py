"""Every option of the host's side of training, with its unit. `hico_jax.config` embeds this.

In: values from a configuration. Out: a validated, hashable dataclass.
Next: data_pipeline/loader.py
"""

from __future__ import annotations

import dataclasses

from data_pipeline.chat import TRAIN_TEMPLATES
from data_pipeline.frames import Sampling
from data_pipeline.image import ASPECTS, GRID, candidates

TIME_MESSAGES = ("short", "long", "none")
RESIZES = ("exact", "fast")
TRUNCATIONS = ("error", "frames", "reference")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read, how to sample it, how to batch it.

    Raises:
      ValueError: an option is out of range; the message names the option and the values it takes.
    """

    annotations: str = ""  # YAML that lists annotation files (`data_path`), one .json/.jsonl, or a prepared folder
    data_root: str = ""  # media paths are below this where the YAML gives no root; "": beside the annotations
    tokenizer: str = ""  # folder with tokenizer.json or tokenizer.model
    batch_size: int = 8  # rows of a global batch, over all hosts
    template: str = "qwen_2"  # "qwen_2", or "plain" (stage 1: caption only)

    sample: str = "dynamic_fps1"  # "dynamic_fps1", "middle", "rand", "fix_start" or "fpsX"
    min_frames: int = 64  # `frames_lowbound`; wins over max_frames
    max_frames: int = 512  # `frames_upbound`; 0: no limit
    frame_multiple: int = 4  # frames of a film are a multiple of this: 4 in training, 8 in the released inference
    resize: str = "exact"  # films: Pillow's bicubic as in the reference; "fast": swscale, a level or two off it
    time_message: str = "short"  # "short", "long" or "none"
    image_aspect: str = "anyres_nopad"  # "anyres_nopad" (tiles), "square" (squash) or "pad"
    image_grid: str = GRID  # `image_grid_pinpoints`: columns x rows of tiles, smallest to largest

    max_length: int = 0  # tokens of a row with its visual tokens; 0: the model's own limit
    position_skip: int = 0  # rotary positions jump by up to this inside a row (`use_pos_skipping`); 0: they never do
    truncate: str = "error"  # a longer row is a bad sample; "frames": shows fewer frames; "reference": loses its end
    pack: int = 0  # several conversations share a row of up to this many tokens; 0: one conversation a row
    index_file: str = ""  # .npz that keeps the lengths packing plans by; "": measured at every start
    length_step: int = 128  # least step of automatic row lengths: 128 is what accelerators tile by, 16 suits a CPU
    length_buckets: tuple[int, ...] = ()  # allowed row lengths, rising; (): an automatic ladder
    clip_buckets: tuple[int, ...] = ()  # allowed numbers of clips in a row; (): an automatic ladder
    tile_buckets: tuple[int, ...] = ()  # allowed numbers of image tiles in a row; (): an automatic ladder
    group_by_modality_length: bool = True  # each batch all text or all media, rows of similar length

    seed: int = 42  # of shuffling and of random frame choice
    num_epochs: int = 1  # passes over the data; 0: without end
    max_bad_fraction: float = 0.05  # stop when more of the samples than this cannot be used; 0: at the first
    worker_count: int = 0  # processes that read; 0: threads of this process
    read_threads: int = 8  # rows read at the same time in each process
    prefetch_rows: int = 16  # rows read ahead; one of 512 frames at 224 px takes 77 MB
    cache_mb: int = 0  # decoded media kept in memory, for sets smaller than this; 0: off

    def __post_init__(self) -> None:
        self.sampling()
        _one_of("template", self.template, TRAIN_TEMPLATES)
        _one_of("time_message", self.time_message, TIME_MESSAGES)
        _one_of("image_aspect", self.image_aspect, ASPECTS)
        _one_of("resize", self.resize, RESIZES)
        _one_of("truncate", self.truncate, TRUNCATIONS)
        candidates(self.image_grid, 1)
        for name, least in (
            ("batch_size", 1), ("min_frames", 0), ("max_frames", 0), ("frame_multiple", 1), ("max_length", 0),
            ("position_skip", 0), ("pack", 0), ("num_epochs", 0), ("worker_count", 0), ("read_threads", 1),
            ("prefetch_rows", 1), ("cache_mb", 0), ("seed", 0), ("length_step", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}; it must lie in [0, 1]")
        for name in ("min_frames", "max_frames"):
            if getattr(self, name) % self.frame_multiple:
                raise ValueError(f"data.{name} is {getattr(self, name)}; give a multiple of data.frame_multiple")
        for name in ("length_buckets", "clip_buckets", "tile_buckets"):
            buckets = getattr(self, name)
            if list(buckets) != sorted(set(buckets)) or any(b < 0 for b in buckets):
                raise ValueError(f"data.{name} is {buckets}; it must rise and hold no negative number")

    def sampling(self) -> Sampling:
        """How frames are chosen."""
        return Sampling(self.sample, self.min_frames, self.max_frames, self.frame_multiple)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"data.{name} is {value!r}; it must be one of {', '.join(allowed)}")
