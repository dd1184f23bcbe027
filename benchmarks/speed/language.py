"""Prefill and decoding of the language model alone, on random embeddings, through `hico_jax.generate`."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import measure, models
from hico_jax import generate
from hico_jax.batch import DropSchedule
from hico_jax.kernels import decode as decode_kernels

ROOM = 1024  # free places behind the prompt, as for an answer


def prefill(*, model: str, frames: int, kind: str, small: bool) -> dict[str, Any]:
    """Seconds from embeddings to the logits of the last token and a full cache."""
    whole = models.config_of(model, small)
    config = whole.llm
    visual = (64 if small else frames) * whole.compressor.tokens_per_frame
    drop = models.schedule(kind, config.num_layers)
    llm = models.build(config, jnp.bfloat16)
    stream, plan = models.row(config, visual, drop)
    room = 16 if small else ROOM
    began = time.perf_counter()
    logits, cache = jax.block_until_ready(generate.begin(llm, stream, plan, schedule=drop, room=room))
    first = time.perf_counter() - began
    kept = models.num_bytes(cache) / 2**30
    del cache
    took = measure.seconds(lambda: generate.begin(llm, stream, plan, schedule=drop, room=room)[0], 3, 0)
    assert np.isfinite(np.asarray(logits)).all()
    kernels = []
    if frames <= 2048:
        kernels = measure.profile(lambda: generate.begin(llm, stream, plan, schedule=drop, room=room)[0])
    length = stream.x.shape[1]
    products, attention = models.language_flops(config, models.groups(config, drop, plan, length))
    roof = measure.roof_seconds(products, attention)
    peak = measure.datasheet_peak()
    flops = products + attention
    return {
        "value": took, "roof": roof, "compile_s": max(0.0, first - took), "peak_gib": measure.peak_gib(),
        "tokens": length, "tflops": flops / took / 1e12, "mfu": flops / took / peak if peak else None,
        "kernels": kernels, "weights_gib": models.num_bytes(llm) / 2**30, "cache_gib": kept,
        "note": f"{length:,} tokens, {flops / took / 1e12:.0f} TFLOP/s, cache {kept:.1f} GiB",
    }  # fmt: skip


def decode(*, model: str, frames: int, small: bool, packing: str = "", kernels: bool = True) -> dict[str, Any]:
    """Tokens a second at batch 1, and whether another prompt length compiles again. `packing` as `quantize.KINDS`."""
    if not kernels:
        decode_kernels.PLATFORM = "none"
    why = ""
    whole = models.config_of(model, small)
    config = whole.llm
    visual = (16 if small else frames) * whole.compressor.tokens_per_frame
    llm = models.build(config, jnp.bfloat16, packing=packing)
    compiled: Any = generate._decode
    settings = generate.GenerationConfig(max_new_tokens=8 if small else 256, eos=(-1,))
    drop = models.schedule("none", config.num_layers)
    length = visual + models.TEXT

    def begun(text: int) -> tuple[Any, Any]:
        stream, plan = models.row(config, visual, drop, text=text, length=length)
        return jax.block_until_ready(
            generate.begin(llm, stream, plan, schedule=drop, room=settings.max_new_tokens)
        )  # fmt: skip

    def answer(text: int) -> tuple[float, Any, float]:
        logits, cache = begun(text)
        size = models.num_bytes(cache)
        began = time.perf_counter()
        made = generate.finish(llm, logits, cache, settings)
        return time.perf_counter() - began, made, size

    try:
        first, made, size = answer(models.TEXT)
    except Exception as error:  # packed kernels do not compile here: measure without them, and say so
        why = f"; NOT packed: {str(error)[:120]}"
        jax.clear_caches()
        llm = models.build(config, jnp.bfloat16)
        first, made, size = answer(models.TEXT)
    programs = compiled._cache_size()
    took, made, size = min((answer(models.TEXT) for _ in range(2)), key=lambda a: a[0])
    other, _, _ = answer(models.TEXT - 16)
    again = compiled._cache_size() - programs
    count = int(made.lengths[0])
    logits, cache = begun(models.TEXT)
    found = measure.profile(lambda: (generate.finish(llm, logits, cache, settings), None)[1])
    began = time.perf_counter()
    begun(models.TEXT)
    prefill_s = time.perf_counter() - began
    read = models.num_bytes(llm) - (0 if config.tied else config.vocab_size * config.embed_dim * 2)
    moved = read + size * (length / (length + settings.max_new_tokens))
    roof = 1 / measure.roof_seconds(moved=moved)
    value = count / took
    sheet = measure.datasheet_bandwidth()
    return {
        "value": value, "roof": roof, "compile_s": max(0.0, first - took), "peak_gib": measure.peak_gib(),
        "kernels": found, "compiled_again": again, "other_length": count / other, "ms_per_token": took / count * 1e3,
        "bytes_per_token": moved, "of_datasheet_bandwidth": moved * value / sheet if sheet else None,
        "prefill_s": prefill_s, "weights_gib": models.num_bytes(llm) / 2**30,
        "note": f"{packing or 'stacks'}: {took / count * 1e3:.2f} ms a token, {moved * value / 1e12:.2f} TB/s, {again} "
        f"programs more for another length ({count / other:.0f} tokens/s), prefill {prefill_s:.2f} s{why}",
    }  # fmt: skip


def second(*, model: str, frames: int, small: bool) -> dict[str, Any]:
    """Seconds of a question behind a remembered film, beside what the first one takes: the film, then a question."""
    whole = models.config_of(model, small)
    config = whole.llm
    visual = (64 if small else frames) * whole.compressor.tokens_per_frame
    layers = (4, 18) if config.num_layers >= 28 else (1, 2)
    drop = DropSchedule("uniform0_attention", layers, (1.0, 0.75, 0.25))
    llm = models.build(config, jnp.bfloat16)
    room = models.TEXT + (16 if small else ROOM)
    _, plan = models.row(config, visual, drop, text=models.TEXT + models.TEXT // 4)
    film, film_plan = models.row(config, visual, drop, text=models.TEXT // 4)  # no text behind its tokens
    question, _ = models.row(config, 0, models.schedule("none", config.num_layers), text=models.TEXT)
    began = time.perf_counter()
    memory = jax.block_until_ready(generate.remember(llm, film, film_plan, schedule=drop, room=room))
    compile_s = time.perf_counter() - began
    began = time.perf_counter()
    memory = jax.block_until_ready(generate.remember(llm, film, film_plan, schedule=drop, room=room))
    watched = time.perf_counter() - began
    ask = lambda: generate.resume(llm, memory, question, plan, schedule=drop)
    began = time.perf_counter()
    logits, _ = jax.block_until_ready(ask())
    first = time.perf_counter() - began
    took = measure.seconds(ask, 3, 0)
    assert np.isfinite(np.asarray(logits)).all()
    lengths = models.groups(config, drop, plan, visual + models.TEXT)
    products, attention = models.language_flops(config, [lengths[-1], (layers[-1], models.TEXT)])
    share = took / (watched + took)
    return {
        "value": took, "roof": measure.roof_seconds(products, attention), "peak_gib": measure.peak_gib(),
        "compile_s": compile_s - watched + first - took, "first_question_s": watched + took, "share": share,
        "memory_gib": models.num_bytes(memory) / 2**30,
        "note": f"{share:.1%} of the first question's {watched + took:.2f} s; {visual:,} visual tokens, evenly to 3/4 "
        f"at {layers[0]}, by attention to 1/4 at {layers[1]}; {models.num_bytes(memory) / 2**30:.1f} GiB remembered",
    }  # fmt: skip
