"""Parameters that stay on disk until they are written out: of a run's checkpoint, or of a released folder.

In: a workdir, or torch tensors and the plan that places them. Out: our parameters by path, each read when asked for,
so that exporting holds one parameter (all its layers) at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hico_jax import checkpoint, lora
from hico_jax.convert import load
from hico_jax.convert.rules import Rule
from hico_jax.convert.safetensors_io import Tensors


@dataclasses.dataclass(frozen=True)
class Lazy:
    """One parameter, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def of_checkpoint(found: checkpoint.Stored, wanted: Mapping[str, Any]) -> dict[str, Lazy]:
    """The parameters of a checkpoint, adapters merged into the weights they adapt.

    Raises:
      ValueError: they are not the ones of the model.
    """
    config, arrays = lora.config_of(found.meta), found.arrays
    merged = set(lora.adapted(arrays))
    leaves: dict[str, Lazy] = {}
    for name in [n for n in arrays if not n.startswith(f"{lora.PREFIX}/")]:
        whole = name.removesuffix("/qvalue").removesuffix("/scale")
        path = whole if whole in merged else name
        if path in leaves:
            continue
        sources = [n for n in (path, f"{path}/qvalue", f"{path}/scale") if n in arrays]
        if path in merged:
            sources += [f"{lora.PREFIX}/{path}/{side}" for side in "ab"]

        def read(path: str = path, sources: list[str] = sources) -> np.ndarray:
            values = found.read(*sources)
            return np.asarray(lora.merge(values, config)[path] if path in merged else values[path])

        told = arrays[path if path in arrays else f"{path}/qvalue"]
        dtype = np.dtype(np.float32) if path in merged else np.dtype(told["dtype"])
        leaves[path] = Lazy(tuple(told["shape"]), dtype, read)
    problems = checkpoint.mismatches(leaves, wanted)
    if problems:
        raise ValueError(f"{found.folder} does not fit this model:\n  " + "\n  ".join(problems))
    return leaves


def of_tensors(plan: Mapping[str, tuple[Rule, Any]], tensors: Tensors) -> dict[str, Lazy]:
    """The planned parameters of torch tensors (`load.plan_whole`)."""
    leaves = {}
    for path, (rule, leaf) in plan.items():
        part = load.Part(rule, tensors, tuple(leaf.shape), None)
        leaves[path] = Lazy(tuple(leaf.shape), part.dtype, lambda part=part: part[...])
    return leaves
