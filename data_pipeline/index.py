"""The order of data as data: mixture, shuffle, packs and batches of any epoch, planned from a seed and hashed.

    mixture   each dataset gives round(weight * its size) items an epoch, a part of its own endless shuffle
    packs     conversations that share a row (only with `pack`): first fit, longest first, over windows of the items
    batches   rows cut into global batches (order.py)

Whatever the number of hosts, threads or processes, a step names the same samples, so a run's position is one integer.

In: the samples' numbers. Out: which samples make which row of which step.
Next: data_pipeline/order.py
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.order import epoch_order, steps_per_epoch
from hico_jax.shapes import Int, ndarray

WINDOW = 4096  # items over which rows are packed together
OPEN = 64  # rows of a window that are open at a time
_LOCK = threading.Lock()  # readers are threads


class Epoch(NamedTuple):
    """The rows of an epoch, a whole number of global batches: row r is `items[starts[r]:starts[r + 1]]`."""

    items: Int[ndarray, " n"]
    starts: Int[ndarray, " r"]


class Index:
    """The plan of a run.

    `lengths` are modality lengths (negative: text), `tokens` how long each sample's row is (only packing needs it),
    `datasets` the dataset of each sample, `weights` how often an epoch shows each of its samples.
    """

    def __init__(
        self,
        lengths: Sequence[int] | ndarray,
        batch_size: int,
        seed: int,
        *,
        group: bool,
        datasets: Sequence[int] | ndarray | None = None,
        weights: Sequence[float] | None = None,
        tokens: Sequence[int] | ndarray | None = None,
        pack: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.batch_size, self.seed, self.group, self.pack = batch_size, seed, group, pack
        self.datasets = np.zeros(len(self.lengths), np.int64) if datasets is None else np.asarray(datasets, np.int64)
        self.weights = [1.0] * (int(self.datasets.max(initial=0)) + 1) if weights is None else list(weights)
        self.tokens = None if tokens is None else np.asarray(tokens, np.int64)
        if pack and self.tokens is None:
            raise ValueError("packing needs the length of every sample")
        self._epochs: dict[int, Epoch] = {}
        self._ends: list[int] = []  # steps up to the end of each epoch; only packs make epochs differ
        items = len(self._mixture(0))
        plain = all(w == 1 for w in self.weights) and not pack
        self._per_epoch = 0 if pack else steps_per_epoch(self.lengths, batch_size, group=group) if plain else None
        if self._per_epoch is None:
            self._per_epoch = 0 if group else max(1, items // batch_size)

    def steps(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        if self._per_epoch:
            return self._per_epoch * epochs
        with _LOCK:
            while len(self._ends) < epochs:
                rows = len(self.epoch(len(self._ends)).starts) - 1
                self._ends.append(rows // self.batch_size + (self._ends[-1] if self._ends else 0))
        return self._ends[epochs - 1] if epochs else 0

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number within it."""
        if self._per_epoch:
            return divmod(step, self._per_epoch)
        epoch = next((e for e, end in enumerate(self._ends) if step < end), len(self._ends))
        while step >= self.steps(epoch + 1):
            epoch += 1
        return epoch, step - self.steps(epoch)

    def row(self, step: int, place: int) -> tuple[int, ...]:
        """The samples of one row of a global batch."""
        number, within = self.locate(step)
        epoch = self.epoch(number)
        at = within * self.batch_size + place
        return tuple(epoch.items[epoch.starts[at] : epoch.starts[at + 1]].tolist())

    def epoch(self, number: int) -> Epoch:
        """The rows of an epoch. Two are kept: readers ahead of a boundary need both."""
        found = self._epochs.get(number)
        if found is None:
            found = self._make(number)
            self._epochs = {k: v for k, v in self._epochs.items() if abs(k - number) == 1} | {number: found}
        return found

    def digest(self) -> str:
        """Changes when a saved position would no longer name the same rows."""
        told = hashlib.sha256(repr((self.batch_size, self.seed, self.group, self.pack, self.weights)).encode())
        for array in (self.lengths, self.datasets, self.tokens if self.pack else None):
            told.update(b"" if array is None else np.ascontiguousarray(array, "<i8").tobytes())
        return told.hexdigest()

    def order_digest(self, steps: int) -> str:
        """Of which samples come in the first `steps` steps, in order."""
        rows = [self.row(step, place) for step in range(steps) for place in range(self.batch_size)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def _mixture(self, epoch: int) -> Int[ndarray, " n"]:
        if all(w == 1 for w in self.weights):
            return np.arange(len(self.lengths))
        parts = []
        for number, weight in enumerate(self.weights):
            (mine,) = np.nonzero(self.datasets == number)
            count = round(weight * len(mine)) or bool(len(mine))
            first, last = epoch * count, (epoch + 1) * count
            rounds = range(first // max(1, len(mine)), -(-last // max(1, len(mine))))
            stream = [np.random.default_rng((self.seed, number, r, 1)).permutation(mine) for r in rounds]
            begin = first - rounds.start * len(mine)
            parts.append(np.concatenate([*stream, mine[:0]])[begin : begin + count])
        return np.concatenate(parts)

    def _make(self, number: int) -> Epoch:
        items = self._mixture(number)
        starts = np.arange(len(items) + 1)
        row_lengths = self.lengths[items]
        if self.pack and self.tokens is not None:
            rng = np.random.default_rng((self.seed, number, 2))
            items, starts = self._packed(rng.permutation(items))
            kinds = np.sign(self.lengths[items[starts[:-1]]]) if len(items) else np.zeros(0, np.int64)
            row_lengths = np.add.reduceat(self.tokens[items], starts[:-1]) * np.where(kinds < 0, -1, 1)
        order = epoch_order(row_lengths, self.batch_size, self.seed, number, group=self.group)
        counts = np.diff(starts)[order]
        ends = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
        return Epoch(items[np.repeat(starts[:-1][order], counts) + within], ends)

    def _packed(self, items: ndarray) -> tuple[ndarray, ndarray]:
        """Rows of at most `pack` tokens, of one kind when batches are grouped; a longer sample has its row alone."""
        kinds = [items[self.lengths[items] >= 0], items[self.lengths[items] < 0]] if self.group else [items]
        assert self.tokens is not None
        rows: list[list[int]] = []
        for kind in kinds:
            for i in range(0, len(kind), WINDOW):
                window = kind[i : i + WINDOW]
                longest_first = window[np.argsort(-self.tokens[window], kind="stable")]
                rows += first_fit(longest_first.tolist(), self.tokens, self.pack)
        counts = np.array([0, *map(len, rows)])
        return np.array([item for row in rows for item in row], np.int64), np.cumsum(counts)


def first_fit(items: Sequence[int], tokens: ndarray, room: int) -> list[list[int]]:
    """Rows of at most `room` tokens: each item, in its order, goes into the first open row that holds it.

    Example:
      >>> first_fit([0, 1, 2, 3], np.array([60, 50, 40, 50]), 100)
      [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    left: list[int] = []
    open_from = 0
    for item in items:
        size = int(tokens[item])
        place = next((i for i in range(open_from, len(rows)) if left[i] >= size), None)
        if place is None:
            rows.append([item])
            left.append(room - size)
            open_from = max(open_from, len(rows) - OPEN)
        else:
            rows[place].append(item)
            left[place] -= size
    return rows
