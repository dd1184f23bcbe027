"""The reference's annotation files: a YAML that lists JSON files, how much of each to take, and where media lie.

    datasets:
      - json_path: films.jsonl        # .json (a list) or .jsonl, below the YAML's folder unless absolute
        sampling_strategy: first:50%  # all, first:N, first2:N .. first4:N (the following slices), end:N, random:N
        data_root: videos             # every media path must stay inside it
        video_read_type: img          # optional: a reader for every item
        media_type: video             # optional: image, video, text or mix
        weight: 0.5                   # optional: how often an epoch shows each sample; 0 leaves the dataset out

In: a path. Out: samples in the order of the files.
Next: data_pipeline/video.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from data_pipeline.video import READERS

MEDIA = ("image", "video", "text")
KEYS = ("json_path", "sampling_strategy", "data_root", "video_read_type", "media_type", "weight")
IMAGE_TOKENS, FRAME_TOKENS = 128, 16  # what the reference counts for media when it compares lengths


@dataclasses.dataclass(frozen=True)
class Sample:
    """One annotated conversation and the media it is about."""

    id: str
    source: str  # name of the annotation file
    media: str  # "image", "video" or "text"
    paths: tuple[str, ...]
    conversation: tuple[Mapping[str, str], ...]
    start: float | None = None  # seconds; the part of the film to see
    end: float | None = None
    reader: str | None = None
    dataset: int = 0  # which entry of the YAML
    weight: float = 1.0  # of that entry
    fault: str = ""  # why its annotation cannot be used; it keeps its place in the order of data

    @property
    def num_words(self) -> int:
        """Words of all turns, split at whitespace."""
        return sum(len(str(t.get("value", t.get("content", ""))).split()) for t in self.conversation)

    @property
    def modality_length(self) -> int:
        """Words; negative without media (`modality_lengths`, what batches are grouped by)."""
        return -self.num_words if self.media == "text" else self.num_words

    def length(self, max_frames: int) -> int:
        """Words and a guess at visual tokens (`lengths`)."""
        return self.num_words + {"image": IMAGE_TOKENS, "video": FRAME_TOKENS * max_frames, "text": 0}[self.media]


def read_annotations(
    path: str | os.PathLike[str], data_root: str = "", *, seed: int = 0, strict: bool = True
) -> list[Sample]:
    """All samples that a YAML, or a single JSON or JSONL file, names.

    `data_root` applies where the YAML gives none. Relative roots are below the YAML's folder. Without any root, media
    paths are taken as written, relative ones below the YAML's folder. `seed` decides what `random:N` takes.
    A damaged item (or line of a .jsonl) is an error, or, if not `strict`, a sample that tells its `fault`.

    Raises:
      ValueError: a file or an entry is not as described; the message names the file and the entry.
    """
    path = pathlib.Path(path)
    if path.suffix in (".json", ".jsonl"):
        entries: list[Any] = [{"json_path": path.name}]
    elif path.suffix in (".yaml", ".yml"):
        entries = read_yaml(path)
    else:
        raise ValueError(f"{path}: annotations must be a .yaml, .json or .jsonl file")
    samples: list[Sample] = []
    for number, entry in enumerate(entries):
        where = f"{path}, dataset {number}"
        weight = check_entry(entry, where)
        if weight:
            found = _read_dataset(path.parent, entry, where, data_root, seed, strict)
            samples += [dataclasses.replace(s, dataset=number, weight=weight) for s in found]
    if not samples:
        raise ValueError(f"{path}: no sample is left; check sampling_strategy and weight of its datasets")
    return samples


def check_entry(entry: Any, where: str) -> float:
    """The weight of a dataset whose entry in the YAML is as described.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
        raise ValueError(f"{where}: give a json_path; found {entry!r:.200}")
    if unknown := sorted(set(map(str, entry)) - set(KEYS)):
        raise ValueError(f"{where}: unknown keys {unknown}; the keys are {', '.join(KEYS)}")
    if (given := entry.get("media_type")) not in (None, "mix", *MEDIA):
        raise ValueError(f"{where}: media_type is {given!r}; it must be one of {', '.join(MEDIA)} or mix")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"{where}: weight is {weight!r}; it must be a number, 0 or more")
    return float(weight)


def take(items: Sequence[Any], strategy: str, *, seed: int = 0) -> list[Any]:
    """The part of a list that a sampling strategy names.

    Raises:
      ValueError: unknown strategy or amount.

    Example:
      >>> take("abcdefgh", "first2:3"), take("abcdefgh", "end:25%")
      (['d', 'e', 'f'], ['g', 'h'])
    """
    kind, _, amount = strategy.partition(":")
    items = list(items)
    if kind == "all":
        return items
    slices = {"first": 0, "first2": 1, "first3": 2, "first4": 3}
    if kind not in (*slices, "end", "random"):
        raise ValueError(f"sampling_strategy {strategy!r} is unknown; use all, first:N, first2..4:N, end:N or random:N")
    count = _amount(amount, len(items), strategy)
    if kind == "random":
        chosen = np.random.default_rng(seed).permutation(len(items))[:count]
        return [items[i] for i in np.sort(chosen)]
    if kind == "end":
        return items[-count:] if count else items  # as in the reference, whose slice [-0:] is everything
    first = slices[kind] * count
    return items[first : first + count]


