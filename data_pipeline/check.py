"""Every defect of an annotation file before a run meets it: `hico data check`.

Reading for training stops at the first malformed entry and masks bad samples as it meets them. This reads all there
is, decodes what training would decode, and names each defect with its item.

In: a path. Out: a `Report`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import annotations, chat, image, video
from data_pipeline.annotations import Sample
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import IMAGE_TEXT, Tokenizer
from hico_jax.batch import Geometry

SLACK_S = 0.5  # how far the end of a clip may lie beyond its film
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


class Defect(NamedTuple):
    """One thing that is wrong."""

    where: str  # the file and the item
    kind: str  # "schema", "media", "damage", "duration", "path", "conversation", "length" or "note"
    reason: str


@dataclasses.dataclass
class Report:
    """What a check found. `note`s are no defects: training takes such samples."""

    samples: int
    defects: list[Defect]
    lengths: list[int]  # tokens (an estimate without a tokenizer) of each sound row

    @property
    def bad(self) -> list[Defect]:
        """Defects that training would stop at or mask."""
        return [d for d in self.defects if d.kind != "note"]

    def text(self, limit: int = 50) -> str:
        """The report as it is printed: counts, defects, and a histogram of row lengths."""
        counts = collections.Counter(d.kind for d in self.defects)
        lines = [f"{self.samples} samples, {len({d.where for d in self.bad})} of them with defects"]
        lines += [f"  {kind:<13}{count}" for kind, count in sorted(counts.items())]
        lines += [f"{d.where}: {d.reason}" for d in self.defects[:limit]]
        if len(self.defects) > limit:
            lines.append(f"and {len(self.defects) - limit} more (--json tells all)")
        return "\n".join([*lines, *histogram(self.lengths)])


def histogram(lengths: list[int], width: int = 40) -> list[str]:
    """Row lengths by powers of two, as bars of text."""
    if not lengths:
        return []
    powers = collections.Counter(int(np.ceil(np.log2(max(n, 1)))) for n in lengths)
    most = max(powers.values())
    lines = [f"tokens of a row: median {int(np.median(lengths))}, longest {max(lengths)}"]
    for power in range(min(powers), max(powers) + 1):
        lines.append(f"  up to {2**power:>7}  {powers[power]:>7}  {'#' * round(width * powers[power] / most)}")
    return lines


def check(
    path: str,
    config: DataConfig,
    geometry: Geometry,
    tokenizer: Tokenizer | None = None,
    *,
    decode: bool = True,
    threads: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Look at every item of an annotation file, or of all that a YAML lists. `decode=False` reads headers only.

    Raises:
      ValueError: `path` itself cannot be read.
    """
    found: list[Defect] = []
    samples = list(_samples(pathlib.Path(path), config, found))
    lengths: list[int] = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        jobs = pool.map(lambda s: _check(s[1], config, geometry, tokenizer, decode), samples)
        for i, ((where, _), (defects, length)) in enumerate(zip(samples, jobs, strict=True), 1):
            found += [Defect(where, *d) for d in defects]
            if length:
                lengths.append(length)
            if i % 1000 == 0:
                say(f"{i} of {len(samples)}")
    return Report(len(samples), found, lengths)


def _samples(path: pathlib.Path, config: DataConfig, found: list[Defect]) -> Iterator[tuple[str, Sample]]:
    """Each item that is one, with its place; defects of the others are added to `found`."""
    entries: list[Any] = [{"json_path": path.name}]
    if path.suffix in (".yaml", ".yml"):
        entries = annotations.read_yaml(path)
    elif path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: annotations must be a .yaml, .json or .jsonl file")
    for number, entry in enumerate(entries):
        where = f"{path}, dataset {number}"
        try:
            annotations.check_entry(entry, where)
            file = path.parent / entry["json_path"]
            items = list(annotations.iter_items(file))
            annotations.take(items, entry.get("sampling_strategy", "all"))
        except ValueError as error:
            found.append(Defect(where, "schema", _short(error, where)))
            continue
        root = None if entry.get("media_type") == "mix" else entry.get("data_root") or config.data_root or None
        ids: collections.Counter[str] = collections.Counter()
        for i, item in enumerate(items):
            place = f"{file}, item {i}"
            if isinstance(item, ValueError):
                found.append(Defect(place, "schema", _short(item, place)))
                continue
            reader = entry.get("video_read_type")
            try:
                sample = annotations.parse_item(place, file.name, i, item, path.parent, root, reader)
            except ValueError as error:
                kind = "path" if "data_root" in str(error) else "schema"
                found.append(Defect(place, kind, _short(error, place)))
                continue
            ids[sample.id] += 1
            if ids[sample.id] == 2:
                found.append(Defect(place, "note", f"the id {sample.id!r} is used again"))
            yield f"{place} ({sample.id})", sample


