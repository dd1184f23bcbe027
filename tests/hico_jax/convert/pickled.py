"""PyTorch's file format by hand, so that its reader is tested without PyTorch."""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import sys
import types
import zipfile
from typing import Any

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class _Storage:
    def __init__(self, kind: str, key: str, size: int) -> None:
        self.kind, self.key, self.size = kind, key, size


def save(
    file: pathlib.Path, tensors: dict[str, np.ndarray], *, wrap: str = "", extra: Any = None, **zipped: Any
) -> None:
    """What `torch.save` of an OrderedDict of contiguous tensors writes. `extra` goes into the pickle as it is."""
    names = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}

    def _rebuild_tensor_v2(*args: Any) -> None:
        raise AssertionError("only its name is used")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    names["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    for kind in KINDS.values():
        setattr(names["torch"], kind, type(kind, (), {"__module__": "torch", "__qualname__": kind}))

    class Tensor:
        def __init__(self, key: str, array: np.ndarray) -> None:
            self.key, self.array = key, array

        def __reduce__(self) -> Any:
            storage = _Storage(KINDS[self.array.dtype.name], self.key, self.array.size)
            strides = tuple(s // self.array.itemsize for s in self.array.strides)
            return _rebuild_tensor_v2, (storage, 0, self.array.shape, strides, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, _Storage):
                return ("storage", getattr(names["torch"], obj.kind), obj.key, "cpu", obj.size)
            return None

    found: Any = collections.OrderedDict((n, Tensor(str(i), a)) for i, (n, a) in enumerate(tensors.items()))
    if extra is not None:
        found["extra"] = extra
    buffer = io.BytesIO()
    sys.modules |= names
    try:
        Pickler(buffer, protocol=2).dump({wrap: found} if wrap else found)
    finally:
        for name in names:
            del sys.modules[name]
    with zipfile.ZipFile(file, "w", **zipped) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes(order="A"))
        archive.writestr("archive/version", "3\n")
