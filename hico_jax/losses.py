"""Next-token loss from hidden states, a slice of the row at a time, so that whole logits never exist.

One 32,768-token row of float32 logits over a vocabulary of 152,064 is 19.9 GB. Here a slice of every row is
multiplied by the unembedding, reduced to a few numbers and, in training, to its gradients, and forgotten.

In: hidden states, the unembedding, targets and weights. Out: a `Loss` of three sums.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

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
            return Loss(*jax.lax.psum(tuple(_next_token(*args, chunk)), over))

        return sharding.local(part, hidden, unembed, targets, weights, axes=(row, (), row, row), out=())
    return _next_token(hidden, unembed, targets, weights, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _next_token(hidden: Array, unembed: Array, targets: Array, weights: Array, chunk: int) -> Loss:
    return _in_slices(hidden, unembed, targets, weights, chunk, (False, False))[0]


def _next_token_fwd(hidden: Any, unembed: Any, targets: Any, weights: Any, chunk: int) -> tuple[Loss, tuple]:
    """With the gradients of the total: they are taken while a slice's logits are there, which are never made again."""
    given = (hidden.value, unembed.value, targets.value, weights.value)
    loss, grads = _in_slices(*given, chunk, (hidden.perturbed, unembed.perturbed))
    return loss, grads


def _next_token_bwd(chunk: int, grads: tuple, d_loss: Loss) -> tuple[Array | None, ...]:
    del chunk
    if not isinstance(d_loss.total, jax.Array):  # nobody asks for the total
        return None, None, None, None
    d_hidden, d_unembed = (None if g is None else g * d_loss.total.astype(g.dtype) for g in grads)
    return d_hidden, d_unembed, None, None


_next_token.defvjp(_next_token_fwd, _next_token_bwd, symbolic_zeros=True)


def _in_slices(
    hidden: Array, unembed: Array, targets: Array, weights: Array, chunk: int, wanted: tuple[bool, bool]
) -> tuple[Loss, tuple[Array | None, Array | None]]:
    """The loss, and the gradients of its total with respect to hidden states and unembedding where they are wanted."""
    rows, length = targets.shape
    num_chunks = max(1, math.ceil(length / chunk))
    pad = -length % num_chunks
    padded = (hidden, targets, weights)
    if pad:
        padded = tuple(jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in padded)

    def slices(x: jax.Array) -> jax.Array:  # [B L ...] -> [num_chunks B L/num_chunks ...]
        return jnp.moveaxis(x.reshape(rows, -1, num_chunks, *x.shape[2:]), 2, 0)

    def step(carry: tuple[Loss, Array | None], part: tuple[Array, ...]) -> tuple[tuple[Loss, Any], Array | None]:
        sums, d_unembed = carry
        new, d_logits = _chunk_loss(part[0], unembed, *part[1:])
        d_hidden = None
        if wanted[0]:
            d_hidden = jnp.einsum("blv,dv->bld", d_logits, unembed.astype(d_logits.dtype))
        if d_unembed is not None:
            d_unembed = d_unembed + jnp.einsum("bld,blv->dv", part[0], d_logits, preferred_element_type=jnp.float32)
        return (Loss(*(a + b for a, b in zip(sums, new, strict=True))), d_unembed), d_hidden

    start = Loss(*(jnp.zeros((), jnp.float32) for _ in Loss._fields))
    sums = jnp.zeros(unembed.shape, jnp.float32) if wanted[1] else None
    (loss, d_unembed), d_hidden = jax.lax.scan(step, (start, sums), tuple(slices(x) for x in padded))
    if d_hidden is not None:
        d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(rows, length + pad, -1)[:, :length]
    return loss, (d_hidden, None if d_unembed is None else d_unembed.astype(unembed.dtype))


def _chunk_loss(
    hidden: Float[Array, "B C D"],
    unembed: Float[Array, "D V"],
    targets: Int[Array, "B C"],
    weights: Float[Array, "B C"],
) -> tuple[Loss, Float[Array, "B C V"]]:
    """The loss and, in the type of the hidden states as in the reference, its gradient with respect to the logits."""
    logits = jnp.einsum("bld,dv->blv", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # A comparison and a sum, not a gather: the vocabulary may be split over devices.
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    target_logit = jnp.where(is_target, logits, 0.0).sum(-1)
    top = logits.max(-1)
    log_total = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    supervised = weights > 0
    hit = supervised & (target_logit >= top)
    loss = Loss(
        total=jnp.where(supervised, (log_total - target_logit) * weights, 0.0).sum(),
        weight=weights.sum(),
        correct=hit.sum(dtype=jnp.float32),
        supervised=supervised.sum(dtype=jnp.float32),
    )
    share = jnp.where(supervised, weights, 0.0)[..., None]
    d_logits = (jnp.exp(logits - log_total[..., None]) - is_target.astype(jnp.float32)) * share
    return loss, d_logits.astype(hidden.dtype)


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
