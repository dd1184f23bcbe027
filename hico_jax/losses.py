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
_LOW = -1e30  # below every logit, yet finite


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
    n-th token rather than neighbours. On several devices a slice is of the vocabulary instead (`_in_columns`), with as
    many logits.
    """
    return _next_token(hidden, unembed, targets, weights, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _next_token(hidden: Array, unembed: Array, targets: Array, weights: Array, chunk: int) -> Loss:
    return _sums(hidden, unembed, targets, weights, chunk, (False, False))[0]


def _next_token_fwd(hidden: Any, unembed: Any, targets: Any, weights: Any, chunk: int) -> tuple[Loss, tuple]:
    """With the gradients of the total: they are taken while a slice's logits are there, which are never made again."""
    given = (hidden.value, unembed.value, targets.value, weights.value)
    loss, grads = _sums(*given, chunk, (hidden.perturbed, unembed.perturbed))
    return loss, grads


def _next_token_bwd(chunk: int, grads: tuple, d_loss: Loss) -> tuple[Array | None, ...]:
    del chunk
    if not isinstance(d_loss.total, jax.Array):  # nobody asks for the total
        return None, None, None, None
    d_hidden, d_unembed = (None if g is None else g * d_loss.total.astype(g.dtype) for g in grads)
    return d_hidden, d_unembed, None, None


_next_token.defvjp(_next_token_fwd, _next_token_bwd, symbolic_zeros=True)


def _sums(
    hidden: Array, unembed: Array, targets: Array, weights: Array, chunk: int, wanted: tuple[bool, bool]
) -> tuple[Loss, tuple[Array | None, Array | None]]:
    way = _in_columns if sharding.count() > 1 else _in_slices
    return way(hidden, unembed, targets, weights, chunk, wanted)


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


MOST_COLUMNS = 16_384  # of the unembedding, whole on a device at a time


