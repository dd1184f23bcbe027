"""What is asked, as the lanes need it: tokens, where visual tokens come from, and what stands at each place.

In: a row of `layout.py` and the media it shows. Out: a `Prompt`.
Next: hico_jax/serve/pool.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from data_pipeline import layout
from data_pipeline.buckets import ladder
from data_pipeline.drop import NEVER, stages
from hico_jax.api import Pictures
from hico_jax.batch import DropSchedule, Geometry
from hico_jax.film import Film
from hico_jax.shapes import Array, Float, Int, Int8, ndarray

Media = Film | Pictures


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row, ready to run. Two prompts begin alike exactly as far as their `names` do."""

    tokens: Int[ndarray, " L"]
    slots: Int[ndarray, " L"]
    names: Int[ndarray, " L"]  # a text token's id; of a visual token a negative number nobody else has
    visual: Float[Array, "1 S D"]
    survives: Int8[ndarray, " L"]  # even stages of the drop that each token survives
    kept: tuple[int, ...]  # visual tokens after each stage
    owner: str = ""  # whose it is: nobody else continues from it

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def num_visual(self) -> int:
        return int((self.slots >= 0).sum())

    def same(self, other: Prompt) -> int:
        """With how many tokens both begin; none of two owners."""
        return common(self.names, other.names) if self.owner == other.owner else 0

    def rows(self, stage: int) -> Int[ndarray, " M"]:
        """Which tokens are alive after so many even stages."""
        return np.flatnonzero(self.survives >= stage)


def prompt(row: layout.Row, media: Sequence[Media], geometry: Geometry, owner: str = "") -> Prompt:
    """The prompt of a row that shows `media`, in the order of their placeholders."""
    films = [one for one in media if isinstance(one, Film)]
    pictures = [one for one in media if not isinstance(one, Film)]
    per_clip = geometry.tokens_per_clip
    counts = [f.num_clips * per_clip for f in films] + [p.visual.shape[1] for p in pictures]
    ids = np.concatenate([_names(one.uid, n) for one, n in zip((*films, *pictures), counts, strict=True)] or [_NONE])
    names = np.where(row.slots >= 0, ids[np.maximum(row.slots, 0)], row.tokens)
    survives, kept = drop_of(row.slots, geometry.drop)
    return Prompt(row.tokens, row.slots, names, _visual(films, pictures, per_clip), survives, kept, owner)


_NONE = np.zeros(1, np.int64)


def _names(uid: int, count: int) -> Int[ndarray, " S"]:
    return -(np.int64(uid) * 2**32 + np.arange(count, dtype=np.int64)) - 1


def _visual(films: Sequence[Film], pictures: Sequence[Pictures], per_clip: int) -> Float[Array, "1 S D"]:
    """All visual tokens, films first as slots count them, padded to a few sizes."""
    if len(films) == 1 and not pictures:
        return films[0].visual
    parts = [f.visual[:, : f.num_clips * per_clip] for f in films] + [p.visual for p in pictures]
    if not parts:
        return jnp.zeros((1, 0, 0))
    whole = jnp.concatenate(parts, axis=1)
    return jnp.pad(whole, ((0, 0), (0, ladder(whole.shape[1], 64) - whole.shape[1]), (0, 0)))


def drop_of(slots: Int[ndarray, " L"], schedule: DropSchedule) -> tuple[Int8[ndarray, " L"], tuple[int, ...]]:
    """Even stages that each token of a row survives, and visual tokens after every stage."""
    survives = np.full(len(slots), NEVER, np.int8)
    visual = np.flatnonzero(slots >= 0)
    kept, survives[visual] = stages(len(visual), schedule, True)
    return survives, tuple(kept)


def common(a: ndarray, b: ndarray) -> int:
    """How far two arrays are equal."""
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size
