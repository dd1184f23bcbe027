"""Our parameters as a folder that a PyTorch user, or `load`, can read: safetensors, `config.json`, tokenizer files.

In: a model. Out: a folder, complete or absent. The names are those of `load`, read from right to left.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.convert import hf_config, lazy, load, native, safetensors_io
from hico_jax.convert.rules import Rule
from hico_jax.models.hico import HiCo, HiCoConfig

GENERATION = "generation_config.json"


def export(
    model: HiCo,
    folder: str | os.PathLike[str],
    *,
    raw: Mapping[str, Any] | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    eos: Sequence[int] = (),
) -> pathlib.Path:
    """Write the model in the reference's layout and return the folder.

    Args:
      raw: `config.json` as `load` returned it; its unknown keys are kept.
      files: further files to copy in (tokenizer, generation settings).
      dtype: of the tensors written; None keeps the parameters' own.
      eos: tokens that end an answer, for `generation_config.json`, where neither `files` nor `raw` tell them.

    Raises:
      ValueError: the folder holds something and `overwrite` is off, a file to copy is missing, or the model has
        an architecture the reference does not know.
    """
    write_released(
        model.config, load.by_path(nnx.split(model)[1]), folder,
        raw=raw, files=files, dtype=dtype, overwrite=overwrite, max_shard_bytes=max_shard_bytes, eos=eos,
    )  # fmt: skip
    return pathlib.Path(os.path.abspath(folder))


def write_released(
    config: HiCoConfig,
    leaves: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    raw: Mapping[str, Any] | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    language_only: bool = False,
    eos: Sequence[int] = (),
) -> native.Receipt:
    """`export` of parameters by path, which may be on disk: then a layer, or a parameter (`lazy`), is in memory.

    With `language_only` the folder holds the language model alone, as its own family's programs read it.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    check_target(folder, overwrite)
    lost = [str(f) for f in files if not pathlib.Path(f).is_file()]
    if lost:
        raise ValueError(f"cannot copy {', '.join(lost)}: no such file")
    found = _sources(config, leaves, language_only)
    specs = {name: (jnp.dtype(dtype) if dtype else leaf.dtype, shape) for name, (_, leaf, _, shape) in found.items()}
    text = hf_config.to_raw(config, raw, torch_dtype=_common(specs))
    if language_only:
        text = hf_config.language_raw(config, text)
    tally = native.Tally()
    with new_folder(folder, sum(int(np.prod(shape)) * kind.itemsize for kind, shape in specs.values())) as temporary:
        copy_files(files, temporary)
        if not (temporary / GENERATION).exists():
            ends = text.get("eos_token_id") or eos
            safetensors_io.write_atomically(temporary / GENERATION, generation_text(ends).encode())
        encoded = (json.dumps(text, indent=2, ensure_ascii=False) + "\n").encode()
        safetensors_io.write_atomically(temporary / load.CONFIG, encoded)
        read = _reader(found, specs, tally)
        safetensors_io.write_tensors(temporary, specs, read, max_shard_bytes=max_shard_bytes)
    return tally.receipt()


def generation_text(eos: int | Sequence[int]) -> str:
    """A `generation_config.json` that says which tokens end an answer, if any are known."""
    ends = [eos] if isinstance(eos, int) else list(eos)
    told = {"_from_model_config": True} | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})
    return json.dumps(told, indent=2) + "\n"


def copy_files(files: Sequence[str | os.PathLike[str]], folder: pathlib.Path) -> None:
    """Files beside the weights, under their own names."""
    for file in files:
        shutil.copyfile(file, folder / pathlib.Path(file).name)


def check_target(folder: pathlib.Path, overwrite: bool) -> None:
    """Whether a new folder may stand there.

    Raises:
      ValueError: it holds something and `overwrite` is off.
    """
    if folder.exists() and not (overwrite and folder.is_dir()) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another, or pass overwrite=True")


@contextlib.contextmanager
def new_folder(folder: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes the place of `folder` when all went well, and vanishes when anything did not.

    Raises:
      ValueError: the disk has no room for `num_bytes`, or became full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise ValueError(f"{folder} needs {num_bytes:,} bytes but its disk has {free:,} free; nothing was written")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        _swap(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"the disk of {folder} became full ({error.strerror}); nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


Source = tuple[Rule, Any, int, tuple[int, ...]]  # rule, our parameter, layer, torch shape


def _sources(config: HiCoConfig, leaves: Mapping[str, Any], language_only: bool) -> dict[str, Source]:
    """Where each torch tensor comes from, parameter by parameter."""
    left = {path: leaf for path, leaf in leaves.items() if path.startswith("llm/") or not language_only}
    out: dict[str, Source] = {}
    for rule in load.rules(config):
        if language_only and not rule.path.startswith("llm/"):
            continue
        leaf = left.pop(rule.path, None)
        if leaf is None:
            assert rule.optional, f"the model has no {rule.path}"
            continue
        count, shape = (leaf.shape[0], leaf.shape[1:]) if rule.stacked else (1, leaf.shape)
        names = [n.removeprefix("language_model.") if language_only else n for n in rule.names(count)]
        out |= {name: (rule, leaf, i, rule.torch_shape(shape)) for i, name in enumerate(names)}
    assert not left, f"parameters without a torch name: {sorted(left)}"
    return out


def _reader(
    sources: Mapping[str, Source], specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tally: native.Tally
) -> Callable[[str], np.ndarray]:
    """A function that fetches each parameter from its device or from disk once: its layers are asked for in turn.

    Arrays mapped from disk are fetched layer by layer.
    """
    held: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        rule, leaf, layer, _ = sources[name]
        if rule.path not in held:
            held.clear()
            held[rule.path] = leaf.read() if isinstance(leaf, lazy.Lazy) else np.asarray(leaf)
        array = held[rule.path][layer] if rule.stacked else held[rule.path]
        return tally.add(name, rule.path, rule.to_torch(array).astype(specs[name][0], copy=False))

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
