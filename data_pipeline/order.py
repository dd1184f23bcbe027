"""In which order samples are seen: one seeded permutation an epoch, cut into global batches.

The plan is data: any host can compute where it stands from one integer, whatever the number of hosts.

In: the modality lengths of the samples. Out: sample indices, batch after batch.
Next: data_pipeline/loader.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hico_jax.shapes import Int, ndarray

MEGABATCH = 8  # batches that are sorted by length together


def epoch_order(
    lengths: Sequence[int] | ndarray, batch_size: int, seed: int, epoch: int, *, group: bool
) -> Int[ndarray, " n"]:
    """Sample indices of one epoch, a whole number of global batches long; the few samples left over sit it out.

    With `group`, a batch is all media or all text (negative lengths) and its rows have similar lengths
    (`group_by_modality_length`; the permutation is our own). Samples left over change with the epoch. A set smaller
    than one batch is repeated to fill it.
    """
    rng = np.random.default_rng((seed, epoch))
    lengths = np.asarray(lengths, np.int64)
    kinds = [np.flatnonzero(lengths >= 0), np.flatnonzero(lengths < 0)] if group else [np.arange(len(lengths))]
    batches = [b for k in kinds for b in _batches(rng.permutation(k), np.abs(lengths), batch_size, rng, group)]
    if not batches:
        mixed = max(kinds, key=len) if group else np.arange(len(lengths))
        return np.resize(rng.permutation(mixed), batch_size)
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def _batches(
    shuffled: ndarray, lengths: ndarray, batch_size: int, rng: np.random.Generator, group: bool
) -> list[ndarray]:
    whole = len(shuffled) // batch_size * batch_size
    shuffled = shuffled[:whole]
    if group:  # sorted within groups of batches, so that a batch's rows are alike and batches still vary
        span = MEGABATCH * batch_size
        parts = [shuffled[i : i + span] for i in range(0, whole, span)]
        parts = [p[np.argsort(-lengths[p], kind="stable")] for p in parts]
        shuffled = np.concatenate(parts) if parts else shuffled
    # Within a batch the order is random again: hosts take every so-many-th row and should get equal work.
    return [rng.permutation(b) for b in shuffled.reshape(-1, batch_size)]


def steps_per_epoch(lengths: Sequence[int] | ndarray, batch_size: int, *, group: bool) -> int:
    """Global batches in an epoch; the same in every epoch."""
    lengths = np.asarray(lengths, np.int64)
    counts = [int((lengths >= 0).sum()), int((lengths < 0).sum())] if group else [len(lengths)]
    return max(1, sum(c // batch_size for c in counts))
