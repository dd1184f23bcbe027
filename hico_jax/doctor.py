"""What this machine has, what works, and how to mend the rest.

In: nothing. Out: a list of `Check`s, printed as text or JSON; exit code 1 when something needed is broken.
Each check tries the thing itself (compiles, encodes, decodes, writes) instead of asking a version number.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from hico_jax import __version__

GOOD, NOTE, BAD = "ok", "note", "broken"  # a note does not stop a run on a CPU
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections", "numpy",
    "av", "pillow", "tensorflow-datasets", "sentencepiece", "tokenizers", "safetensors",
)  # fmt: skip
ACCELERATORS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
DECODERS = {
    "h264": "most mp4 files",
    "hevc": "phones",
    "vp9": "webm",
    "av1": "recent web videos",
    "mpeg4": "older avi files",
}
FREE_DISK_GB, FREE_MEMORY_GB = 2.0, 3.0


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report: a group, a name, what was found, and what to do about it."""

    group: str
    name: str
    found: str
    state: str = GOOD
    fix: str = ""


def main(args: argparse.Namespace) -> int:
    """Print the report. 0: fit to run on a CPU at least; 1: something needed is broken."""
    checks = examine()
    if args.json:
        print(json.dumps([dataclasses.asdict(c) for c in checks], indent=1))
    else:
        print("\n".join(lines(checks)))
    return int(any(c.state == BAD for c in checks))


def examine() -> list[Check]:
    """Every check, in the order of the report. A check that itself fails is reported as broken."""
    checks: list[Check] = []
    for group, make in GROUPS.items():
        try:
            checks.extend(make())
        except Exception as error:  # the report is for machines where anything may fail; what failed is its content
            checks.append(Check(group, group, _brief(error), BAD, "HICO_DEBUG=1 hico doctor shows where"))
            if os.environ.get("HICO_DEBUG", "0") not in ("", "0"):
                traceback.print_exc()
    return checks


def lines(checks: list[Check]) -> Iterator[str]:
    """The report as text, to be pasted into an issue."""
    marks = {GOOD: "  ", NOTE: " !", BAD: " X"}
    width = max(len(c.name) for c in checks)
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            yield f"\n{group}"
        yield f"{marks[check.state]} {check.name:<{width}}  {check.found}"
        if check.fix:
            yield f"   {'':<{width}}  -> {check.fix}"
    broken = [c.name for c in checks if c.state == BAD]
    notes = sum(c.state == NOTE for c in checks)
    yield ""
    yield f"Broken: {', '.join(broken)}" if broken else f"Fit to run ({notes} note{'s' * (notes != 1)})."


