"""What a second start costs: the same programs, compiled once and then taken from the persistent compilation cache."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
MARK = "START "


def second(*, model: str, frames: int, small: bool) -> dict[str, Any]:
    """Seconds of compiling in a second process; the first one fills a cache of its own. This process stays off the
    device meanwhile, so that both have its memory."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip
        code = f"from benchmarks.speed import start; start.child({model!r}, {frames}, {small})"
        runs = []
        for _ in range(2):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **cache}, capture_output=True, text=True
            )
            line = next((s for s in done.stdout.splitlines() if s.startswith(MARK)), None)
            if line is None:
                raise RuntimeError(f"the child ended with {done.returncode}: {done.stderr[-600:]}")
            runs.append(json.loads(line.removeprefix(MARK)) | {"process_s": time.perf_counter() - began})
            print(f"{runs[-1]}", flush=True)
        size = sum(f.stat().st_size for f in pathlib.Path(folder).rglob("*") if f.is_file())
    first, again = runs
    return {
        "value": again["compile_s"], "compile_s": first["compile_s"], "first": first, "second": again,
        "cache_mib": size / 2**20,
        "note": f"first {first['compile_s']:.1f} s, second {again['compile_s']:.1f} s of compiling "
        f"({', '.join(f'{k} {v:.1f}' for k, v in again['parts'].items())}); whole process {first['process_s']:.1f} and "
        f"{again['process_s']:.1f} s; {again['hits']} programs from {size / 2**20:.0f} MiB",
    }  # fmt: skip


def child(model: str, frames: int, small: bool) -> None:
    """In a process of its own: every program of an answer, twice; what the first call took beyond the second."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from benchmarks.speed import models
    from hico_jax import generate

    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
    whole = models.config_of(model, small)
    frames = 16 if small else frames
    config, drop = whole.llm, models.schedule("none", whole.llm.num_layers)
    tower = models.build(whole, jnp.bfloat16, ("vision", "compressor", "projector"))
    llm = models.build(config, jnp.bfloat16, packing="rows")
    clips, px = 4 if small else 16, whole.vision.image_px
    pixels = jnp.zeros((1, clips, whole.vision.frames_per_clip, px, px, 3), jnp.uint8)
    none = jnp.zeros((1, 0, px, px, 3), jnp.uint8)
    graph, state = nnx.split(tower)
    encode = jax.jit(lambda state, pixels: nnx.merge(graph, state).encode(pixels, none))
    settings = generate.GenerationConfig(max_new_tokens=8, eos=(-1,))
    stream, plan = models.row(config, frames * whole.compressor.tokens_per_frame, drop)
    jax.block_until_ready((state, stream, jax.tree.leaves(llm)))
    made = len(hits)

    def timed(run: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        out = jax.block_until_ready(run())
        return out, time.perf_counter() - began

    parts: dict[str, list[float]] = {"tower": [], "prefill": [], "decode": []}
    for _ in range(2):
        parts["tower"].append(timed(lambda: encode(state, pixels))[1])
        (logits, cache), took = timed(lambda: generate.begin(llm, stream, plan, schedule=drop, room=8))
        parts["prefill"].append(took)
        parts["decode"].append(timed(lambda a=logits, c=cache: generate.finish(llm, a, c, settings).ids)[1])
    over = {name: max(0.0, a - b) for name, (a, b) in parts.items()}
    print(MARK + json.dumps({"compile_s": sum(over.values()), "parts": over, "hits": len(hits) - made}), flush=True)