def columns_at_once(count: int, share: float) -> int:
    """About `share` of so many columns: blocks of equal size, of whole tiles.

    Example:
      >>> columns_at_once(152_064, 512 / 16_384), columns_at_once(64, 1.0)
      (4864, 64)
    """
    blocks = -(-count // max(1, min(MOST_COLUMNS, int(count * share))))
    return min(count, -(-count // blocks // 128) * 128)


def _in_columns(
    hidden: Array, unembed: Array, targets: Array, weights: Array, chunk: int, wanted: tuple[bool, bool]
) -> tuple[Loss, tuple[Array | None, Array | None]]:
    """`_in_slices` on several devices: each takes its own tokens against some columns of the vocabulary at a time.

    The unembedding lies in parts on all devices, and so does its gradient: columns are gathered, their gradient is
    scattered, and neither is ever whole (2 GiB each in float32 for 152,064 x 3,584). The price is that logits are made
    twice, once for their sum and once for their gradient.
    """
    tokens_over = sharding.split_over(targets.shape[0], "batch") + sharding.split_over(targets.shape[1], "length")
    embed_over = sharding.split_over(unembed.shape[0], "embed")
    vocab_over = sharding.split_over(unembed.shape[1], "vocab")
    sizes = sharding.sizes()
    # Devices that share the columns but not the tokens would all count the same ones.
    copies = math.prod(sizes[a] for a in embed_over if a not in tokens_over)
    rest = tuple(a for a in tokens_over if a not in embed_over)

    def mine(hidden: Array, unembed: Array, targets: Array, weights: Array) -> tuple[Any, ...]:
        count = unembed.shape[1]
        block = columns_at_once(count, chunk / targets.shape[1])
        blocks = -(-count // block)
        columns = jnp.pad(unembed.astype(hidden.dtype), ((0, 0), (0, blocks * block - count)))
        first = jax.lax.axis_index(vocab_over) * count if vocab_over else 0

        def logits_of(i: Array) -> tuple[Array, Array, Array]:
            part = jax.lax.dynamic_slice_in_dim(columns, i * block, block, 1)
            if embed_over:
                part = jax.lax.all_gather(part, embed_over, axis=0, tiled=True)
            logits = jnp.einsum("bld,dv->blv", hidden, part, preferred_element_type=jnp.float32)
            number = i * block + jnp.arange(block, dtype=jnp.int32)
            real = number < count
            return part, jnp.where(real, logits, _LOW), real & (first + number == targets[..., None])

        def look(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
            top, total, target_logit = carry
            _, logits, is_target = logits_of(i)
            new_top = jnp.maximum(top, logits.max(-1))
            total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
            return (new_top, total, target_logit + jnp.where(is_target, logits, 0.0).sum(-1)), None

        zero = jnp.zeros(targets.shape, jnp.float32)
        numbers = jnp.arange(blocks, dtype=jnp.int32)
        (top, total, target_logit), _ = jax.lax.scan(look, (zero + _LOW, zero, zero), numbers)
        if vocab_over:
            highest = jax.lax.pmax(top, vocab_over)
            total, target_logit = jax.lax.psum((total * jnp.exp(top - highest), target_logit), vocab_over)
            top = highest
        log_total = top + jnp.log(total)
        loss = _loss_of(target_logit, top, log_total, weights)
        loss = Loss(*jax.lax.psum(tuple(loss), tokens_over)) if tokens_over else loss
        if not any(wanted):
            return (loss,)
        share = jnp.where(weights > 0, weights, 0.0)[..., None]

        def pull(carry: tuple[Array | None, Array | None], i: Array) -> tuple[tuple[Array | None, Array | None], None]:
            d_hidden, d_columns = carry
            part, logits, is_target = logits_of(i)
            d_logits = (jnp.exp(logits - log_total[..., None]) - is_target.astype(jnp.float32)) * share
            d_logits = d_logits.astype(hidden.dtype)
            if d_hidden is not None:
                d_hidden += jnp.einsum("blv,dv->bld", d_logits, part, preferred_element_type=jnp.float32)
            if d_columns is not None:
                more = jnp.einsum("bld,blv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
                if embed_over:
                    more = jax.lax.psum_scatter(more, embed_over, scatter_dimension=0, tiled=True) / copies
                d_columns = jax.lax.dynamic_update_slice_in_dim(d_columns, more, i * block, 1)
            return (d_hidden, d_columns), None

        start = (
            jnp.zeros(hidden.shape, jnp.float32) if wanted[0] else None,
            jnp.zeros(columns.shape, jnp.float32) if wanted[1] else None,
        )
        (d_hidden, d_columns), _ = jax.lax.scan(pull, start, numbers)
        out: tuple[Any, ...] = (loss,)
        if d_hidden is not None:
            d_hidden = jax.lax.psum(d_hidden, vocab_over) if vocab_over else d_hidden
            out += (d_hidden.astype(hidden.dtype),)
        if d_columns is not None:
            d_columns = d_columns[:, :count]
            out += ((jax.lax.psum(d_columns, rest) if rest else d_columns).astype(unembed.dtype),)
        return out

    row, table = ("batch", "length"), ("embed", "vocab")
    outs = ((), *(axes for axes, want in zip((row, table), wanted, strict=True) if want))
    loss, *grads = sharding.local(mine, hidden, unembed, targets, weights, axes=(row, table, row, row), outs=outs)
    return loss, (grads.pop(0) if wanted[0] else None, grads.pop(0) if wanted[1] else None)


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
    share = jnp.where(weights > 0, weights, 0.0)[..., None]
    d_logits = (jnp.exp(logits - log_total[..., None]) - is_target.astype(jnp.float32)) * share
    return _loss_of(target_logit, top, log_total, weights), d_logits.astype(hidden.dtype)


def _loss_of(target_logit: Array, top: Array, log_total: Array, weights: Array) -> Loss:
    """The sums, of each token's target logit, highest logit and log-sum-exp."""
    supervised = weights > 0
    hit = supervised & (target_logit >= top)
    return Loss(
        total=jnp.where(supervised, (log_total - target_logit) * weights, 0.0).sum(),
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
