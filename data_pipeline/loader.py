"""Annotations to batches: the whole host side of training, read top to bottom.

    samples -> seeded order -> rows of this host -> text and layout, then pixels -> batches of few shapes

In: a `DataConfig` and the model's `Geometry`. Out: an iterator of `Loaded` (a `Batch` with NumPy leaves, and what is
in it) whose position is a small JSON value.
Next: hico_jax/train.py
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from data_pipeline import buckets, layout
from data_pipeline.annotations import Sample, read_annotations
from data_pipeline.options import DataConfig
from data_pipeline.order import epoch_order, steps_per_epoch
from data_pipeline.sample import Lay, lay_out, read_pixels
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from hico_jax.batch import Batch, Geometry

ENDLESS = 1 << 40  # steps of a run without end


@dataclasses.dataclass(frozen=True)
class Info:
    """What a batch holds, for logs."""

    step: int  # counted over epochs, from 0
    epoch: int
    ids: tuple[str, ...]  # of this host's rows
    sources: tuple[str, ...]  # their annotation files
    waste: float  # part of this host's token places that is padding
    bad: tuple[str, ...]  # "id (source): reason" of rows that became masked dummies
    bad_total: Mapping[str, int]  # bad rows of each source since the start


class Loaded(NamedTuple):
    """One step's data."""

    batch: Batch
    info: Info

    @property
    def ids(self) -> tuple[str, ...]:
        return self.info.ids


class Made(NamedTuple):
    """One row of this host, and the sizes that the global batch needs as far as this row's neighbours tell."""

    sample: int
    row: layout.Row
    sizes: layout.Sizes
    fault: str


class TooManyBadSamplesError(ValueError):
    """More samples than `max_bad_fraction` could not be used."""


def make_loader(
    config: DataConfig,
    geometry: Geometry,
    tokenizer: Tokenizer | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    start: Mapping[str, Any] | None = None,
) -> Loader:
    """The batches of a configuration, for one host of several.

    Every host computes the same global plan and reads its own rows. `start` is a state from `get_state`.

    Raises:
      ValueError: annotations or tokenizer cannot be read, or rows do not divide over hosts.
    """
    if not config.annotations:
        raise ValueError("data.annotations is empty; give the path of a YAML that lists annotation files")
    if config.batch_size % process_count:
        raise ValueError(
            f"data.batch_size is {config.batch_size} for {process_count} hosts; make it a multiple of the hosts"
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer)
    samples = read_annotations(config.annotations, config.data_root, seed=config.seed)
    return Loader(Plan(config, geometry, samples, tokenizer, process_index, process_count), start)


