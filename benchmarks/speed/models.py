"""Models with random weights where they run, rows of random embeddings, and FLOPs by formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipeline.drop import plan_drop
from hico_jax import quantize, registry
from hico_jax.batch import Batch, DropPlan, DropSchedule
from hico_jax.models.llm.decoder import Stream

TEXT = 64  # tokens of text in a row, the question among them


def config_of(name: str, small: bool) -> Any:
    """A named model's configuration; `nano` in bf16 when small."""
    return dataclasses.replace(registry.model_config("nano" if small else name), dtype="bfloat16")


def build(config: Any, dtype: Any, parts: tuple[str, ...] = (), packing: str = "") -> Any:
    """A module with random weights, without ever holding them in another precision. `parts` keeps only some of it.

    With `packing`, a language model's matrices are held for decoding (`quantize.KINDS`).
    """
    model = _part(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(params=0))), parts)
    if packing:
        model = quantize.quantized(model, packing, quantize.shape_of)
    graph, state = nnx.split(model)
    return nnx.merge(graph, weights(state, dtype))


def _part(model: Any, parts: tuple[str, ...]) -> Any:
    for name in ("vision", "compressor", "projector", "llm"):
        if parts and hasattr(model, name) and name not in parts:
            setattr(model, name, None)
    return model


def weights(state: Any, dtype: Any) -> Any:
    """Random numbers in the shapes of a state, scales of norms 1. Words of 8-bit numbers are random too."""

    @jax.jit
    def make() -> Any:
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(state))))

        def one(path: Any, a: Any) -> Any:
            key = next(keys)
            if a.dtype == jnp.int32:
                return jax.lax.bitcast_convert_type(jax.random.bits(key, a.shape, jnp.uint32), jnp.int32)
            if getattr(path[-1], "name", "") == "scale":  # of 8-bit numbers, spread over all of their range
                return jnp.full(a.shape, 0.02 / 74, jnp.float32)
            if any(getattr(p, "key", None) == "scale" for p in path):
                return jnp.ones(a.shape, dtype)
            return jax.random.normal(key, a.shape, dtype) * jnp.asarray(0.02, dtype)

        return jax.tree_util.tree_map_with_path(one, state)

    return make()


def schedule(kind: str, num_layers: int) -> DropSchedule:
    """The paper's evaluation drop [8, 16, 24] to 1/2, 1/4, 1/8; on a small model, the same share of its layers."""
    if kind == "none":
        return DropSchedule()
    layers = (8, 16, 24) if num_layers >= 28 else (1, 2, 3)
    return DropSchedule(kind, layers, (1.0, 0.5, 0.25, 0.125))


def row(
    config: Any, visual: int, drop: DropSchedule, *, text: int = TEXT, length: int = 0
) -> tuple[Stream, DropPlan | None]:
    """A prompt: some text, a film's tokens, the question, and padding up to `length`. Embeddings are random."""
    count = visual + text
    length = length or count
    slots = np.full((1, length), -1, np.int32)
    slots[0, text // 4 : text // 4 + visual] = np.arange(visual)
    real = np.arange(length) < count
    positions = np.where(real, np.arange(length), 0).astype(np.int32)[None]
    segments = real.astype(np.int32)[None]
    plan = None
    if drop.num_stages:
        nothing = np.zeros((1, length), np.int32)
        batch = Batch(
            tokens=nothing, slots=slots, positions=positions, segments=segments, targets=nothing,
            weights=nothing.astype(np.float32), clips=None, images=None,
        )  # fmt: skip
        plan = plan_drop(batch, drop, training=False, multiple=64)
    x = jax.jit(lambda: jax.random.normal(jax.random.key(1), (1, length, config.embed_dim), jnp.bfloat16))()
    stream = Stream(
        x=x, positions=positions, segments=segments, slots=slots,
        survives=None if plan is None else plan.survives, labelled=None if plan is None else plan.labelled, plain=True,
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, stream), jax.tree.map(jnp.asarray, plan)


def layer_weights(config: Any) -> int:
    """Numbers in the matrices of one decoder layer."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.embed_dim * (config.head_dim * heads + 3 * config.mlp_dim)


def language_flops(config: Any, lengths: list[tuple[int, int]]) -> tuple[float, float]:
    """Forward FLOPs of products and of causal attention (at half) for `(layers, tokens)` of each group."""
    products = sum(2.0 * layer_weights(config) * n * tokens for n, tokens in lengths)
    attention = sum(2.0 * n * float(tokens) ** 2 * config.num_heads * config.head_dim for n, tokens in lengths)
    return products, attention


def groups(config: Any, drop: DropSchedule, plan: DropPlan | None, length: int) -> list[tuple[int, int]]:
    """Layers and tokens of each group."""
    bounds = [0, *(drop.layers if drop.num_stages else ()), config.num_layers]
    lengths = [length, *(plan.lengths if plan is not None else ())]
    return [(b - a, n) for a, b, n in zip(bounds, bounds[1:], lengths, strict=False)]


def tower_flops(config: Any, clips: int, num_tokens: int) -> tuple[float, float]:
    """Products and attention of a tower and its projector over clips; merging is left out."""
    tower = config.vision
    patches = tower.frames_per_clip * (tower.image_px // tower.patch_px) ** 2
    width, depth = tower.embed_dim, tower.num_blocks
    block = 2.0 * patches * width * (4 * width + 2 * tower.mlp_dim)
    embed = 2.0 * patches * tower.patch_px**2 * 3 * width
    llm = config.llm.embed_dim
    projector = 2.0 * num_tokens * (width * llm + llm * llm)
    return clips * (depth * block + embed + projector), clips * depth * 4.0 * patches**2 * width


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(a.nbytes for a in jax.tree.leaves(tree))
