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

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import threading
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
    """Puts the media of a sample on local disk, where the decoders can seek; keeps the newest `limit_mb`."""

    def __init__(self, folder: str, limit_mb: int = 4096) -> None:
        self.folder, self.limit = folder, limit_mb << 20
        told = (epath.Path(folder) / "dataset_info.json").read_bytes()  # a folder that was made anew is another one
        key = hashlib.sha256(os.fsencode(folder) + told).hexdigest()[:16]
        self.cache = pathlib.Path(tempfile.gettempdir()) / f"hico-media-{os.getuid()}" / key
        self._open()

    def _open(self) -> None:
        self._source: Any = None
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def local(self, sample: Sample) -> Sample:
        """The sample with paths on this machine.

        Raises:
          ValueError: its record cannot be read.
        """
        if not any(p.startswith(SCHEME) for p in sample.paths):
            return sample
        return dataclasses.replace(sample, paths=tuple(self._place(p) for p in sample.paths))

    def _place(self, path: str) -> str:
        first, count, kind, name = path.removeprefix(SCHEME).split(":", 3)
        target = self.cache / f"{first}-{name}"
        with self._lock:
            if target.exists():
                os.utime(target)
                return str(target)
            if self._source is None:
                self._source = _source(self.folder, "media")
            try:
                items = [self._source[int(first) + i] for i in range(int(count))]
            except Exception as error:  # whatever a damaged record makes the reader raise
                raise ValueError(f"record {first} of {self.folder} cannot be read: {type(error).__name__}") from error
            if kind == "file" and not items[0]["content"]:
                raise ValueError(f"{name}: was missing or empty when the records were made")
            self.cache.mkdir(parents=True, exist_ok=True)
            part = pathlib.Path(tempfile.mkdtemp(dir=self.cache, prefix="."))
            for item in items:
                (part / item["text"].decode()).write_bytes(item["content"])
            made = part if kind == "folder" else part / items[0]["text"].decode()
            if not target.exists():  # another process may have been quicker
                os.replace(made, target)
            self._forget(sum(len(item["content"]) for item in items), target)
            return str(target)

    def _forget(self, size: int, target: pathlib.Path) -> None:
        """Remove the oldest files of this process's making when there are too many."""
        self._held[str(target)] = size
        while sum(self._held.values()) > self.limit and len(self._held) > 1:
            oldest = next(iter(self._held))
            del self._held[oldest]
            if os.path.isfile(oldest):
                os.unlink(oldest)
