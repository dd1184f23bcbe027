"""Our own folder of weights: safetensors under our paths, layers stacked, so that a mesh reads its shards as they lie.

In: torch tensors on disk. Out: a folder, complete or absent, written tensor by tensor; and such a folder back as
arrays on disk. `config.json` holds `hico_jax_weights` (the format), the released `config.json` it came from, and
whether it is a whole model or a part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hico_jax.convert import safetensors_io, sources
from hico_jax.convert.rules import Rule
from hico_jax.convert.safetensors_io import Tensors

FORMAT = "hico_jax_weights"
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json",
)  # fmt: skip


@dataclasses.dataclass
class Receipt:
    """What was read and written, for people."""

    parameters: dict[str, int]  # by part
    bytes: int
    seconds: float
    checksum: str  # of every tensor in its torch layout, in the order of the table: equal on import and export

    def text(self, verb: str, target: str) -> str:
        """Two lines."""
        parts = ", ".join(f"{part} {count:,}" for part, count in self.parameters.items())
        rate = self.bytes / 1e9 / max(self.seconds, 1e-9)
        return (
            f"{verb} {sum(self.parameters.values()):,} parameters ({parts}) to {target}\n"
            f"{self.bytes:,} bytes in {self.seconds:.1f} s ({rate:.2f} GB/s); sha256 {self.checksum}"
        )


class Tally:
    """Counts and hashes torch tensors as they pass."""

    def __init__(self) -> None:
        self._began, self._hash = time.perf_counter(), hashlib.sha256()
        self._parameters: dict[str, int] = {}
        self._bytes = 0

    def add(self, name: str, path: str, tensor: np.ndarray) -> np.ndarray:
        """Pass `tensor` on, contiguous."""
        tensor = np.ascontiguousarray(tensor)
        self._hash.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        self._hash.update(tensor.reshape(-1).view(np.uint8).data)
        part = path.split("/")[0]
        self._parameters[part] = self._parameters.get(part, 0) + tensor.size
        self._bytes += tensor.nbytes
        return tensor

    def receipt(self) -> Receipt:
        """What has passed so far."""
        seconds = time.perf_counter() - self._began
        return Receipt(self._parameters, self._bytes, seconds, self._hash.hexdigest())


def write(
    folder: pathlib.Path,
    plan: Mapping[str, tuple[Rule, Any]],
    tensors: Tensors,
    raw: Mapping[str, Any],
    *,
    whole: bool,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Receipt:
    """Write the planned parameters of `tensors` into `folder` (which exists), one layer in memory at a time.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    tally, specs = Tally(), {}
    for path, (rule, leaf) in plan.items():
        names = rule.names(leaf.shape[0] if rule.stacked else 1)
        widest = max((tensors.entries[name].dtype for name in names), key=lambda d: d.itemsize)
        specs[path] = (dtype or widest, tuple(leaf.shape))

    def layers(path: str) -> Iterator[np.ndarray]:
        rule, leaf = plan[path]
        sizes = rule.sizes(leaf.shape[1:] if rule.stacked else leaf.shape)
        for name in rule.names(leaf.shape[0] if rule.stacked else 1):
            tensor = tensors[name]
            sources.check_finite(name, tensor)
            tally.add(name, path, tensor)
            yield rule.to_ours(tensor, sizes).astype(specs[path][0], copy=False)
            tensors.forget(name)

    safetensors_io.write_tensors(folder, specs, layers, max_shard_bytes=max_shard_bytes)
    text = {FORMAT: 1, "whole": whole, "released": dict(raw)}
    encoded = (json.dumps(text, indent=2, ensure_ascii=False) + "\n").encode()
    safetensors_io.write_atomically(folder / "config.json", encoded)
    return tally.receipt()


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a folder's `config.json` is of this format."""
    return FORMAT in config


def read(folder: str | os.PathLike[str]) -> Tensors:
    """The arrays of such a folder by our paths, on disk until used."""
    return safetensors_io.open_tensors(folder)


def side_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """What else belongs to a released model: tokenizer, generation settings, the reference's own code."""
    named = [folder / name for name in SIDE_FILES]
    code = sorted(folder.glob("*.py"))
    return [path for path in (*named, *code) if path.is_file()]


def problems(wanted: Mapping[str, Any], tensors: Tensors, paths: Iterable[str]) -> list[str]:
    """Where arrays of such a folder are not what a model asks for."""
    out = []
    for path in paths:
        shape = tensors.entries[path].shape if path in tensors.entries else "missing"
        if shape != tuple(wanted[path].shape):
            out.append(f"{path}: found {shape}, expected {tuple(wanted[path].shape)}")
    return out + [f"{path}: no such parameter" for path in tensors if path not in wanted]
