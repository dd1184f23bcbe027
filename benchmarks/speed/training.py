"""A full training step of the language model: float32 weights, gradients, clipping, AdamW; bf16 activations.

The composition is that of `hico_jax/step.py` (loss in slices, `optim.optimizer`, `optim.clip`), on given embeddings
so that nothing of the host's side is needed; `tests/benchmarks/test_speed.py` holds the two against each other.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.speed import measure, models
from hico_jax import losses, optim

POLICIES = ("all", "products", "attention", "nothing")  # what is kept of a layer for the backward pass


def make(config: Any, settings: optim.OptimConfig, chunk: int) -> tuple[Any, Any, Any]:
    """Structure, the optimizer, and `(weights, moments, stream) -> (weights, moments, loss)`."""
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(model)
    tx = optim.optimizer(settings, 1000, state)

    def loss_of(weights: Any, stream: Any) -> tuple[Any, Any]:
        llm = nnx.merge(graph, weights)
        out, _ = llm(stream, None)
        loss = losses.next_token(out.x, llm.unembed_weight(), out.targets, out.weights, chunk=chunk)
        return loss.total, loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(weights: Any, moments: Any, stream: Any) -> Any:
        grads, loss = jax.grad(loss_of, has_aux=True)(weights, stream)
        weight = jnp.maximum(loss.weight, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = jnp.asarray(optax.tree.norm(grads))
        updates, moments = tx.update(optim.clip(grads, norm, settings.clip_norm), moments, weights)
        return _applied(weights, updates, moments), moments, loss.total / weight

    return state, tx, update


def _applied(weights: Any, updates: Any, moments: Any) -> Any:
    """Weights after the update. bfloat16 ones are rounded at random, or most of a small update would be lost."""
    if jax.tree.leaves(weights)[0].dtype == jnp.float32:
        return optax.apply_updates(weights, updates)
    wide = jax.tree.map(lambda w, u: w.astype(jnp.float32) + u.astype(jnp.float32), weights, updates)
    return optim._round_at_random(wide, optax.tree.get(moments[0], "count"), 2)


def step(
    *, model: str, tokens: int, keeps: str, small: bool, moments: str = "bfloat16", weights: str = "float32"
) -> dict[str, Any]:
    """Tokens a second of one step on one row."""
    config = models.config_of(model, small).llm
    tokens = 256 if small else tokens
    config = dataclasses.replace(config, remat=keeps != "all", remat_keeps="attention" if keeps == "all" else keeps)
    settings = optim.OptimConfig(moments=moments, warmup_steps=0, schedule="constant")
    state, tx, update = make(config, settings, 2048)
    held_in, values = weights, models.weights(state, jnp.dtype(weights))
    held = jax.jit(tx.init)(values)
    stream, _ = models.row(config, tokens - models.TEXT, models.schedule("none", config.num_layers))
    ids = jax.random.randint(jax.random.key(3), (1, tokens), 0, config.vocab_size, jnp.int32)
    stream = stream.replace(targets=ids, weights=jnp.ones((1, tokens), jnp.float32), slots=jnp.full_like(ids, -1))
    program = measure.compiled(update, values, held, stream)
    measure.say(f"compiled in {program.compile_s:.1f} s, planned {program.peak_gib or 0:.1f} GiB")
    times, loss = [], 0.0
    for _ in range(2 if tokens > 100_000 or small else 6):
        began = time.perf_counter()
        values, held, value = program.run(values, held, stream)
        loss = float(value)
        times.append(time.perf_counter() - began)
        measure.say(f"step took {times[-1]:.3f} s, loss {loss:.3f}")
    assert np.isfinite(loss)
    kernels = measure.profile(lambda: program.run(values, held, stream)[2]) if tokens < 20_000 else []
    took = float(np.median(times[1:]))
    products, attention = models.language_flops(config, [(config.num_layers, tokens)])
    products += 2.0 * config.vocab_size * config.embed_dim * tokens
    roof = tokens / measure.roof_seconds(3 * products, 3 * attention)
    flops, peak = 3 * (products + attention), measure.datasheet_peak()
    mfu = flops / took / peak if peak else None
    return {
        "value": tokens / took, "roof": roof, "compile_s": program.compile_s, "peak_gib": measure.peak_gib(),
        "planned_gib": program.peak_gib, "seconds": took, "tflops": flops / took / 1e12, "mfu": mfu,
        "kernels": kernels, "keeps": keeps, "moments": moments,
        "note": f"MFU {mfu:.1%}, keeps {keeps}, {held_in} weights, {moments} moments" if mfu else f"keeps {keeps}",
    }  # fmt: skip
