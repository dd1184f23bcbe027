"""Official annotation files to records, and what is wrong with a record in words.

In: paths of JSON, JSON lines or parquet. Out: plain dicts, one a question, with where each came from.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

SUFFIXES = (".json", ".jsonl", ".parquet")


class Fault(ValueError):
    """One record cannot be asked; the message says why."""


def load(path: pathlib.Path) -> list[Any]:
    """The records of one file.

    Raises:
      ValueError: no such file, an unknown kind of file, or contents that are no list of records.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such annotation file")
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            found = [json.loads(line) for line in text.split("\n") if line.strip()]  # U+2028 ends no line of JSON
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            raise ValueError(f"{path}: annotations are read from {', '.join(SUFFIXES)}")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as {path.suffix.lstrip('.')} ({error})") from error
    if isinstance(found, dict):
        found = _by_video(found)
    if not isinstance(found, list) or not found:
        count = f" of {len(found)}" if isinstance(found, list | dict | str) else ""
        raise ValueError(f"{path}: holds {type(found).__name__}{count}; a list of questions was expected")
    return found


def _parquet(path: pathlib.Path) -> list[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; `pip install pyarrow`") from None
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: not readable as parquet ({error})") from error


def _by_video(found: Mapping[str, Any]) -> Any:
    """PerceptionTest's own layout: a dict of videos, each with its `mc_question` list."""
    if not all(isinstance(v, dict) and "mc_question" in v for v in found.values()):
        return found
    return [
        {"video_name": video, "question_id": str(q.get("id", i)), **q}
        for video, entry in found.items()
        for i, q in enumerate(entry["mc_question"])
    ]


def locate(root: pathlib.Path, names: Iterable[str]) -> list[pathlib.Path]:
    """The files of a benchmark below a folder (also in `json/`, `data/`, `videomme/`), or the one file that `root` is.

    Raises:
      ValueError: nothing there; the first file that was looked for is named.
    """
    if root.is_file():
        return [root]
    if not root.exists():
        raise ValueError(f"{root}: there is no such annotation file or folder; give it with --annotations")
    names = list(names)
    places = [root / folder for folder in ("", "json", "data", "videomme")]
    found = [p for n in names for place in places for suffix in SUFFIXES for p in sorted(place.glob(f"{n}{suffix}"))]
    if not found:
        raise ValueError(f"{root}: holds none of the annotation files; {names[0]}.json was looked for first")
    return list(dict.fromkeys(found))


def text(record: Mapping[str, Any], name: str) -> str:
    """A field that must be text (a number is written out).

    Raises:
      Fault: absent, or something else.
    """
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise Fault(f"its field {name!r} is {_shown(record, name)}; text was expected")
    return str(value)


def number(record: Mapping[str, Any], name: str) -> float:
    """A field that must be a finite number.

    Raises:
      Fault: absent, or something else.
    """
    value = record.get(name)
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise Fault(f"its field {name!r} is {_shown(record, name)}; a number was expected")
    return found


def texts(record: Mapping[str, Any], name: str, least: int = 2) -> tuple[str, ...]:
    """A field that must be a list of texts.

    Raises:
      Fault: absent, too few, or something else.
    """
    value = record.get(name)
    if not isinstance(value, list | tuple) or len(value) < least or not all(isinstance(v, str) for v in value):
        raise Fault(f"its field {name!r} is {_shown(record, name)}; at least {least} texts were expected")
    return tuple(value)


def span(record: Mapping[str, Any], name: str) -> tuple[float, float]:
    """A field that must be [start, end] in seconds.

    Raises:
      Fault: absent, not two numbers, or the end before the start.
    """
    value = record.get(name)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Fault(f"its field {name!r} is {_shown(record, name)}; two numbers were expected")
    start, end = (number({name: v}, name) for v in value)
    if end < start:
        raise Fault(f"its field {name!r} ends at {end:g} s before it starts at {start:g} s")
    return start, end


def _shown(record: Mapping[str, Any], name: str) -> str:
    return repr(record[name])[:60] if name in record else "missing"
