"""Our parameters as a folder that a PyTorch user, or `load`, can read: safetensors, `config.json`, tokenizer files.

In: a model. Out: a folder, complete or absent. The names are those of `load`, read from right to left.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.convert import hf_config, load, safetensors_io
from hico_jax.convert.rules import Rule
from hico_jax.models.hico import HiCo


def export(
    model: HiCo,
    folder: str | os.PathLike[str],
    *,
    raw: Mapping[str, Any] | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> pathlib.Path:
    """Write the model in the reference's layout and return the folder.

    Args:
      raw: `config.json` as `load` returned it; its unknown keys are kept.
      files: further files to copy in (tokenizer, generation settings).
      dtype: of the tensors written; None keeps the parameters' own.

    Raises:
      ValueError: the folder holds something and `overwrite` is off, a file to copy is missing, or the model has
        an architecture the reference does not know.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    if folder.exists() and not (overwrite and folder.is_dir()) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another, or pass overwrite=True")
    lost = [str(f) for f in files if not pathlib.Path(f).is_file()]
    if lost:
        raise ValueError(f"cannot copy {', '.join(lost)}: no such file")
    sources = _sources(model)
    specs = {name: (jnp.dtype(dtype) if dtype else leaf.dtype, shape) for name, (_, leaf, _, shape) in sources.items()}
    config = hf_config.to_raw(model.config, raw, torch_dtype=_common(specs))

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        for file in files:
            shutil.copyfile(file, temporary / pathlib.Path(file).name)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        safetensors_io.write_atomically(temporary / load.CONFIG, text.encode())
        safetensors_io.write_tensors(temporary, specs, _reader(sources, specs), max_shard_bytes=max_shard_bytes)
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


Source = tuple[Rule, Any, int, tuple[int, ...]]  # rule, our parameter, layer, torch shape


def _sources(model: HiCo) -> dict[str, Source]:
    """Where each torch tensor comes from, parameter by parameter."""
    leaves = load.by_path(nnx.split(model)[1])
    out: dict[str, Source] = {}
    for rule in load.rules(model.config):
        leaf = leaves.pop(rule.path, None)
        if leaf is None:
            assert rule.optional, f"the model has no {rule.path}"
            continue
        count, shape = (leaf.shape[0], leaf.shape[1:]) if rule.stacked else (1, leaf.shape)
        out |= {name: (rule, leaf, i, rule.torch_shape(shape)) for i, name in enumerate(rule.names(count))}
    assert not leaves, f"parameters without a torch name: {sorted(leaves)}"
    return out


def _reader(sources: Mapping[str, Source], specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Any:
    """A function that fetches each parameter from its device once: its layers are asked for one after the other."""
    held: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        rule, leaf, layer, _ = sources[name]
        if rule.path not in held:
            held.clear()
            held[rule.path] = np.asarray(jax.device_get(leaf))
        array = held[rule.path][layer] if rule.stacked else held[rule.path]
        return rule.to_torch(array).astype(specs[name][0], copy=False)

    return read


def _common(specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    return collections.Counter(dtype.name for dtype, _ in specs.values()).most_common(1)[0][0]


def _swap(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Put `new` where `folder` is. What was there goes only when the new one is in place."""
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
