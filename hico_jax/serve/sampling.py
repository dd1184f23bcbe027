"""The next token of rows that want it chosen differently: one program for greedy and sampled rows together.

In: logits of some lanes and each request's settings. Out: a token a lane, and how likely it was. A row's choice is the
one that `generate.choose` would make with the same settings, whoever else is in the batch.
Next: hico_jax/serve/pool.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hico_jax.generate import GenerationConfig
from hico_jax.shapes import Array, Bool, Float, Int

TOP = 20  # most alternatives whose log-probabilities can be asked for


class Knobs(NamedTuple):
    """`GenerationConfig` of each row, as arrays, and how many tokens the row has said."""

    sample: Any  # Bool[R]
    temperature: Any  # Float[R]
    top_k: Any  # Int[R]
    top_p: Any  # Float[R]
    penalty: Any  # Float[R]
    seed: Any  # Int[R]
    step: Any  # Int[R]


class Said(NamedTuple):
    """The tokens chosen, their log-probabilities before any setting, and the likeliest (none unless asked for)."""

    ids: Int[Array, " R"]
    log_probs: Float[Array, " R"]
    top_ids: Int[Array, "R n"]
    top_log_probs: Float[Array, "R n"]


def knobs(configs: Sequence[GenerationConfig], steps: Sequence[int]) -> Knobs:
    """Settings of several rows, on the host."""
    return Knobs(
        sample=np.array([c.do_sample for c in configs]),
        temperature=np.array([c.temperature if c.do_sample else 1.0 for c in configs], np.float32),
        top_k=np.array([c.top_k for c in configs], np.int32),
        top_p=np.array([c.top_p for c in configs], np.float32),
        penalty=np.array([c.repetition_penalty for c in configs], np.float32),
        seed=np.array([c.seed % 2**31 for c in configs], np.int32),
        step=np.array(steps, np.int32),
    )


def choose(logits: Float[Array, "R V"], seen: Bool[Array, "R V"], k: Knobs, *, sampled: bool, top: bool) -> Said:
    """Penalty, temperature, top-k, top-p, a draw; the likeliest token of rows that do not sample.

    `sampled` and `top` say whether any row samples, or wants alternatives: without them the program is smaller.
    """
    raw = jax.nn.log_softmax(logits, axis=-1)
    penalty = k.penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampled:
        ids = jnp.where(k.sample, _draw(logits, k), ids)
    found = jnp.take_along_axis(raw, ids[:, None], axis=-1)[:, 0]
    count = min(TOP, raw.shape[-1]) if top else 0
    top_values, top_ids = jax.lax.top_k(raw, count)
    return Said(ids, found, top_ids.astype(jnp.int32), top_values)


def _draw(logits: Float[Array, "R V"], k: Knobs) -> Int[Array, " R"]:
    size = logits.shape[-1]
    sorted_logits, order = jax.lax.top_k(logits / k.temperature[:, None], size)
    most = jnp.where(k.top_k > 0, k.top_k, size)[:, None]
    sorted_logits = jnp.where(jnp.arange(size, dtype=jnp.int32) < most, sorted_logits, -jnp.inf)
    weights = jax.nn.softmax(sorted_logits, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights
    inside = (before < k.top_p[:, None]) | (k.top_p[:, None] >= 1)
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(k.seed, k.step)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(inside, sorted_logits, -jnp.inf))
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