def _check(
    sample: Sample, config: DataConfig, geometry: Geometry, tokenizer: Tokenizer | None, decode: bool
) -> tuple[list[tuple[str, str]], int]:
    """Kinds and reasons, and the row's length (0 when it cannot be known)."""
    found: list[tuple[str, str]] = []
    try:
        turns = chat.read_turns(sample.conversation)
        if not any(role == "assistant" and text.strip() for role, text in turns):
            found.append(("conversation", "there is no answer: no turn of the assistant (gpt) with text"))
        marks = sum(text.count(IMAGE_TEXT) for _, text in turns)
        if sample.media != "text" and marks > max(1, len(sample.paths)):
            found.append(("conversation", f"{marks} {IMAGE_TEXT} marks for {len(sample.paths)} files"))
        if sample.media == "text" and marks:
            found.append(("note", f"{marks} {IMAGE_TEXT} marks without media are ordinary text"))
        if any(mark in text for mark in CONTROL for _, text in turns):
            found.append(("note", "the text holds control tokens; they are read as ordinary text"))
    except ValueError as error:
        return [("conversation", str(error))], 0
    visual = 0
    for path in sample.paths:
        try:
            visual += _check_media(sample, path, config, geometry, decode, found)
        except ValueError as error:
            found.append(("media" if not os.path.exists(path) else "damage", str(error)))
    if found and any(kind != "note" for kind, _ in found):
        return found, 0
    if tokenizer is None:
        text_tokens = round(1.5 * sample.num_words) + 20
    else:
        text_tokens = len(chat.encode_sample(tokenizer, sample.conversation, has_media=sample.media != "text").ids)
    limit = config.max_length or geometry.max_length
    if visual + text_tokens > limit:
        found.append(("length", f"about {visual + text_tokens} tokens; the limit is {limit}"))
    return found, visual + text_tokens


def _check_media(
    sample: Sample, path: str, config: DataConfig, geometry: Geometry, decode: bool, found: list[tuple[str, str]]
) -> int:
    """Visual tokens of one file; what is wrong with it raises, or is added to `found`."""
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist")
    if sample.media == "image":
        size = image.read_size(path)
        if decode:
            image.read_image(path)
        cols, rows = image.grid_shape(size, geometry.image_px, config.image_grid)
        tiled = config.image_aspect == "anyres_nopad" and len(sample.paths) == 1
        return (1 + rows * cols if tiled else 1) * geometry.tokens_per_image
    info = video.open_video(path, sample.reader)
    if info.damaged:
        found.append(("damage", f"{path}: part of the film cannot be read; {info.num_frames} frames can"))
    if sample.start is not None or sample.end is not None:
        start, end = sample.start or 0.0, info.duration_s if sample.end is None else sample.end
        if start < 0 or end <= start or end > info.duration_s + SLACK_S or start >= info.duration_s:
            found.append(("duration", f"{path}: the clip {start:g} to {end:g} s is not within {info.duration_s:.2f} s"))
            return 0
    indices, _ = video.choose(info, config.sampling(), start=sample.start, end=sample.end)
    if decode:
        for _ in video.iter_frames(path, np.unique(indices), (8, 8)):
            pass
    return len(indices) // geometry.frames_per_clip * geometry.tokens_per_clip


def _short(error: ValueError, where: str) -> str:
    return str(error).removeprefix(f"{where}: ")
