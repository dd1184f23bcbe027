"""One film from file to answer, each step timed and its memory told, in a process of its own.

    python -m hico_jax.evals.compress.latency MODEL FILM FRAMES METHOD [DROP [QUANTIZE]]

A fresh process has no other film's peak memory. Programs are compiled before they are timed.

In: the command line. Out: one JSON object on the last line of stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline import chat, layout, video
from data_pipeline.buckets import ladder
from data_pipeline.frames import time_message
from data_pipeline.tokenizer import load_tokenizer
from hico_jax import generate
from hico_jax.batch import DropSchedule
from hico_jax.evals import card
from hico_jax.evals.compress import methods
from hico_jax.models.hico import HiCo, normalize
from hico_jax.options import parse_drop
from hico_jax.shapes import Array

QUESTION = "What happens in the video?"
NEW_TOKENS = 16
CLIPS_PER_STEP = 16


@jax.jit
def see(model: HiCo, clips: Array) -> Array:
    """The tower alone."""
    return model.vision(normalize(clips, jnp.dtype(model.config.dtype)))


@jax.jit
def merge(model: HiCo, patches: Array) -> Array:
    """The compressor alone."""
    geometry = model.config.geometry()
    return model.compressor(patches, geometry.tokens_per_clip, geometry.frames_per_clip)


@jax.jit
def project(model: HiCo, tokens: Array) -> Array:
    """The projector alone."""
    return model.projector(tokens)


def measure(model: HiCo, tokenizer: Any, film: str, frames: int) -> dict[str, Any]:
    """Seconds of reading, tower, merging, projector, prefill and decoding, and the memory of prefill."""
    geometry = model.config.geometry()
    seconds: dict[str, float] = dict.fromkeys(("read", "vision", "merge", "project"), 0.0)
    steps = (("vision", see), ("merge", merge), ("project", project))
    size, px = CLIPS_PER_STEP * geometry.frames_per_clip, geometry.image_px
    parts, first = [], True
    began = time.perf_counter()
    for chunk in video.iter_frames(film, np.arange(frames), (px, px), size):
        seconds["read"] += time.perf_counter() - began
        count = len(chunk) // geometry.frames_per_clip
        clips = np.zeros((CLIPS_PER_STEP, geometry.frames_per_clip, px, px, 3), np.uint8)
        clips[:count] = chunk.reshape(count, geometry.frames_per_clip, px, px, 3)
        if first:  # compile
            project(model, merge(model, see(model, clips)))
        x: Any = clips
        for name, step in steps:
            start = time.perf_counter()
            x = jax.block_until_ready(step(model, x))
            seconds[name] += time.perf_counter() - start
        first = False
        parts.append(x[:count].reshape(1, -1, x.shape[-1]))
        began = time.perf_counter()
    visual = jnp.concatenate(parts, axis=1)
    return seconds | _answer(model, tokenizer, visual, frames)


def _answer(model: HiCo, tokenizer: Any, visual: Array, frames: int) -> dict[str, Any]:
    geometry, llm = model.config.geometry(), model.llm
    text = chat.first_question(QUESTION, time_message(float(frames), range(frames), 1.0))
    ids = chat.prompt_ids(tokenizer, [{"role": "user", "content": text}])
    clips = frames // geometry.frames_per_clip
    row = layout.row(ids, None, [layout.Visual(num_clips=clips)], geometry)
    batch = layout.collate(
        [row], geometry, ladder(len(row), 64), clips, training=False, pixels=False, drop_multiple=32
    )  # fmt: skip
    stream = jax.block_until_ready(generate.spliced(model, batch, visual))
    config = generate.GenerationConfig(max_new_tokens=NEW_TOKENS, eos=())
    began = time.perf_counter()
    prefill = (
        jax.jit(generate.prefill, static_argnames=("schedule", "room"))
        .lower(llm, stream, batch.drop, schedule=model.config.drop, room=NEW_TOKENS).compile()
    )  # fmt: skip
    compile_s = time.perf_counter() - began
    began = time.perf_counter()
    logits, cache = jax.block_until_ready(prefill(llm, stream, batch.drop))
    prefill_s = time.perf_counter() - began
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(cache))
    generate.finish(llm, logits, jax.tree.map(jnp.copy, cache), config)  # compiles
    began = time.perf_counter()
    generate.finish(llm, logits, cache, config)
    memory = prefill.memory_analysis()
    used = getattr(memory, "temp_size_in_bytes", 0) + getattr(memory, "output_size_in_bytes", 0)
    return {
        "prefill": prefill_s, "decode": time.perf_counter() - began, "compile": compile_s,
        "visual_tokens": int((row.slots >= 0).sum()), "kept": list(geometry.drop.kept(int((row.slots >= 0).sum()))),
        "prefill_mib": used / 2**20, "cache_mib": cache_bytes / 2**20,
    }  # fmt: skip


def row(model_folder: str, film: str, frames: int, name: str, drop: str = "", kind: str = "") -> dict[str, Any]:
    """One line of the table; `drop` replaces the method's own, `kind` is one of `quantize.KINDS`."""
    from hico_jax import (
        ask,
        quantize,
    )  # what reads weights is not needed where they are random (benchmarks/long_video.py)

    model, tokenizer_folder = ask.load_model(model_folder)
    (method,) = (m for m in methods.methods(model) if m.name == name)
    made = methods.apply(model, method)
    if drop:
        made = ask.with_drop(made, DropSchedule(*parse_drop(drop)))
    if kind:
        made = quantize.quantized(made, kind)
    found = measure(made, load_tokenizer(tokenizer_folder), film, frames)
    peak = card.peak_memory_mib()
    return {"frames": frames, "method": name, "drop": drop, **found, "peak_mib": peak}


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or its peak is the reservation
    model_, film_, frames_, name_, *rest_ = sys.argv[1:]
    print(json.dumps(row(model_, film_, int(frames_), name_, *rest_)))
