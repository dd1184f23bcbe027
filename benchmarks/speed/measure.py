"""Timing, memory, roofs and the environment, the same for all rows."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bf16, datasheets
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "B200": 8e12}  # datasheets
RECORDED_ROOFS = {"product": 650e12, "attention": 620e12, "copy": 3.0e12}  # of one H100, when not measured before
ROOFS = "HICO_SPEED_ROOFS"  # the measured ones, as JSON, from the process that started this one


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program ready to run, and what compiling took."""

    run: Callable[..., Any]
    compile_s: float
    peak_gib: float | None  # of one execution, as the compiler plans it: arguments, results, temporary


def say(*words: Any) -> None:
    """Print at once."""
    print(*words, flush=True)


def compiled(jitted: Any, *args: Any, **static: Any) -> Compiled:
    """Compile for these arguments."""
    began = time.perf_counter()
    program = jitted.lower(*args, **static).compile()
    took = time.perf_counter() - began
    memory = program.memory_analysis()
    peak = None
    if memory is not None:
        sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        peak = (sizes - memory.alias_size_in_bytes) / 2**30
    return Compiled(program, took, peak)


def seconds(run: Callable[[], Any], repeats: int = 5, warm: int = 1, most_s: float = 20.0) -> float:
    """Median time of a call; fewer repeats when they would take longer than `most_s` together."""
    for _ in range(warm):
        jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) + times[-1] < most_s):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_gib() -> float | None:
    """Most memory that this process has held on the first device."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def _of_device(table: dict[str, float]) -> float | None:
    kind = jax.devices()[0].device_kind
    return next((value for name, value in table.items() if name in kind), None)


def datasheet_peak() -> float | None:
    """Dense bf16 FLOP/s on the datasheet."""
    return _of_device(PEAKS)


def datasheet_bandwidth() -> float | None:
    """Bytes a second of the memory, on the datasheet."""
    return _of_device(BANDWIDTHS)


def roofs() -> dict[str, float]:
    """FLOP/s of a product and of attention, bytes/s of a copy: measured earlier in this run, or recorded ones."""
    return {**RECORDED_ROOFS, **json.loads(os.environ.get(ROOFS, "{}"))}


def roof_seconds(products: float = 0.0, attention: float = 0.0, moved: float = 0.0) -> float:
    """The least time: FLOPs of products and attention one after the other, or bytes, whichever takes longer."""
    found = roofs()
    return max(products / found["product"] + attention / found["attention"], moved / found["copy"])


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__, "device": device.device_kind, "platform": device.platform,
        "version": str(getattr(device.client, "platform_version", ""))[:120].replace("\n", " "),
        "xla_flags": os.environ.get("XLA_FLAGS", ""), "cores": os.cpu_count(),
    }  # fmt: skip


def profile(run: Callable[[], Any], top: int = 14) -> list[dict[str, Any]]:
    """Where a call's time goes on the device: kernels by their total time, from a trace of one more call."""
    import collections
    import pathlib
    import tempfile

    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(run())
            (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
            data = jax.profiler.ProfileData.from_file(str(file))
            total: dict[str, float] = collections.defaultdict(float)
            count: dict[str, int] = collections.defaultdict(int)
            first, last = float("inf"), 0.0
            for plane in data.planes:
                if "GPU" not in plane.name:
                    continue
                for line in plane.lines:
                    if "Stream" not in (line.name or ""):
                        continue
                    for event in line.events:
                        total[event.name] += event.duration_ns
                        count[event.name] += 1
                        first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
    except Exception as error:  # a profile is a help, never a reason to lose a row
        say(f"no profile: {str(error)[:200]}")
        return []
    busy = sum(total.values())
    if busy:
        say(f"profile: busy {busy / 1e6:.2f} of {(last - first) / 1e6:.2f} ms, {sum(count.values())} kernels")
    found = sorted(total, key=lambda name: -total[name])[:top]
    for name in found:
        say(f"  {total[name] / 1e6:9.3f} ms {total[name] / busy:6.1%} {count[name]:6} x {name[:110]}")
    return [{"kernel": n, "ms": total[n] / 1e6, "share": total[n] / busy, "count": count[n]} for n in found]
