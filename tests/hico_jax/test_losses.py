from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from hico_jax import losses
from hico_jax.parallel import sharding
from hico_jax.parallel.mesh import MeshConfig, make_mesh


def example(rows: int = 2, length: int = 13, dim: int = 8, vocab: int = 11) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (rows, length, dim))
    unembed = jax.random.normal(keys[1], (dim, vocab))
    targets = jax.random.randint(keys[2], (rows, length), 0, vocab)
    weights = jax.random.bernoulli(keys[3], 0.6, (rows, length)).astype(jnp.float32)
    return hidden, unembed, targets, weights


def dense(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ unembed, targets)
    return (nll * weights).sum()


plain = jax.jit(jax.value_and_grad(dense, argnums=(0, 1)))


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
def test_chunks_equal_the_whole_in_value_and_gradient(chunk: int) -> None:
    hidden, unembed, targets, weights = example()

    def ours(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        return losses.next_token(hidden, unembed, targets, weights, chunk=chunk).total

    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, unembed)
    want, want_grads = plain(hidden, unembed, targets, weights)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums of about 13 float32 terms of size 1


def test_counts_only_what_is_supervised() -> None:
    hidden, unembed, _, weights = example()
    best = jnp.argmax(hidden @ unembed, axis=-1)
    loss = losses.next_token(hidden, unembed, best, weights, chunk=4)
    assert loss.supervised == loss.correct == loss.weight == weights.sum()
    worse = losses.next_token(hidden, unembed, (best + 1) % 11, weights, chunk=4)
    assert worse.correct == 0
    assert losses.next_token(hidden, unembed, best, jnp.zeros_like(weights)).total == 0


def test_whole_logits_never_exist() -> None:
    hidden, unembed, targets, weights = example(rows=2, length=64, dim=4, vocab=32)

    def loss(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        return losses.next_token(hidden, unembed, targets, weights, chunk=8).total

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, unembed))
    assert "f32[2,8,32]" in text  # a slice does
    assert "[2,64,32]" not in text
    assert "[8,2,8,32]" not in text  # nor are the slices kept for the backward pass


def test_bfloat16_hidden_states_are_reduced_in_float32() -> None:
    hidden, unembed, targets, weights = example(length=64)
    low = losses.next_token(hidden.astype(jnp.bfloat16), unembed, targets, weights, chunk=16)
    high = losses.next_token(
        hidden.astype(jnp.bfloat16).astype(jnp.float32),
        unembed.astype(jnp.bfloat16).astype(jnp.float32), targets, weights, chunk=16,
    )  # fmt: skip
    assert low.total.dtype == jnp.float32
    np.testing.assert_allclose(low.total, high.total, rtol=1e-5)  # bfloat16 sums would be off by 1e-2


@pytest.mark.parametrize(
    ("mesh", "rows"), [(MeshConfig(1, 2, 2, 2), 2), (MeshConfig(2, 1, 4, 1), 1), (MeshConfig(1, 8, 1, 1), 2)]
)
def test_a_loss_over_devices_is_the_same_and_no_one_holds_the_unembedding(mesh: MeshConfig, rows: int) -> None:
    """Blocks of 128 of 600 columns: the last is partly padding. 8 devices, with tokens whole on some of them."""
    hidden, unembed, targets, weights = example(rows=rows, length=16, dim=8, vocab=600)
    placed = make_mesh(mesh)
    sizes = dict(placed.shape)

    def put(x: jax.Array, *axes: str | None) -> jax.Array:
        return jax.device_put(x, NamedSharding(placed, sharding.spec(x.shape, axes, sizes)))

    def run(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
        loss = losses.next_token(hidden, unembed, targets, weights, chunk=1)
        return loss.total * 3, loss

    graded = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (_, want), want_grads = jax.jit(graded)(hidden, unembed, targets, weights)
    with jax.set_mesh(placed):
        args = (
            put(hidden, "batch", "length", None), put(unembed, "embed", "vocab"), put(targets, "batch", "length"),
            put(weights, "batch", "length"),
        )  # fmt: skip
        compiled = jax.jit(graded).lower(*args).compile()
        (_, found), grads = compiled(*args)
        only = jax.jit(losses.next_token, static_argnames="chunk")(*args, chunk=1)
    for loss in (found, only):
        np.testing.assert_allclose(loss.total, want.total, rtol=1e-6)
        assert (loss.weight, loss.correct, loss.supervised) == (want.weight, want.correct, want.supervised)
    for f, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(f, w, atol=1e-5)
    text = compiled.as_text()
    assert re.search(r"f32\[8,(128|256)\]", text)
    assert "[8,600]" not in text
    assert "[8,640]" not in text


WEIGHTS = jnp.array([[0.0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]])
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 0]])


def test_by_tokens_every_token_counts_the_same() -> None:
    np.testing.assert_array_equal(losses.balance(WEIGHTS, SEGMENTS, "tokens"), WEIGHTS)


def test_by_micro_batch_its_weights_sum_to_one() -> None:
    np.testing.assert_allclose(losses.balance(WEIGHTS, SEGMENTS, "micro_batch"), WEIGHTS / 6, rtol=1e-6)
    assert losses.balance(jnp.zeros_like(WEIGHTS), SEGMENTS, "micro_batch").sum() == 0


def test_by_example_every_segment_that_is_supervised_counts_the_same() -> None:
    found = losses.balance(WEIGHTS, SEGMENTS, "example")
    want = [[0, 1 / 3, 1 / 3, 1 / 3, 0, 1], [0, 0, 0, 0, 1, 1]]
    np.testing.assert_allclose(found, want, rtol=1e-6)
