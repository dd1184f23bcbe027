"""JSON lines that survive a kill: written one at a time, read up to the last whole one, never of two settings.

In: a folder and what its lines depend on. Out: the lines.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
from typing import IO, Any

SETTINGS = "settings.json"


class Appending:
    """A file to append to, alone. What a killed process left of its last line is cut off."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __enter__(self) -> IO[str]:
        self.path.touch()
        self.file = self.path.open("r+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise ValueError(
                f"{self.path}: another process is writing it; give each one a --shard of its own"
            ) from error
        whole = self.path.read_bytes()
        self.file.truncate(whole.rfind(b"\n") + 1)
        self.file.seek(0, os.SEEK_END)
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()


def read(folder: pathlib.Path, name: str = "answers") -> list[dict[str, Any]]:
    """Every line with an id of its own in `NAME.*.jsonl`; the last line of a file may be unfinished, and is left out.

    Raises:
      ValueError: a line that is not a JSON object with an id.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{name}.*.jsonl")):
        for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1]):
            try:
                line = json.loads(raw)
                found.setdefault(line["id"], line)
            except (ValueError, TypeError, KeyError) as error:
                why = error if isinstance(error, ValueError) else "no object with an id"
                raise ValueError(f"{path} is damaged in line {number + 1} ({why}); remove it to ask again") from error
    return list(found.values())


def add(file: IO[str], line: dict[str, Any]) -> None:
    """Write one line so that a kill after this cannot lose it."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def claim(folder: pathlib.Path, settings: dict[str, Any], *, fresh: bool = False, name: str = "answers") -> None:
    """Make the folder, or check that what it holds was made with these settings.

    Raises:
      ValueError: they were made with others, which are named.
    """
    path = folder / SETTINGS
    if path.is_file() and not fresh:
        before = json.loads(path.read_text())
        differs = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
        if differs:
            was = ", ".join(f"{k} {before.get(k)!r} (now {settings.get(k)!r})" for k in differs)
            raise ValueError(f"{folder} holds {name} made with other settings: {was}; add --fresh, or choose --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    old = list(folder.glob(f"{name}.*.jsonl"))
    if old and not fresh:
        raise ValueError(f"{folder} holds {name} but no {SETTINGS}; add --fresh to ask anew, or choose --out")
    for stale in old:
        stale.unlink()
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(settings, indent=1) + "\n")
    part.replace(path)
