"""The cache: its layout, and that decoding through it equals running everything again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax import generate
from hico_jax.batch import DropSchedule
from hico_jax.models.llm import cache, qwen2
from hico_jax.models.llm.decoder import Stream

TINY = qwen2.VARIANTS["tiny"]
prefill = jax.jit(generate.prefill, static_argnames=("schedule", "room"))


def test_last_index_skips_padding() -> None:
    np.testing.assert_array_equal(cache.last_index(jnp.asarray([[1, 1, 0, 0], [1, 1, 2, 2], [1, 0, 0, 0]])), [1, 3, 0])


def test_write_touches_one_place_of_one_layer() -> None:
    stack = jnp.zeros((3, 2, 2, 5, 4))
    value = jnp.arange(16.0).reshape(2, 1, 2, 4)
    out = cache.write(stack, jnp.int32(1), jnp.int32(1), 3, value)  # five places, three of them room, step 1
    np.testing.assert_array_equal(out[1, :, :, 3], value[:, 0])
    assert jnp.count_nonzero(out) == jnp.count_nonzero(value)


def test_decoding_equals_running_everything_again() -> None:
    """Rows of three lengths; the tokens that follow are given. Causal layers make both runs the same sums."""
    model = TINY.build(rngs=nnx.Rngs(0))
    lengths, new, room = (9, 5, 2), 4, 6
    tokens = np.random.default_rng(0).integers(0, 64, (3, 9 + new)).astype(np.int32)

    def stream(count: list[int], width: int) -> Stream:
        segments = (np.arange(width)[None] < np.asarray(count)[:, None]).astype(np.int32)
        positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), segments.shape)
        x = model.embed(jnp.asarray(tokens[:, :width]))
        return Stream(x=x, positions=positions, segments=jnp.asarray(segments), slots=jnp.full(segments.shape, -1))

    _, kv = prefill(model, stream(list(lengths), 9), None, room=room)
    decode = jax.jit(model.decode)
    whole, _ = jax.jit(lambda s: model(s, None))(stream([n + new for n in lengths], 9 + new))
    for t in range(new):
        token = np.stack([tokens[b, n + t] for b, n in enumerate(lengths)])
        x, kv = decode(model.embed(jnp.asarray(token)[:, None]), kv)
        for b, n in enumerate(lengths):
            np.testing.assert_allclose(x[b, 0], whole.x[b, n + t], atol=1e-5)  # the same sums in another order
    assert int(kv.step) == new


def test_groups_hold_what_was_alive_there(make_plan: Any) -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    slots = np.full((2, 12), -1, np.int32)
    slots[0, 1:9], slots[1, 1:5] = np.arange(8), np.arange(4)
    segments = np.array([[1] * 12, [1] * 7 + [0] * 5], np.int32)
    stream = Stream(
        x=jax.random.normal(jax.random.key(0), (2, 12, TINY.embed_dim)),
        slots=jnp.asarray(slots),
        positions=jnp.asarray(np.where(segments, np.arange(12), 0).astype(np.int32)),
        segments=jnp.asarray(segments),
    )
    schedule = DropSchedule("attention", (1, 2), (1.0, 0.5, 0.25))
    plan = make_plan(stream, schedule, training=False)
    _, kv = prefill(model, stream, plan, schedule=schedule, room=5)
    assert [g.k.shape for g in kv.groups] == [(1, 2, 2, n + 5, 8) for n in (12, 8, 6)]
    np.testing.assert_array_equal([g.position for g in kv.groups], [[12, 7], [8, 5], [6, 4]])
    assert all((g.segments[:, -5:] == 0).all() for g in kv.groups)
