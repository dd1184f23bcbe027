"""Read PyTorch's pickled files (`.bin`, `.pt`) without running anything that is in them.

In: a file. Out: where each tensor lies in it, like `safetensors_io.read_header`. The pickle may name tensors and
dictionaries only; any other name is refused before it is looked up, so nothing is ever imported or called.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hico_jax.convert.safetensors_io import Entry

MAX_PICKLE = 100_000_000  # bytes of the pickle, which holds names and shapes only
STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
WRAPPERS = ("state_dict", "module", "model")  # keys under which training scripts put the weights


class _Tensor(NamedTuple):
    key: str
    dtype: np.dtype
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage.key, storage.dtype, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Knows five names; each stands for something of ours, never for what the name says."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
            raise pickle.UnpicklingError("it refers to something that is no tensor")
        return _Storage(str(pid[2]), pid[1], int(pid[4]))


def read_pickle(file: pathlib.Path) -> dict[str, Entry]:
    """Where every tensor of one file lies.

    Raises:
      ValueError: the file is damaged, of the format before PyTorch 1.6, or holds more than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            places = _places(file, archive)
            (name,) = [n for n in places if n.endswith("/data.pkl")] or [""]
            if not name or archive.getinfo(name).file_size > MAX_PICKLE:
                raise ValueError(f"{file} is not a PyTorch file: it has no data.pkl of a usual size")
            found = _Unpickler(io.BytesIO(archive.read(name))).load()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or older than PyTorch 1.6 ({error}); fetch it again, or save it as safetensors"
        ) from error
    except Exception as error:  # a hostile pickle may fail in any way
        if isinstance(error, ValueError) and str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file} is refused: {error}. Nothing in it was run. Save it as safetensors.") from error
    tensors = _flat(file, found)
    root = name.removesuffix("data.pkl")
    return {key: _entry(file, key, tensor, root, places) for key, tensor in tensors.items()}


def _flat(file: pathlib.Path, found: Any) -> dict[str, _Tensor]:
    for _ in range(2):
        inner = [found[w] for w in WRAPPERS if isinstance(found, dict) and isinstance(found.get(w), dict)]
        if inner:
            found = inner[0]
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not tensors by name")
    tensors = {str(key): value for key, value in found.items() if isinstance(value, _Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no tensors by name")
    return tensors


def _places(file: pathlib.Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """First byte and size of every file of the archive; PyTorch never compresses."""
    out: dict[str, tuple[int, int]] = {}
    with file.open("rb") as raw:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{file} is not a PyTorch file: {info.filename} in it is compressed")
            raw.seek(info.header_offset)
            header = raw.read(30)
            skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            out[info.filename] = (info.header_offset + 30 + skip, info.file_size)
    return out


def _entry(file: pathlib.Path, name: str, tensor: _Tensor, root: str, places: dict[str, tuple[int, int]]) -> Entry:
    place = places.get(f"{root}data/{tensor.key}")
    if place is None:
        raise ValueError(f"{file} is damaged: {name} lies in data/{tensor.key}, which is missing; fetch it again")
    start, size = place
    sizes = [*tensor.shape, 1]
    usual = tuple(int(np.prod(sizes[i + 1 :])) for i in range(len(tensor.shape)))
    width = tensor.dtype.itemsize
    count = int(np.prod(tensor.shape))
    plain = all(a == b or n == 1 for a, b, n in zip(tensor.strides, usual, tensor.shape, strict=True))
    if not plain and count:
        raise ValueError(f"{file}: {name} is not contiguous; save it again with `.contiguous()`, or as safetensors")
    first = tensor.offset * width
    if tensor.offset < 0 or min(tensor.shape, default=0) < 0 or first + count * width > size:
        raise ValueError(f"{file} is damaged: {name} reaches beyond its {size} bytes; fetch it again")
    return Entry(file, tensor.dtype, tensor.shape, start + first, start + first + count * width)
