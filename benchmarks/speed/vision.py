"""The tower, merging and the projector on bytes of pixels: frames a second, and what merging adds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.speed import measure, models
from hico_jax.kernels import norm
from hico_jax.models.compress import tome


def vision(*, model: str, clips: int, small: bool) -> dict[str, Any]:
    """The whole of `HiCo.encode`, at the given number of clips and at smaller batches; and merging alone."""
    config = models.config_of(model, small)
    clips = 2 if small else clips
    tower, geometry = config.vision, config.geometry()
    whole = models.build(config, jnp.bfloat16, ("vision", "compressor", "projector"))
    graph, state = nnx.split(whole)
    rng = np.random.default_rng(0)
    px = tower.image_px
    pixels = jnp.asarray(rng.integers(0, 256, (1, clips, tower.frames_per_clip, px, px, 3), np.uint8))
    none = jnp.zeros((1, 0, px, px, 3), jnp.uint8)
    program, why = None, ""
    for norm.ENABLED in (True, False):
        run = jax.jit(lambda state, pixels: nnx.merge(graph, state).encode(pixels, none))
        try:
            program = measure.compiled(run, state, pixels)
            jax.block_until_ready(program.run(state, pixels))
            break
        except Exception as error:  # the norm's kernel does not compile here: measure without it, and say so
            why = f"; without the norm's kernel: {str(error)[:120]}"
    assert program is not None
    took = measure.seconds(lambda: program.run(state, pixels), 10)
    frames = clips * tower.frames_per_clip
    products, attention = models.tower_flops(config, clips, geometry.tokens_per_clip)
    roof = frames / measure.roof_seconds(products, attention)
    found = {"value": frames / took, "roof": roof, "compile_s": program.compile_s, "planned_gib": program.peak_gib}
    found["peak_gib"] = measure.peak_gib()
    measure.say(f"encode {clips} clips: {frames / took:,.0f} frames/s, {took * 1e3:.2f} ms")
    found["kernels"] = measure.profile(lambda: program.run(state, pixels))

    def part(name: str, f: Any, *args: Any) -> None:
        try:
            program = measure.compiled(jax.jit(f), *args)
            took = measure.seconds(lambda: program.run(*args), 10)
        except Exception as error:  # a part that fails must not lose the row
            found[f"{name}_error"] = str(error)[:200]
            return
        found[f"{name}_ms"] = took * 1e3
        measure.say(f"  {name}: {took * 1e3:.3f} ms")

    patches = jax.random.normal(
        jax.random.key(2), (clips, tower.frames_per_clip * tower.patches_per_frame, tower.embed_dim), jnp.bfloat16
    )
    merge = lambda x: tome.merge(x, geometry.tokens_per_clip, tower.merge_heads)
    part("merge", merge, patches)
    found["merge_share"] = found.get("merge_ms", float("nan")) / 1e3 / took
    if norm.ENABLED and not small:
        norm.ENABLED = False
        part("encode_with_plain_norms", lambda s, p: nnx.merge(graph, s).encode(p, none), state, pixels)
        norm.ENABLED = True
    for fewer in () if small else (clips // 4,):
        part(f"encode_{fewer}_clips", lambda s, p: nnx.merge(graph, s).encode(p, none), state, pixels[:, :fewer])
        if f"encode_{fewer}_clips_ms" in found:
            each = found[f"encode_{fewer}_clips_ms"] / 1e3
            found[f"frames_s_at_{fewer}"] = fewer * tower.frames_per_clip / each
    found["note"] = f"merging {found['merge_share']:.1%}; " + ", ".join(
        f"{v:,.0f} frames/s at {k.rsplit('_', 1)[1]} clips" for k, v in found.items() if k.startswith("frames_s_at_")
    )
    if "encode_with_plain_norms_ms" in found:
        found["note"] += f", {frames / found['encode_with_plain_norms_ms'] * 1e3:,.0f} with plain norms"
    found["note"] += why
    return found