def _amount(text: str, total: int, strategy: str) -> int:
    try:
        number = int(text.removesuffix("%"))
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"sampling_strategy {strategy!r}: write the amount as N or P%, such as first:100 or end:25%")
    return math.ceil(number * total / 100) if text.endswith("%") else number


def read_yaml(path: pathlib.Path) -> list[Any]:
    """The datasets that a YAML lists."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such annotation file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: this YAML cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list):
        raise ValueError(f"{path}: expected a mapping with a list `datasets`")
    return content["datasets"]


def _read_dataset(
    folder: pathlib.Path, entry: dict[str, Any], where: str, data_root: str, seed: int, strict: bool
) -> list[Sample]:
    file = folder / entry["json_path"]
    items = list(iter_items(file))
    try:
        taken = take(list(enumerate(items)), entry.get("sampling_strategy", "all"), seed=seed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    root = None if entry.get("media_type") == "mix" else entry.get("data_root") or data_root or None
    reader = entry.get("video_read_type")
    samples: list[Sample] = []
    for i, item in taken:
        place = f"{file}, item {i}"
        try:
            samples.append(parse_item(place, file.name, i, item, folder, root, reader))
        except ValueError as error:
            if strict:
                raise
            samples.append(_faulty(file.name, i, item, str(error).removeprefix(f"{place}: ")))
    _check_some_exist(samples, where)
    return samples


def _faulty(source: str, index: int, item: Any, fault: str) -> Sample:
    """An item that is none, with the kind that it seems to have: a grouped batch keeps its kind."""
    told = item if isinstance(item, dict) else {}
    media = next((m for m in MEDIA if m in told), "text")
    words = {"from": "gpt", "value": "damaged"}  # one word: batches are grouped by words, and 0 has no sign
    return Sample(_identity(told, source, index), source, media, (), (words,), fault=fault)


def _identity(item: Mapping[str, Any], source: str, index: int) -> str:
    """An item's own id, or its place; as text that any terminal can print."""
    return str(item.get("id", f"{source}:{index}")).encode("utf-8", "replace").decode()


def iter_items(file: pathlib.Path) -> Iterator[Any]:
    """Every item of an annotation file; a line that is not JSON gives its error instead.

    Raises:
      ValueError: the file as a whole cannot be read.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such annotation file") from error
    except OSError as error:
        raise ValueError(f"{file}: this annotation file cannot be read: {error}") from error
    if file.suffix == ".jsonl":
        for n, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                try:
                    yield _parse(line, f"{file}, line {n}")
                except ValueError as error:
                    yield error
        return
    items = _parse(content, str(file))
    if not isinstance(items, list):
        raise ValueError(
            f"{file}: expected a list of samples, found {type(items).__name__}; name it .jsonl if it has one a line"
        )
    yield from items


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of too many digits
        raise ValueError(f"{where}: not JSON ({error})") from error


def parse_item(
    where: str, source: str, index: int, item: Any, folder: pathlib.Path, root: str | None, reader: str | None
) -> Sample:
    """One item as a sample.

    Raises:
      ValueError: it is not as described.
    """
    if isinstance(item, ValueError):
        raise item
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list) or not item["conversations"]:
        raise ValueError(f"{where}: expected an object with a list `conversations`; found {item!r:.200}")
    if not all(isinstance(turn, dict) for turn in item["conversations"]):
        raise ValueError(f"{where}: every turn of `conversations` must be an object with 'from' and 'value'")
    media = "image" if "image" in item else "video" if "video" in item else "text"
    names = item[media] if media != "text" else []
    names = [names] if isinstance(names, str) else names
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) and n for n in names)
        or (media != "text" and not names)
    ):
        raise ValueError(f"{where}: {media!r} must be a path or a list of paths; found {item[media]!r:.200}")
    chosen = reader or item.get("video_read_type")
    if media == "video" and chosen not in (None, "fake", *READERS):
        raise ValueError(f"{where}: video_read_type is {chosen!r}; it must be one of {', '.join(READERS)}")
    try:
        start, end = (None if item.get(k) is None else float(item[k]) for k in ("start", "end"))
        if not all(math.isfinite(t) for t in (start, end) if t is not None):
            raise ValueError(f"the clip {start} to {end} s is not finite")
        paths = tuple(_place(n, folder, root) for n in names)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    return Sample(
        _identity(item, source, index), source, media, paths, tuple(item["conversations"]), start, end, chosen
    )


def _place(name: str, folder: pathlib.Path, root: str | None) -> str:
    """The file a media path names; it may not leave its root."""
    if root is None:
        return os.path.join(folder, name)
    base = os.path.normpath(os.path.join(folder, root))
    placed = os.path.normpath(os.path.join(base, name))
    if "\0" in name or (placed != base and not placed.startswith(base.rstrip(os.sep) + os.sep)):
        raise ValueError(f"the media path {name!r} leaves its data_root {root!r}; give a path below it")
    return placed


def _check_some_exist(samples: Sequence[Sample], where: str) -> None:
    """One of the first three media files must exist, or the root is wrong for all of them."""
    first = [s for s in samples if s.paths][:3]
    if first and not any(s.reader == "fake" or os.path.exists(p) for s in first for p in s.paths):
        raise ValueError(f"{where}: {first[0].paths[0]} does not exist, nor do the next; check data_root")
