"""The same samples from ArrayRecord files instead of thousands of media files: a pod reads them from a bucket.

    hico data prepare stage3.yaml --out gs://bucket/stage3       # once
    hico train ... --config.data.annotations=gs://bucket/stage3  # instead of the YAML

A prepared folder is a TFDS dataset with two splits: `samples` (the annotations, in order) and `media` (every file once,
byte for byte, whatever the number of conversations about it). Both routes decode the same bytes with the same code, so
they end in the same examples. Nothing here needs TensorFlow.

In: a prepared folder (prepare.py). Out: samples, and a `Media` that puts their files on local disk.
Next: data_pipeline/loader.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any

from etils import epath

from data_pipeline.annotations import Sample

NAME, VERSION = "hico", "1.0.0"
SCHEME = "record:"  # a path of a prepared sample: `record:FIRST:COUNT:NAME`, rows of the media split


def find(path: str | os.PathLike[str]) -> str | None:
    """The dataset folder of a prepared one, given as written or with its version; None if it is no such folder."""
    folder = epath.Path(path)
    for place in (folder, folder / NAME / VERSION):
        if (place / "dataset_info.json").exists():
            return os.fspath(place)
    return None


def read_samples(folder: str) -> list[Sample]:
    """The samples of a prepared folder, in the order of their annotations.

    Raises:
      ValueError: the folder holds another dataset.
    """
    told = _source(folder, "samples")
    found = []
    for i in range(len(told)):
        item = json.loads(told[i]["text"])
        for key in ("paths", "conversation"):
            item[key] = tuple(item[key])
        found.append(Sample(**item))
    return found


def _source(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no split {split!r}; make it with `hico data prepare`")
    return builder.as_data_source(split=split)


class Media:
    """Puts the media of a sample on local disk, where the decoders can seek; keeps the newest `limit_mb`.

    Readers are threads of several processes and share the files. What a row is being made of holds a lock on its
    files, and only files that nobody holds are removed: a row never loses one between its header and its pixels.
    """

    def __init__(self, folder: str, limit_mb: int = 4096) -> None:
        self.folder, self.limit = folder, limit_mb << 20
        told = (epath.Path(folder) / "dataset_info.json").read_bytes()  # a folder that was made anew is another one
        key = hashlib.sha256(os.fsencode(folder) + told).hexdigest()[:16]
        self.cache = pathlib.Path(tempfile.gettempdir()) / f"hico-media-{os.getuid()}" / key
        self._open()

    def _open(self) -> None:
        self._source: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def local(self, sample: Sample, held: contextlib.ExitStack) -> Sample:
        """The sample with paths on this machine, which stay until `held` is closed.

        Raises:
          ValueError: its record cannot be read.
        """
        if not any(p.startswith(SCHEME) for p in sample.paths):
            return sample
        return dataclasses.replace(sample, paths=tuple(self._place(p, held) for p in sample.paths))

    def _place(self, path: str, held: contextlib.ExitStack) -> str:
        first, count, kind, name = path.removeprefix(SCHEME).split(":", 3)
        target = self.cache / f"{first}-{name}"
        while not _hold(target, held):
            with self._lock:
                if not target.exists():
                    self._write(target, range(int(first), int(first) + int(count)), kind, name)
        return str(target)

    def _write(self, target: pathlib.Path, rows: range, kind: str, name: str) -> None:
        if self._source is None:
            self._source = _source(self.folder, "media")
        try:
            items = [self._source[i] for i in rows]
        except Exception as error:  # whatever a damaged record makes the reader raise
            raise ValueError(f"record {rows.start} of {self.folder} cannot be read: {type(error).__name__}") from error
        if kind == "file" and not items[0]["content"]:
            raise ValueError(f"{name}: was missing or empty when the records were made")
        self.cache.mkdir(parents=True, exist_ok=True)
        self._forget(sum(len(item["content"]) for item in items))
        part = pathlib.Path(tempfile.mkdtemp(dir=self.cache, prefix="."))
        for item in items:
            (part / item["text"].decode()).write_bytes(item["content"])
        try:
            os.replace(part if kind == "folder" else part / items[0]["text"].decode(), target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # those: another process was quicker
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _forget(self, size: int) -> None:
        """Make room for `size` bytes: the files that were not used for longest go first, whoever wrote them."""
        known = []
        for entry in os.scandir(self.cache):
            with contextlib.suppress(OSError):  # gone meanwhile
                inside = os.scandir(entry.path) if entry.is_dir() else [entry]
                known.append((entry.stat().st_atime_ns, sum(e.stat().st_size for e in inside), entry.path))
        total = size + sum(held for _, held, _ in known)
        for used, held, path in sorted(known):
            if total <= self.limit:
                return
            young = os.path.basename(path).startswith(".") and time.time_ns() - used < 10**9 * 3600
            if not young and _remove(path):  # a dot: being written, or left behind by a process that was killed
                total -= held


def _hold(target: pathlib.Path, held: contextlib.ExitStack) -> bool:
    """Share a lock on a file or folder until `held` is closed; whether it was there, and still is."""
    try:
        handle = os.open(target, os.O_RDONLY)
    except FileNotFoundError:
        return False
    held.callback(os.close, handle)  # which also lets go of the lock
    fcntl.flock(handle, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError):
        here, there = os.fstat(handle), os.stat(target)
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            os.utime(target, ns=(time.time_ns(), there.st_mtime_ns))  # used now, not changed now
            return True
    return False


def _remove(path: str) -> bool:
    """Delete a file or folder that nobody holds; whether it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = f"{os.path.dirname(path)}/.gone-{os.getpid()}-{threading.get_ident()}"
        os.replace(path, gone)  # at once, also for a folder: nobody may find half of it
        shutil.rmtree(gone) if os.path.isdir(gone) else os.unlink(gone)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
