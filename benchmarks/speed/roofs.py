"""What the card can do: a large bf16 product, causal attention of Qwen2-7B's heads, and a copy in its memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed import measure
from hico_jax.models import attention

HEADS, KV_HEADS, WIDTH = 28, 4, 128


def roofs(small: bool) -> dict[str, Any]:
    """TFLOP/s and TB/s; `roofs` in the result is what later rows are held against."""
    side = 256 if small else 8192
    key = jax.random.key(0)
    a, b = (jax.random.normal(k, (side, side), jnp.bfloat16) for k in jax.random.split(key))
    product = jax.jit(lambda a, b: a @ b)
    found = {"product": 2.0 * side**3 / measure.seconds(lambda: product(a, b), 20, 3)}
    measure.say(f"product {side}^3: {found['product'] / 1e12:.1f} TFLOP/s")
    lengths = (256,) if small else (32_768, 131_072)
    causal = jax.jit(lambda q, k, v: attention.attend(q, k, v))
    extra = {}
    for length in lengths:
        q, k, v = (
            jax.random.normal(key, (1, length, heads, WIDTH), jnp.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        took = measure.seconds(lambda q=q, k=k, v=v: causal(q, k, v), 5)
        flops = 2.0 * length**2 * HEADS * WIDTH / took
        extra[f"attention_{length}"] = flops / 1e12
        measure.say(f"attention {length}: {flops / 1e12:.1f} TFLOP/s")
        found["attention"] = max(found.get("attention", 0.0), flops)
    x = jnp.ones((1 << (20 if small else 31),), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    found["copy"] = 2.0 * x.nbytes / measure.seconds(lambda: copy(x), 10, 2)
    read = jax.jit(lambda x: jnp.max(x))
    extra["read_tb_s"] = x.nbytes / measure.seconds(lambda: read(x), 10, 2) / 1e12
    measure.say(f"copy: {found['copy'] / 1e12:.2f} TB/s read and written, read alone {extra['read_tb_s']:.2f}")
    return {
        "roofs": found, "value": found["product"] / 1e12, "unit": "TFLOP/s",
        "note": f"attention {found['attention'] / 1e12:.0f} TFLOP/s, copy {found['copy'] / 1e12:.2f} TB/s",
        **extra, "peak_gib": measure.peak_gib(),
    }  # fmt: skip
