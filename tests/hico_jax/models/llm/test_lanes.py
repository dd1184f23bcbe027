"""Prompts in pieces and answers of several lanes are those of whole prompts, one by one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.drop import plan_drop
from hico_jax import generate
from hico_jax.batch import Batch, DropSchedule
from hico_jax.generate import NO_DROP, GenerationConfig
from hico_jax.models.llm import qwen2
from hico_jax.models.llm.decoder import Stream
from hico_jax.models.llm.lanes import Lanes, copy

PIECE, ROOM = 4, 5
SETTINGS = GenerationConfig(max_new_tokens=ROOM, eos=())


@pytest.fixture(scope="module")
def llm() -> qwen2.Qwen2:
    return qwen2.VARIANTS["tiny"].build(rngs=nnx.Rngs(params=3))


def whole(llm: qwen2.Qwen2, ids: np.ndarray, drop: DropSchedule = NO_DROP, visual: int = 0) -> Any:
    """A stream and its plan; the rows' ids are 0 behind their ends."""
    real = ids > 0
    index = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    slots = np.where((index >= 2) & (index < 2 + visual), index - 2, -1).astype(np.int32)
    zeros = np.zeros(ids.shape, np.int32)
    positions = np.where(real, index, 0).astype(np.int32)
    batch = Batch(ids, slots, positions, real.astype(np.int32), zeros, zeros.astype(np.float32), None, None)
    plan = plan_drop(batch, drop, training=False) if drop.num_stages else None
    batch = batch.replace(drop=plan, targets=None, weights=None)  # type: ignore[attr-defined]
    return jax.tree.map(jnp.asarray, (Stream.begin(llm.embed(jnp.asarray(ids)), batch), plan))


@functools.partial(jax.jit, static_argnames=("seen",))
def extend(llm: qwen2.Qwen2, lanes: Lanes, ids: Any, where: Any, *, seen: int) -> Any:
    lane, at, count, reach = where
    x, lanes, trail = llm.extend(lanes, llm.embed(ids[None])[0], lane, at, count, reach, group=0, first=0, seen=seen)
    logits = generate.logits_of(llm, llm.norm(jax.lax.dynamic_slice_in_dim(x, count - 1, 1))[None])
    return logits[0, 0], lanes, trail


def test_pieces_and_steps_of_lanes_equal_whole_prompts(llm: qwen2.Qwen2) -> None:
    """Two prompts of other lengths in lanes 2 and 0, in turns; lane 1 holds a copy that nobody else disturbs."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 64, 10).astype(np.int32), rng.integers(1, 64, 6).astype(np.int32)]
    lanes = Lanes.empty(llm.config, DropSchedule(), 3, [20], jnp.float32)
    logits: dict[int, Any] = {}
    for at in range(0, 12, PIECE):
        for lane, ids in ((2, prompts[0]), (0, prompts[1])):
            piece = ids[at : at + PIECE]
            if not len(piece):
                continue
            where = jnp.asarray([lane, at, len(piece), len(ids) - 1], jnp.int32)
            padded = jnp.asarray(np.pad(piece, (0, PIECE - len(piece))))
            logits[lane], lanes, trail = extend(llm, lanes, padded, where, seen=20 if at else 8)
            assert trail.shape == (3, 32)
    expected = []
    for lane, ids in ((2, prompts[0]), (0, prompts[1])):
        want, cache = generate.begin(llm, whole(llm, ids[None])[0], None, room=ROOM)
        np.testing.assert_allclose(logits[lane], want[0], atol=2e-5)
        expected.append(generate.finish(llm, want, cache, SETTINGS).ids[0])
    lanes = copy(lanes, jnp.asarray(2, jnp.int32), jnp.asarray(1, jnp.int32))
    step = jax.jit(lambda lanes, token, rows, at: llm.step(lanes, llm.embed(token[:, None]), rows, at, seen=16))
    token = jnp.stack([jnp.argmax(logits[2]), jnp.argmax(logits[0]), jnp.argmax(logits[2])]).astype(jnp.int32)
    said = [token]
    for n in range(ROOM - 1):
        rows = jnp.asarray([2, 0, 1], jnp.int32)
        x, lanes = step(lanes, token, rows, jnp.asarray([[10, 6, 10]], jnp.int32) + n)
        token = jnp.argmax(generate.logits_of(llm, x)[:, 0], -1).astype(jnp.int32)
        said.append(token)
    np.testing.assert_array_equal(np.stack(said, 1), [expected[0], expected[1], expected[0]])
    order = jnp.asarray([1, 2, 0])  # the same step for all lanes in order
    x, _ = jax.jit(lambda lanes, token, at: llm.step(lanes, llm.embed(token[:, None]), None, at, seen=15))(
        lanes, token[order], jnp.asarray([[6, 10, 10]], jnp.int32)[:, :] + ROOM - 1
    )
    y, _ = step(lanes, token, jnp.asarray([2, 0, 1], jnp.int32), jnp.asarray([[10, 6, 10]], jnp.int32) + ROOM - 1)
    np.testing.assert_allclose(x, y[order], atol=2e-5)


@pytest.mark.parametrize(
    "drop",
    [
        pytest.param(DropSchedule(), marks=pytest.mark.slow),
        DropSchedule("uniform0_attention", (1, 2), (1.0, 0.6, 0.3)),
    ],
    ids=lambda d: d.kind,
)
def test_a_prefill_in_pieces_is_the_whole_prefill(drop: DropSchedule, llm: qwen2.Qwen2) -> None:
    """Two rows of other lengths, nineteen places in pieces of four."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 64, (2, 19)).astype(np.int32)
    ids[1, 15:] = 0
    stream, plan = whole(llm, ids, drop, visual=10)
    want, cache = generate.begin(llm, stream, plan, schedule=drop, room=ROOM)
    got, pieces = generate.begin(llm, stream, plan, schedule=drop, room=ROOM, piece=PIECE)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(cache.groups, pieces.groups, strict=True):
        real = np.asarray(a.segments != 0)[None, :, None, :, None]
        np.testing.assert_allclose(np.where(real, b.k, 0), np.where(real, a.k, 0), atol=2e-5)
        np.testing.assert_array_equal(a.segments, b.segments)
    ids_want = generate.finish(llm, want, cache, SETTINGS).ids
    np.testing.assert_array_equal(generate.finish(llm, got, pieces, SETTINGS).ids, ids_want)
