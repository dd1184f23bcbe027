"""Annotations and their media to ArrayRecord, by a TFDS builder; with Apache Beam where one machine is too few.

In: samples. Out: a folder that `records.py` reads.
Next: data_pipeline/records.py
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from data_pipeline.annotations import Sample
from data_pipeline.records import NAME, SCHEME, VERSION
from data_pipeline.stills import folder_fps


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes the two splits. With `beam` the media are read by Apache Beam workers."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, samples: Sequence[Sample] = (), *, beam: bool = False, **kwargs: Any) -> None:
        self._samples, self._beam = list(samples), beam
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict({"text": np.object_, "content": np.object_})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        files, placed = plan_media(self._samples)
        return {"samples": self._told(placed), "media": self._generate_examples(files)}

    def _told(self, placed: Sequence[Sample]) -> Iterator[tuple[int, dict[str, bytes]]]:
        for i, sample in enumerate(placed):
            yield i, {"text": json.dumps(dataclasses.asdict(sample)).encode(), "content": b""}

    def _generate_examples(self, files: Sequence[str]) -> Any:
        if self._beam:
            beam = tfds.core.lazy_imports.apache_beam
            return beam.Create(list(enumerate(files))) | beam.Map(_held)
        return map(_held, enumerate(files))


def _held(numbered: tuple[int, str]) -> tuple[int, dict[str, bytes]]:
    number, file = numbered
    try:
        content = epath.Path(file).read_bytes()
    except OSError:
        content = b""  # a missing file stays a bad sample, counted and named
    return number, {"text": os.path.basename(file).encode(), "content": content}


def plan_media(samples: Sequence[Sample]) -> tuple[list[str], list[Sample]]:
    """Every media file once, and the samples with their paths pointing into that list.

    A folder of frames is a run of files.
    """
    files: list[str] = []
    places: dict[str, str] = {}
    placed = []
    for sample in samples:
        for path in sample.paths:
            if path not in places:
                inside = sorted(os.path.join(path, n) for n in os.listdir(path)) if os.path.isdir(path) else [path]
                kind = "folder" if os.path.isdir(path) else "file"
                # A folder's frame rate is read off its path: the name must tell it too.
                name = f"{'tvqa-' if folder_fps(path) == 3 else ''}{os.path.basename(path.rstrip(os.sep))}"
                places[path] = f"{SCHEME}{len(files)}:{len(inside)}:{kind}:{name}"
                files += inside
        placed.append(dataclasses.replace(sample, paths=tuple(places[p] for p in sample.paths)))
    return files, placed


def prepare(samples: Sequence[Sample], out: str | os.PathLike[str], *, beam: Any = None) -> str:
    """Write samples and their media below `out`; the prepared folder.

    `beam` is a tfds `DownloadConfig` with Beam options for corpora that one machine cannot read.

    Raises:
      ValueError: the folder holds something already.
    """
    folder = epath.Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder, or remove it")
    builder = Builder(samples, beam=beam is not None, data_dir=os.fspath(folder))
    builder.download_and_prepare(download_config=beam)
    return os.fspath(builder.data_path)
