"""Next-token loss from hidden states, a slice of the row at a time, so that whole logits never exist.

One 32,768-token row of float32 logits over a vocabulary of 152,064 is 19.9 GB. Here a slice of every row is
multiplied by the unembedding, reduced to a few numbers, and forgotten; the backward pass does it again.

In: hidden states, the unembedding, targets and weights. Out: a `Loss` of three sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hico_jax.parallel import sharding
from hico_jax.shapes import Array, Float, Int

AVERAGES = ("tokens", "micro_batch", "example")


class Loss(NamedTuple):
    """Sums over tokens; the caller divides."""

    total: Float[Array, ""]  # of weight times negative log-likelihood
    weight: Float[Array, ""]  # of the weights
    correct: Float[Array, ""]  # supervised tokens whose target scores highest
    supervised: Float[Array, ""]  # tokens with a weight above zero


def next_token(
    hidden: Float[Array, "B L D"],
    unembed: Float[Array, "D V"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    chunk: int = 512,
) -> Loss:
    """Cross-entropy of `targets` (already shifted), `chunk` tokens of every row at a time.

    Products are accumulated and reduced in float32, as the reference casts its logits. A slice takes every
    n-th token rather than neighbours. Of a row that is split over devices, each takes slices of its own part against
    the whole unembedding, and sums meet once at the end.
    """
    if sharding.ring() > 1:
        row = ("batch", "length")
        over = sharding.split_over(targets.shape[0], "batch") + sharding.split_over(targets.shape[1], "length")

        def part(*args: jax.Array) -> Loss:
            return Loss(*jax.lax.psum(tuple(_next_token(*args, chunk=chunk)), over))

        return sharding.local(part, hidden, unembed, targets, weights, axes=(row, (), row, row), out=())
    return _next_token(hidden, unembed, targets, weights, chunk=chunk)


def _next_token(hidden: Array, unembed: Array, targets: Array, weights: Array, *, chunk: int) -> Loss:
    rows, length = targets.shape
    num_chunks = max(1, math.ceil(length / chunk))
    pad = -length % num_chunks
    if pad:
        hidden, targets, weights = (
            jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, weights)
        )

    def slices(x: jax.Array) -> jax.Array:  # [B L ...] -> [num_chunks B L/num_chunks ...]
        return jnp.moveaxis(x.reshape(rows, -1, num_chunks, *x.shape[2:]), 2, 0)

    def step(sums: Loss, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Loss, None]:
        new = _chunk_loss(part[0], unembed, part[1], part[2])
        return Loss(*(a + b for a, b in zip(sums, new, strict=True))), None

    start = Loss(*(jnp.zeros((), jnp.float32) for _ in Loss._fields))
    sums, _ = jax.lax.scan(jax.checkpoint(step), start, (slices(hidden), slices(targets), slices(weights)))
    return sums


def _chunk_loss(
    hidden: Float[Array, "B C D"],
    unembed: Float[Array, "D V"],
    targets: Int[Array, "B C"],
    weights: Float[Array, "B C"],
) -> Loss:
    logits = jnp.einsum("bld,dv->blv", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # A comparison and a sum, not a gather: the vocabulary may be split over devices.
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0.0).sum(-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - target_logit
    supervised = weights > 0
    hit = supervised & (target_logit >= logits.max(-1))
    return Loss(
        total=jnp.where(supervised, nll * weights, 0.0).sum(),
        weight=weights.sum(),
        correct=hit.sum(dtype=jnp.float32),
        supervised=supervised.sum(dtype=jnp.float32),
    )


def balance(weights: Float[Array, "B L"], segments: Int[Array, "B L"], average: str) -> Float[Array, "B L"]:
    """Scale the weights so that dividing the step's total by its weight gives the average that is asked for.

    `tokens`: every supervised token of the step counts the same. `micro_batch`: every micro-batch does, as
    in the reference's gradient accumulation. `example`: every example (segment) does, which is the
    reference's micro-batch of one in stages 2 to 4. What has no supervised token has no say; in the
    reference it makes the loss NaN.
    """
    assert average in AVERAGES, average
    if average == "tokens":
        return weights
    if average == "micro_batch":
        return _divide(weights, weights.sum())
    length = weights.shape[1]

    def of_row(w: jax.Array, s: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(w, s, num_segments=length + 1)[s]

    return _divide(weights, jax.vmap(of_row)(weights, segments))


def _divide(weights: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