class Plan:
    """Which row comes when, and how it is made. Knows no position; safe to call from several threads."""

    def __init__(
        self,
        config: DataConfig,
        geometry: Geometry,
        samples: Sequence[Sample],
        tokenizer: Tokenizer,
        host: int,
        hosts: int,
    ) -> None:
        self.config, self.geometry, self.samples, self.tokenizer = config, geometry, samples, tokenizer
        self.host, self.hosts = host, hosts
        self.lengths = np.array([s.modality_length for s in samples])
        grouped = config.group_by_modality_length
        self.steps_per_epoch = steps_per_epoch(self.lengths, config.batch_size, group=grouped)
        self.rows_per_step = config.batch_size // hosts
        self.fixed = all(len(b) == 1 for b in (config.length_buckets, config.clip_buckets, config.tile_buckets))
        self._order = functools.lru_cache(maxsize=2)(self._epoch)
        self._cache = _Cache(config.cache_mb << 20 if config.sample != "rand" else 0)

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_order", "_cache")}
        return kept | {"cache_bytes": self._cache.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._cache = _Cache(state.pop("cache_bytes"))
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        c = self.config
        return epoch_order(self.lengths, c.batch_size, c.seed, epoch, group=c.group_by_modality_length)

    def fingerprint(self) -> str:
        """Changes when a saved position would no longer name the same rows."""
        told = hashlib.sha256(repr([(s.id, s.source) for s in self.samples]).encode())
        c = self.config
        told.update(repr((c.batch_size, c.seed, c.group_by_modality_length)).encode())
        return told.hexdigest()[:16]

    def sample_at(self, step: int, place: int) -> int:
        """Index of the sample in a place of a global batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return int(self._order(epoch)[within * self.config.batch_size + place])

    def make(self, number: int) -> Made:
        """Row `number` of this host: row p of every `hosts` rows of a global batch is host p's.

        Hosts must pad to one shape. So each lays out, without pixels, the rows that the others make beside its own;
        where every bucket is fixed there is nothing to agree on.
        """
        step, local = divmod(number, self.rows_per_step)
        first = local * self.hosts
        mine = self.sample_at(step, first + self.host)
        row, sizes, fault = self._row(mine, step)
        if self.config.position_skip:
            rng = np.random.default_rng((self.config.seed, step, first + self.host))
            row = layout.skip_positions(row, self.config.position_skip, rng)
        if self.hosts > 1 and (not self.fixed or self.geometry.drop.num_stages):
            for place in range(first, first + self.hosts):
                if place != first + self.host:
                    sizes = sizes.union(self._sizes(self._lay_out(self.sample_at(step, place), step)[0].row))
        return Made(mine, row, sizes, fault)

    def _sizes(self, row: layout.Row) -> layout.Sizes:
        return layout.measure(row, self.geometry)

    def _row(self, index: int, step: int) -> tuple[layout.Row, layout.Sizes, str]:
        """A row of this host. Its sizes are those of its layout even where its pixels fail: others count with them."""
        laid, fault = self._lay_out(index, step)
        row, sizes = laid.row, self._sizes(laid.row)
        if not fault:
            try:
                kept = self._cache.get(laid.media)
                if kept is None:
                    kept = read_pixels(laid, self.geometry, self.config)
                    self._cache.put(laid.media, kept)
                row = dataclasses.replace(row, clips=kept.clips, tiles=kept.tiles)
            except ValueError as error:  # every fault of a file or an annotation is one
                row, fault = self._dummy().row, _reason(error)
        return row, sizes, fault

    def _lay_out(self, index: int, step: int) -> tuple[Lay, str]:
        rng = np.random.default_rng((self.config.seed, step // self.steps_per_epoch, index))
        try:
            return lay_out(self.samples[index], self.config, self.geometry, self.tokenizer, rng), ""
        except ValueError as error:
            return self._dummy(), _reason(error)

    def _dummy(self) -> Lay:
        """A row that takes part but teaches nothing."""
        row = layout.row([self.tokenizer.pad_id, self.tokenizer.pad_id], None, [], self.geometry)
        return Lay(row)

    def collate(self, made: Sequence[Made]) -> Batch:
        """This host's part of a global batch, in the shape that all hosts choose."""
        c, g = self.config, self.geometry
        sizes = functools.reduce(layout.Sizes.union, (m.sizes for m in made))
        limit = c.max_length or g.max_length
        return layout.collate(
            [m.row for m in made],
            g,
            buckets.bucket(sizes.length, c.length_buckets, c.length_step, limit),
            buckets.bucket(sizes.clips, c.clip_buckets, 1),
            buckets.bucket(sizes.tiles, c.tile_buckets, 1),
            drop_multiple=c.length_step,
            sizes=dataclasses.replace(sizes, queries=buckets.ladder(sizes.queries, 8)),
        )


class Loader:
    """An iterator of `Loaded` that can tell and take up its position. One epoch drops the rows that fill no batch."""

    def __init__(self, plan: Plan, start: Mapping[str, Any] | None = None) -> None:
        self.plan = plan
        self.steps_per_epoch = plan.steps_per_epoch
        self.num_steps: int | None = plan.steps_per_epoch * plan.config.num_epochs or None
        self._iterator: Any = None
        self._step, self._seen = 0, 0
        self._bad: collections.Counter[str] = collections.Counter()
        if start is not None:
            self.set_state(start)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        if self._iterator is None:
            self._iterator = iter(_reading(self.plan, self._step, self.num_steps or ENDLESS))
        made = next(self._iterator)
        batch = self.plan.collate(made)
        samples = [self.plan.samples[m.sample] for m in made]
        faults = [(s, m.fault) for s, m in zip(samples, made, strict=True) if m.fault]
        self._bad.update(s.source for s, _ in faults)
        self._seen += len(made)
        self._check(faults)
        info = Info(
            step=self._step,
            epoch=self._step // self.steps_per_epoch,
            ids=tuple(s.id for s in samples),
            sources=tuple(s.source for s in samples),
            waste=1.0 - sum(len(m.row) for m in made) / max(1, batch.tokens.size),
            bad=tuple(f"{s.id} ({s.source}): {fault}" for s, fault in faults),
            bad_total=dict(self._bad),
        )
        self._step += 1
        return Loaded(batch, info)

    def _check(self, faults: Sequence[tuple[Sample, str]]) -> None:
        """Stop when more of what was seen, or of one epoch if that is more, is bad than allowed."""
        bad, share = self._bad.total(), self.plan.config.max_bad_fraction
        whole = max(self._seen, self.plan.rows_per_step * self.steps_per_epoch)
        if faults and bad > share * whole:
            sample, fault = faults[-1]
            raise TooManyBadSamplesError(
                f"{bad} of {self._seen} samples read cannot be used, more than data.max_bad_fraction ({share:g}) of "
                f"{whole} allows; by source: {dict(self._bad)}; the last is {sample.id} ({sample.source}): {fault}"
            )

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON can hold it. Set it on a loader of the same data to get the next batch again.

        It is the step and two counts, so it also serves another number of hosts, threads or processes.
        """
        return {
            "data": self.plan.fingerprint(),
            "step": self._step,
            "seen": self._seen,
            "bad": dict(self._bad),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a position.

        Raises:
          ValueError: the position belongs to other data or another order.
        """
        if state.get("data") != self.plan.fingerprint():
            raise ValueError(
                "the saved data position belongs to other annotations, seed, batch size or grouping; "
                "restore those, or start a new workdir"
            )
        self.close()
        self._step, self._seen = state["step"], state["seen"]
        self._bad = collections.Counter(state["bad"])

    def close(self) -> None:
        """Stop reading ahead; the next batch starts it again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _reading(plan: Plan, first: int, steps: int) -> grain.IterDataset:
    """The rows of each step from `first` on, read ahead: threads share out rows, processes share out steps."""
    config, count = plan.config, plan.rows_per_step
    rows = grain.MapDataset.range(first * count, max(first, steps) * count).map(plan.make)
    options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=config.prefetch_rows)
    if not config.worker_count:
        return rows.to_iter_dataset(options).batch(count, batch_fn=list)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for a flag, also in a program that has none
    ahead = grain.ReadOptions(config.read_threads, max(1, config.prefetch_rows // count))
    batches = rows.batch(count, batch_fn=list).to_iter_dataset(ahead)
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.worker_count))


class _Cache:
    """Decoded media of small sets, oldest out first: several conversations about one film share its frames."""

    def __init__(self, limit: int) -> None:
        self.limit, self._held = limit, 0
        self._rows: collections.OrderedDict[Hashable, layout.Row] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, media: Hashable) -> layout.Row | None:
        with self._lock:
            return self._rows.get(media)

    def put(self, media: Hashable, row: layout.Row) -> None:
        size = _bytes(row)
        with self._lock:
            if media in self._rows or size > self.limit:
                return
            self._held += size
            self._rows[media] = row
            while self._held > self.limit:
                _, old = self._rows.popitem(last=False)
                self._held -= _bytes(old)


def _bytes(row: layout.Row) -> int:
    return sum(a.nbytes for a in (row.clips, row.tiles, row.tokens) if a is not None)


def _reason(error: ValueError) -> str:
    return str(error) or type(error).__name__
