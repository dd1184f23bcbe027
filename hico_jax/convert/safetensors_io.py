"""Read and write safetensors with NumPy: an 8-byte length, a JSON header, bytes. Nothing in a file is ever executed.

In: a folder or a file. Out: a mapping from names to arrays that stay on disk until they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


Read = Callable[[str], np.ndarray | Iterable[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file
    stop: int


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read from disk when asked for. Arrays are read-only views of the file: copy to keep."""

    notes: tuple[str, ...] = ()  # what was done to them besides reading, for people

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if entry.start == entry.stop:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(entry.file, np.uint8, "r", offset=entry.start, shape=(entry.stop - entry.start,))
        return raw.view(np.ndarray).view(entry.dtype).reshape(entry.shape)

    def items_on_disk(self) -> Iterable[tuple[str, Entry]]:
        """Names and where their tensors lie; `items` would read them."""
        return self.entries.items()

    def forget(self, name: str) -> None:
        """Tell the system that this tensor's bytes need not stay in its cache: a large file is read once."""
        entry = self.entries[name]
        if hasattr(os, "posix_fadvise"):
            with entry.file.open("rb") as f:
                os.posix_fadvise(f.fileno(), entry.start, entry.stop - entry.start, os.POSIX_FADV_DONTNEED)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_tensors(source: str | os.PathLike[str]) -> Tensors:
    """The tensors of a file, or of a folder that holds `model.safetensors` or an index of several files.

    Raises:
      ValueError: nothing to read there, or a file is damaged; says which and where.
    """
    source = pathlib.Path(source)
    if source.is_file():
        if source.suffix != ".safetensors":
            raise ValueError(f"{source} is not a .safetensors file; formats that hold pickled code are not read")
        return Tensors(read_header(source))
    if (source / INDEX).is_file():
        return Tensors(_read_index(source))
    if (source / SINGLE).is_file():
        return Tensors(read_header(source / SINGLE))
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; give a .safetensors file or a folder that holds {SINGLE}")
    found = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{source} holds neither {INDEX} nor {SINGLE} (found: {found}). Formats that hold pickled code "
        "(.bin, .pt) are not read; save them as safetensors first."
    )


def read_header(file: pathlib.Path) -> dict[str, Entry]:
    """Where every tensor of one file lies, with every length and offset checked against the file's size.

    Raises:
      ValueError: the file is damaged or not of this format.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{file} is damaged: {size} bytes, of which the header claims {length}; fetch it again")
        text = f.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: its header is not JSON ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} is damaged: its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, 8 + length, size) for name, value in header.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise ValueError(f"{file} is damaged: {name} starts at byte {entry.start}, the one before ends at {at}")
        at = entry.stop
    if at != size:
        raise ValueError(f"{file} is damaged: its tensors end at byte {at} but it has {size}; fetch it again")
    return entries


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def _entry(file: pathlib.Path, name: str, value: Any, origin: int, size: int) -> Entry:
    def bad(what: str) -> ValueError:
        return ValueError(f"{file} is damaged: {name} has {what}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("not exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise bad(f"dtype {code!r}; known are {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise bad(f"{numbers!r:.80} where whole numbers should be")
    if len(shape) > 32:
        raise bad(f"{len(shape)} dimensions")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - origin:
        raise bad(f"offsets {offsets} in {size - origin} bytes of data")
    needed = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != needed:
        raise bad(f"{offsets[1] - offsets[0]} bytes where {code} {shape} needs {needed}")
    return Entry(file, DTYPES[code], tuple(shape), origin + offsets[0], origin + offsets[1])


def _read_index(folder: pathlib.Path) -> dict[str, Entry]:
    path = folder / INDEX
    try:
        where = json.loads(path.read_text("utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: no JSON with a weight_map of names to files ({error})") from error
    entries: dict[str, Entry] = {}
    for file in files:
        if not isinstance(file, str) or file != os.path.basename(file) or "\\" in file or file in ("", ".", ".."):
            raise ValueError(f"{path} names the file {file!r}; only files of the same folder are read")
        if not (folder / file).is_file():
            raise ValueError(f"{path} names {file}, which is missing; fetch it, or the whole folder, again")
        header = read_header(folder / file)
        lost = [name for name, other in where.items() if other == file and name not in header]
        if lost:
            raise ValueError(f"{path} says {lost[0]} is in {file}, but it is not ({len(lost)} such); fetch both again")
        entries |= {name: entry for name, entry in header.items() if where.get(name) == file}
    return entries


def write_tensors(
    folder: pathlib.Path,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Read,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Write `read(name)` for every name of `specs`, one tensor in memory at a time; the files' names.

    `read` may give a tensor in pieces, one after the other along its first axis. One file if all fits in
    `max_shard_bytes`, else several and an index, in the order of `specs`.
    """
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        write_file(folder / SINGLE, specs, read)
        return [SINGLE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_file(folder / file, {name: specs[name] for name in shard}, read)
    where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return [*names, INDEX]


def write_file(file: pathlib.Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], read: Read) -> None:
    """Write one file: under another name first, renamed when it is whole.

    Raises:
      ValueError: a dtype the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what PyTorch's loaders ask for
    at = 0
    for name, (dtype, shape) in specs.items():
        if dtype not in CODES:
            raise ValueError(f"{name} is {dtype}, which safetensors cannot hold; cast it to one of {', '.join(DTYPES)}")
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers want the data aligned

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name, (dtype, shape) in specs.items():
            given = read(name)
            if isinstance(given, np.ndarray):
                assert given.shape == shape, (name, given.shape, shape)
                given = [given]
            left = math.prod(shape)
            for array in given:
                assert array.dtype == dtype, (name, array.dtype, dtype)
                left -= array.size
                yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            assert left == 0, (name, left)

    write_atomically(file, chunks())


def write_atomically(file: pathlib.Path, data: bytes | Iterator[bytes | memoryview]) -> None:
    """Write to a temporary name beside `file` and rename, so that `file` is whole or absent."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as f:
            for chunk in (data,) if isinstance(data, bytes) else data:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
