"""Annotations to batches: the whole host side of training, read top to bottom.

    samples -> seeded order -> rows of this host -> text and layout, then pixels -> batches of few shapes

In: a `DataConfig` and the model's `Geometry`. Out: an iterator of `Loaded` (a `Batch` with NumPy leaves, and what is
in it) whose position is a small JSON value.
Next: hico_jax/train.py
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from data_pipeline import buckets, layout, records, together
from data_pipeline.annotations import Sample, read_annotations
from data_pipeline.cache import Cache
from data_pipeline.index import Index
from data_pipeline.options import DataConfig
from data_pipeline.sample import Lay, lay_out, read_pixels
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from hico_jax.batch import Batch, Geometry
from hico_jax.shapes import Int, ndarray

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
    bad_total: Mapping[str, int]  # bad samples of each source since the start
    bad_reasons: Mapping[str, int]  # the same by source and kind of fault
    order: int = 0  # CRC-32 of the ids of the whole global batch, in order: the same for any number of hosts


class Loaded(NamedTuple):
    """One step's data."""

    batch: Batch
    info: Info

    @property
    def ids(self) -> tuple[str, ...]:
        return self.info.ids


class Made(NamedTuple):
    """One row of this host, and the sizes that the global batch needs as far as this row's neighbours tell."""

    samples: tuple[int, ...]
    row: layout.Row
    sizes: layout.Sizes
    faults: tuple[str, ...]  # of each sample; "" for a sound one


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
    shared: together.Shared | None = None,
) -> Loader:
    """The batches of a configuration, for one host of several.

    Every host computes the same global plan and reads its own rows. `start` is a state from `get_state`. `shared`
    is there where hosts read a row together: which clips are this one's, and how to ask the others.

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
    prepared = records.find(config.annotations)
    if prepared:
        samples = records.read_samples(prepared)
    else:
        samples = read_annotations(config.annotations, config.data_root, seed=config.seed, strict=False)
    _check_known(samples, config.max_bad_fraction)
    plan = Plan(config, geometry, samples, tokenizer, process_index, process_count)
    plan.media = records.Media(prepared) if prepared else None
    plan.share = shared and shared.share
    return Loader(plan, start, shared and shared.agree)


def _check_known(samples: Sequence[Sample], share: float) -> None:
    """Damaged annotations are known before the first step: more than allowed stop the run at once."""
    known = [s for s in samples if s.fault]
    if known and len(known) > share * len(samples):
        first = known[0]
        raise TooManyBadSamplesError(
            f"{len(known)} of {len(samples)} annotations cannot be used, more than data.max_bad_fraction ({share:g}) "
            f"allows; by source: {dict(collections.Counter(s.source for s in known))}; the first is {first.id} "
            f"({first.source}): {first.fault}"
        )


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
        self.media: records.Media | None = None  # where a prepared folder's files come from
        self.share: together.ClipShare | None = None  # None: every clip is decoded here
        self.rows_per_step = config.batch_size // hosts
        self.fixed = all(len(b) == 1 for b in (config.length_buckets, config.clip_buckets, config.tile_buckets))
        self._cache = Cache(config.cache_mb << 20 if config.sample != "rand" else 0)
        self._rooms: dict[int, int] = {}  # the most clips of a row of a step

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k != "_cache"}
        return kept | {"cache_bytes": self._cache.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._cache = Cache(state.pop("cache_bytes"))
        self.__dict__.update(state)

    @functools.cached_property
    def index(self) -> Index:
        """Which samples make which row."""
        c, samples = self.config, self.samples
        numbers = sorted({s.dataset for s in samples})
        weights = {s.dataset: s.weight for s in samples}
        return Index(
            np.array([s.modality_length for s in samples]), c.batch_size, c.seed, group=c.group_by_modality_length,
            datasets=[numbers.index(s.dataset) for s in samples], weights=[weights[n] for n in numbers],
            tokens=self._measure() if c.pack else None, pack=c.pack,
        )  # fmt: skip

    def _measure(self) -> Int[ndarray, " n"]:
        """Tokens of every sample's row, from headers and text; kept in `data.index_file`. A bad sample is short."""
        c, file = self.config, self.config.index_file
        key = np.frombuffer(hashlib.sha256(repr((self._named(), repr(c), repr(self.geometry))).encode()).digest(), "u1")
        if file and os.path.exists(file):
            with np.load(file) as kept:
                if np.array_equal(kept["key"], key):
                    return kept["tokens"]
        with concurrent.futures.ThreadPoolExecutor(c.read_threads) as pool:
            tokens = np.fromiter(pool.map(self._length, range(len(self.samples))), int)
        if file:
            os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(file) or ".", suffix=".npz", delete=False) as new:
                np.savez(new, key=key, tokens=tokens)
            os.replace(new.name, file)
        return tokens

    def _length(self, index: int) -> int:
        with contextlib.ExitStack() as held:
            return len(self._lay_out(index, 0, held)[0].row)

    def _named(self) -> str:
        return hashlib.sha256(repr([(s.id, s.source) for s in self.samples]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes when a saved position would no longer name the same rows."""
        return hashlib.sha256(f"{self._named()} {self.index.digest()}".encode()).hexdigest()[:16]

    def order(self, step: int) -> int:
        """A check sum of which samples make a step's global batch, and in which order."""
        rows = [self.index.row(step, place) for place in range(self.config.batch_size)]
        return zlib.crc32(repr([[self.samples[i].id for i in row] for row in rows]).encode())

    def make(self, number: int) -> Made:
        """Row `number` of this host: row p of every `hosts` rows of a global batch is host p's.

        Hosts must pad to one shape. So each lays out, without pixels, the rows that the others make beside its own;
        where every bucket is fixed there is nothing to agree on.
        """
        step, local = divmod(number, self.rows_per_step)
        epoch = self.index.locate(step)[0]
        first = local * self.hosts
        mine = self.index.row(step, first + self.host)
        with contextlib.ExitStack() as files:  # from their headers to their pixels
            laid, faults = self._lay_out_all(mine, epoch, files)
            sizes = self._sizes(layout.pack([lay.row for lay in laid], self.geometry))
            held = self._held(step, epoch, [lay.row.num_clips for lay in laid])
            parts = [self._read(lay, fault, some) for lay, fault, some in zip(laid, faults, held, strict=True)]
        rows = [row for row, _ in parts]
        if self.config.position_skip:
            rng = np.random.default_rng((self.config.seed, step, first + self.host))
            rows = [layout.skip_positions(row, self.config.position_skip, rng) for row in rows]
        if self.hosts > 1 and (not self.fixed or self.geometry.drop.num_stages):
            for place in range(first, first + self.hosts):
                if place != first + self.host:
                    with contextlib.ExitStack() as files:
                        others, _ = self._lay_out_all(self.index.row(step, place), epoch, files)
                    sizes = sizes.union(self._sizes(layout.pack([lay.row for lay in others], self.geometry)))
        return Made(mine, layout.pack(rows, self.geometry), sizes, tuple(fault for _, fault in parts))

    def _held(self, step: int, epoch: int, counts: Sequence[int]) -> Sequence[ndarray | None]:
        """The clips of each conversation of a row that are decoded here. They depend on the room all rows get."""
        if self.share is None:
            return [None] * len(counts)
        most = 0
        if len(self.config.clip_buckets) != 1:
            if (known := self._rooms.get(step)) is None:
                for place in range(self.config.batch_size):
                    with contextlib.ExitStack() as files:
                        laid = self._lay_out_all(self.index.row(step, place), epoch, files)[0]
                    most = max(most, sum(lay.row.num_clips for lay in laid))
                self._rooms = {k: v for k, v in self._rooms.items() if k > step - 64} | {step: most}
            else:  # looked up once: a reader that is far ahead forgets old steps
                most = known
        return together.split(self.share(buckets.bucket(most, self.config.clip_buckets, 1)), counts)

    def _lay_out_all(
        self, samples: Sequence[int], epoch: int, held: contextlib.ExitStack
    ) -> tuple[list[Lay], list[str]]:
        """The conversations of one row. What does not fit although it was planned to is left out, and counted."""
        laid, faults, length = [], [], 0
        for sample in samples:
            lay, fault = self._lay_out(sample, epoch, held)
            if laid and not fault and length + len(lay.row) > self.config.pack:
                lay, fault = self._dummy(), f"{len(lay.row)} tokens, longer than planned: its packed row has no room"
            length += len(lay.row)
            laid.append(lay)
            faults.append(fault)
        return laid, faults

    def _sizes(self, row: layout.Row) -> layout.Sizes:
        return layout.measure(row, self.geometry)

    def _read(self, laid: Lay, fault: str, held: ndarray | None = None) -> tuple[layout.Row, str]:
        """The row with its pixels, or a masked one and why. A row of several hosts keeps its places: all must agree."""
        if fault:
            return laid.row, fault
        some = () if held is None else (held,)
        key = (laid.media, *(h.tobytes() for h in some))
        try:
            kept = self._cache.get(key)
            if kept is None:
                kept = read_pixels(laid, self.geometry, self.config, *some)
                self._cache.put(key, kept)
        except ValueError as error:  # every fault of a file or an annotation is one
            row = self._dummy().row if held is None else layout.blank(laid.row, held, self.geometry)
            return row, _reason(error)
        return dataclasses.replace(laid.row, clips=kept.clips, tiles=kept.tiles, held=kept.held), ""

    def _lay_out(self, index: int, epoch: int, held: contextlib.ExitStack) -> tuple[Lay, str]:
        rng = np.random.default_rng((self.config.seed, epoch, index))
        try:
            sample = self.samples[index]
            sample = self.media.local(sample, held) if self.media else sample
            return lay_out(sample, self.config, self.geometry, self.tokenizer, rng), ""
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
            sizes=dataclasses.replace(
                sizes, queries=buckets.ladder(sizes.queries, 8), segments=buckets.ladder(sizes.segments, 1)
            ),
        )


class Loader:
    """An iterator of `Loaded` that can tell and take up its position. One epoch drops the rows that fill no batch."""

    def __init__(self, plan: Plan, start: Mapping[str, Any] | None = None, agree: together.Agree | None = None) -> None:
        self.plan, self._agree = plan, agree
        self.steps_per_epoch = plan.index.steps(1)
        epochs = plan.config.num_epochs
        self.num_steps: int | None = plan.index.steps(epochs) if epochs else None
        self._iterator: Any = None
        self._step, self._seen = 0, 0
        self._bad: collections.Counter[str] = collections.Counter()
        self._reasons: collections.Counter[str] = collections.Counter()
        if start is not None:
            self.set_state(start)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        if self._iterator is None:
            self._iterator = iter(_reading(self.plan, self._step, self.num_steps or ENDLESS))
        made = next(self._iterator)
        if self._agree is not None:
            found = together.agreed([m.row for m in made], [m.faults for m in made], self._agree)
            made = [m._replace(row=row, faults=f) for m, row, f in zip(made, *found, strict=True)]
        batch = self.plan.collate(made)
        samples = [self.plan.samples[i] for m in made for i in m.samples]
        told = [fault for m in made for fault in m.faults]
        faults = [(s, fault) for s, fault in zip(samples, told, strict=True) if fault]
        self._bad.update(s.source for s, _ in faults)
        self._reasons.update(f"{s.source}: {kind_of(fault)}" for s, fault in faults)
        self._seen += len(samples)
        self._check(faults)
        info = Info(
            step=self._step,
            epoch=self.plan.index.locate(self._step)[0],
            ids=tuple(s.id for s in samples),
            sources=tuple(s.source for s in samples),
            waste=1.0 - sum(len(m.row) for m in made) / max(1, batch.tokens.size),
            bad=tuple(f"{s.id} ({s.source}): {fault}" for s, fault in faults),
            bad_total=dict(self._bad),
            bad_reasons=dict(self._reasons),
            order=self.plan.order(self._step),
        )
        self._step += 1
        return Loaded(batch, info)

    def _check(self, faults: Sequence[tuple[Sample, str]]) -> None:
        """Stop when more of what was seen, or of one epoch if that is more, is bad than allowed."""
        bad, share = self._bad.total(), self.plan.config.max_bad_fraction
        whole = max(self._seen, len(self.plan.samples) // self.plan.hosts)
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
            "reasons": dict(self._reasons),
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
        self._reasons = collections.Counter(state["reasons"])

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
    steps_ahead = max(1, config.prefetch_rows // count)
    ahead = grain.ReadOptions(min(config.read_threads, steps_ahead), steps_ahead)
    batches = rows.batch(count, batch_fn=list).to_iter_dataset(ahead)
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.worker_count))


def kind_of(fault: str) -> str:
    """A fault without the names and numbers in it, so that alike ones are counted together.

    Example:
      >>> kind_of("/data/a.mp4: the film has 12 frames")
      'the film has N frames'
    """
    text = re.sub(r"\S*/\S*:?\s?|'[^']*'", "", fault)
    return re.sub(r"\d+", "N", text).strip()[:80]


def _reason(error: ValueError) -> str:
    return str(error) or type(error).__name__
