"""A protocol card: everything that a score depends on, so that two of them can be compared.

In: the model, its sampling and the command's settings. Out: plain JSON values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import jax

from data_pipeline.frames import Sampling
from hico_jax import __version__
from hico_jax.models.hico import HiCo

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av", "pillow", "tokenizers")


def model(loaded: HiCo, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The model: where it is, its sizes, what its compression does."""
    config = loaded.config
    geometry = config.geometry()
    parameters = jax.tree.leaves(loaded)
    return {
        "model": os.fspath(folder),
        "vision": type(config.vision).arch,
        "image_px": geometry.image_px,
        "llm": type(config.llm).arch,
        "parameters": int(sum(p.size for p in parameters)),
        "compressor": {"arch": type(config.compressor).arch, **dataclasses.asdict(config.compressor)},
        "drop": dataclasses.asdict(config.drop),
        "tokens_per_frame": geometry.tokens_per_clip / geometry.frames_per_clip,
        "max_length": config.max_length,
        "dtype": config.dtype,
        "weights_dtype": str(parameters[0].dtype),
    }


def sampling(chosen: Sampling) -> dict[str, Any]:
    """How frames are chosen."""
    return {
        "sample": chosen.sample, "min_frames": chosen.min_frames, "max_frames": chosen.max_frames,
        "multiple": chosen.multiple,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Machine, packages and commit. Not part of what must agree when a run goes on."""
    device = jax.devices()[0]
    return {
        "commit": commit(), "hico_jax": __version__, "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES}, "devices": f"{jax.device_count()} x {device.device_kind}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it; "unknown" in an installed package."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        git = ("git", "-C", str(root))
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if state.stdout.strip() else "")


def digest(paths: Iterable[pathlib.Path]) -> str:
    """The first 16 digits of the sha256 of files, in order."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def command() -> str:
    """The command line as it was typed, with the program's plain name."""
    return " ".join(["hico", *sys.argv[1:]])


def peak_memory_mib() -> dict[str, float]:
    """The most memory this process has held so far, and each accelerator where it says so."""
    import resource

    scale = 1024 if sys.platform.startswith("linux") else 1024 * 1024
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["device"] = stats["peak_bytes_in_use"] / 2**20
    return found