def versions(installed: Callable[[str], str] = importlib.metadata.version) -> Iterator[Check]:
    """What is installed, and what should not be there or does not go together."""
    yield Check("versions", "hico_jax", __version__)
    yield Check("versions", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    found: dict[str, str] = {}
    for name in (*PACKAGES, *ACCELERATORS):
        try:
            found[name] = installed(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PACKAGES:
                yield Check(
                    "versions", name, "not installed", BAD, "bash launch/venv.sh, or pip install -r requirements.txt"
                )
            continue
        yield Check("versions", name, found[name])
    yield from problems(found, sys.version_info[:2])


def problems(found: Mapping[str, str], python: tuple[int, int]) -> Iterator[Check]:
    """Known bad combinations of what is installed."""
    if python < (3, 11):
        yield Check("versions", "python", f"{python[0]}.{python[1]}", BAD, "use Python 3.11 or later")
    if "jax" in found and "jaxlib" in found and found["jax"].split(".")[:2] != found["jaxlib"].split(".")[:2]:
        pair = f"jax {found['jax']} with jaxlib {found['jaxlib']}"
        yield Check(
            "versions", "jax and jaxlib", pair, BAD, f'pip install -U "jax=={found["jax"]}" "jaxlib=={found["jax"]}"'
        )
    if "libtpu" in found and any("cuda" in name for name in found):
        yield Check(
            "versions", "accelerators", "both TPU and CUDA plugins", NOTE, "set JAX_PLATFORMS=tpu or cuda to choose"
        )


def devices() -> Iterator[Check]:
    """What JAX sees, and whether it compiles and computes."""
    import jax
    import jax.numpy as jnp

    found = jax.devices()
    for device in found[:1]:
        stats = device.memory_stats() if device.platform != "cpu" else None
        memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB each" if stats and "bytes_limit" in stats else ""
        yield Check("devices", device.platform, f"{len(found)} x {device.device_kind}{memory}")
    if found[0].platform == "cpu":
        wrong = next((w for w in _unused_accelerators()), None)
        if wrong:
            yield Check("devices", "accelerator", f"{wrong[0]}, but JAX does not use it", NOTE, wrong[1])
    began = time.perf_counter()
    value = jax.jit(lambda x: (x @ x.T).sum())(jnp.ones((8, 16), jnp.float32))
    right = float(value) == 8 * 8 * 16
    spent = f"{time.perf_counter() - began:.2f} s"
    yield (
        Check("devices", "compile", spent, GOOD)
        if right
        else Check(
            "devices",
            "compile",
            f"a small product came out as {float(value)}, not 1024",
            BAD,
            "reinstall jax and jaxlib",
        )
    )
    folder = jax.config.values.get("jax_compilation_cache_dir")
    cache = str(folder) if folder else "none"
    hint = "" if folder else "set JAX_COMPILATION_CACHE_DIR to a folder to keep what is compiled between runs"
    yield Check("devices", "compilation cache", cache, GOOD, hint)


def _unused_accelerators() -> Iterator[tuple[str, str]]:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    if pathlib.Path("/dev/nvidia0").exists():
        yield "an NVIDIA GPU is there", "pip install 'hico_jax[cuda]'"
    if pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists():
        yield "a TPU seems to be there", "pip install 'hico_jax[tpu]'"


def codecs() -> Iterator[Check]:
    """What can be decoded, and whether a small video survives the way out and back."""
    import av

    for name, where in DECODERS.items():
        try:
            av.Codec(name, "r")
        except ValueError:  # PyAV's UnknownCodecError
            state, fix = (BAD, "pip install -U av") if name == "h264" else (NOTE, f"{name} files will be refused")
            yield Check("video", name, f"no decoder ({where})", state, fix)
        else:
            yield Check("video", name, f"decodes ({where})")
    count = _round_trip()
    yield Check("video", "write and read", f"{count} of 8 frames in H.264", GOOD if count == 8 else BAD)


def _round_trip() -> int:
    import av

    stream = io.BytesIO()
    with av.open(stream, mode="w", format="mp4") as out:
        track = out.add_stream("libx264", rate=4)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        for i in range(8):
            out.mux(track.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 * i, np.uint8), format="rgb24")))
        out.mux(track.encode())
    stream.seek(0)
    with av.open(stream, mode="r", format="mp4") as back:
        return sum(1 for _ in back.decode(video=0))


def room() -> Iterator[Check]:
    """Cores, memory, disk, and whether this folder can be written."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("machine", "cores", str(cores))
    free = _free_memory_gb()
    if free is not None:
        short = free < FREE_MEMORY_GB
        yield Check(
            "machine", "memory", f"{free:.1f} GB free", NOTE if short else GOOD,
            f"the demo wants about {FREE_MEMORY_GB:.0f} GB; close something" if short else "",
        )  # fmt: skip
    disk = shutil.disk_usage(pathlib.Path.cwd()).free / 1e9
    tight = disk < FREE_DISK_GB
    yield Check("machine", "disk", f"{disk:.1f} GB free here", NOTE if tight else GOOD, "make room" if tight else "")
    try:
        with tempfile.TemporaryFile(dir=pathlib.Path.cwd()):
            pass
    except OSError as error:
        yield Check("machine", "this folder", _brief(error), NOTE, "run from a folder you may write to, or give --out")


def _free_memory_gb() -> float | None:
    info = pathlib.Path("/proc/meminfo")
    if not info.exists():
        return None
    sizes = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    return int(sizes["MemAvailable"].split()[0]) / 1e6


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


GROUPS: dict[str, Callable[[], Iterator[Check]]] = {
    "versions": versions,
    "devices": devices,
    "video": codecs,
    "machine": room,
}
