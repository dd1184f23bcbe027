"""Video-level compression as far as the host decides it: the `DropPlan` of a batch.

Even stages depend on counts alone, so the host says which visual tokens survive them. Attention stages choose on the
device; how many stay is fixed here, and with it every shape.

In: the slots and segments of a batch, and the schedule. Out: a `DropPlan`.
Next: hico_jax/models/compress/progressive.py
"""

from __future__ import annotations

import fractions
import functools
from collections.abc import Sequence

import numpy as np

from hico_jax.batch import Batch, DropPlan, DropSchedule
from hico_jax.shapes import Bool, Int8, ndarray

NEVER = 127  # `survives` of what is never dropped


@functools.lru_cache(maxsize=4096)
def even_indices(num: int, kept: int) -> tuple[int, ...]:
    """`kept` of `num` tokens, evenly: torch's integer `linspace(0, num - 1, kept)`.

    The first half counts up from 0 and truncates; the second counts down from the end, as one fused
    multiply-add, so the exact product is rounded once.

    Example:
      >>> even_indices(8, 3)
      (0, 3, 7)
    """
    if kept <= 1:
        return (0,) * kept
    step = (num - 1) / (kept - 1)
    i = np.arange(kept)
    half = kept // 2
    chosen = np.where(i < half, i * step, (num - 1) - step * (kept - 1 - i))
    for j in np.flatnonzero((i >= half) & (np.abs(chosen - np.round(chosen)) < 1e-6)):  # rounding could tell here
        chosen[j] = float(fractions.Fraction(num - 1) - fractions.Fraction(step) * (kept - 1 - int(j)))
    return tuple(chosen.astype(np.int64).tolist())


def plan_drop(
    batch: Batch,
    schedule: DropSchedule,
    *,
    labelled: Bool[ndarray, "B L"] | None = None,
    training: bool = True,
    multiple: int = 1,
    lengths: Sequence[int] = (),
    num_queries: int = 0,
    num_segments: int = 1,
) -> DropPlan:
    """Which tokens the even stages keep, how many every stage keeps, and the row lengths that follow.

    `labelled` marks tokens that are targets themselves; None reads it off the weights, which cannot tell for the
    first token of a segment. In training a segment that asks nothing keeps its tokens at attention stages.
    `multiple` rounds the lengths up; `lengths`, `num_queries` and `num_segments` are least values, so that hosts can
    agree.
    """
    slots, segments = np.asarray(batch.slots), np.asarray(batch.segments)
    if labelled is None:
        before = np.pad(np.asarray(batch.weights)[:, :-1] > 0, ((0, 0), (1, 0)))
        same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
        labelled = before & same & (slots < 0) & (segments > 0)
    if not training:
        labelled = np.zeros(slots.shape, bool)
    survives = np.full(slots.shape, NEVER, np.int8)
    keep = np.zeros((len(slots), max(1, num_segments, int(segments.max(initial=0))), schedule.num_stages), np.int32)
    asked = np.zeros(len(slots), np.int64)
    for b in range(len(slots)):
        for r in range(int(segments[b].max(initial=0))):
            (mine,) = np.nonzero(segments[b] == r + 1)
            asks = count_queries(labelled[b, mine])
            asked[b] += asks
            visual = mine[slots[b, mine] >= 0]
            keep[b, r], survives[b, visual] = stages(len(visual), schedule, asks > 0 or not training)
    text = ((segments > 0) & (slots < 0)).sum(1)
    needed = (text[:, None] + keep.sum(1)).max(0, initial=0)
    if len(lengths):
        needed = np.maximum(needed, lengths)
    return DropPlan(
        survives=survives,
        keep=keep,
        labelled=labelled,
        lengths=tuple(min(-(-int(n) // multiple) * multiple, slots.shape[1]) for n in needed),
        num_queries=max(1, num_queries, int(asked.max(initial=0))) if training else 0,
    )


def count_queries(labelled: Bool[ndarray, " L"]) -> int:
    """How many queries a segment has: tokens before a turn-on of `labelled`, the last before the first included."""
    return int((~labelled & np.roll(labelled, -1)).sum())


def stages(num_visual: int, schedule: DropSchedule, asks: bool) -> tuple[list[int], Int8[ndarray, " S"]]:
    """Tokens kept after each stage, and how many even stages each of the segment's visual tokens survives."""
    kept, now = [], num_visual
    alive, survives = np.arange(num_visual), np.full(num_visual, schedule.num_uniform, np.int8)
    for stage, most in enumerate(schedule.kept(num_visual)):
        if stage < schedule.num_uniform:
            chosen = np.asarray(even_indices(now, most), np.int64)
            survives[np.delete(alive, chosen)] = stage
            alive, now = alive[chosen], most
        elif asks:
            now = most
        kept.append(now)
    return kept, survives
