"""A question behind a remembered film answers as the whole prompt does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.drop import plan_drop
from hico_jax import generate
from hico_jax.batch import Batch, DropSchedule
from hico_jax.generate import GenerationConfig
from hico_jax.models.llm import qwen2, reuse
from hico_jax.models.llm.decoder import Stream

SETTINGS = GenerationConfig(max_new_tokens=4, eos=())
PLACES = 6  # of a question, padding included


def prompt(llm: qwen2.Qwen2, ids: np.ndarray, visual: int, length: int, drop: DropSchedule) -> tuple[Stream, Any]:
    """Three tokens of text, visual tokens, more text; padding up to `length`."""
    count = ids.shape[1]
    ids = np.pad(ids, ((0, 0), (0, length - count)))
    real = np.broadcast_to(np.arange(length) < count, ids.shape)
    positions = np.where(real, np.arange(length), 0).astype(np.int32)
    slots = np.where((np.arange(length) >= 3) & (np.arange(length) < 3 + visual), np.arange(length) - 3, -1)
    slots = np.broadcast_to(slots, ids.shape).astype(np.int32)
    zeros = np.zeros(ids.shape, np.int32)
    batch = Batch(ids, slots, positions, real.astype(np.int32), zeros, zeros.astype(np.float32), None, None)
    plan = plan_drop(batch, drop, training=False) if drop.num_stages else None
    batch = batch.replace(drop=plan, targets=None, weights=None)  # type: ignore[attr-defined]
    stream = jax.tree.map(jnp.asarray, Stream.begin(llm.embed(jnp.asarray(ids)), batch))
    return stream, jax.tree.map(jnp.asarray, plan)


@pytest.fixture(scope="module")
def llm() -> qwen2.Qwen2:
    return qwen2.VARIANTS["tiny"].build(rngs=nnx.Rngs(params=3))


@pytest.mark.parametrize(
    ("kind", "layers", "film_layers"),
    [
        ("none", (), 3),
        ("uniform0_attention", (1, 2), 2),
        pytest.param("uniform", (1, 2), 3, marks=pytest.mark.slow),
        pytest.param("attention", (1, 2), 1, marks=pytest.mark.slow),
    ],
)
def test_questions_behind_a_remembered_film_answer_as_whole_prompts(
    kind: str, layers: tuple[int, ...], film_layers: int, llm: qwen2.Qwen2
) -> None:
    drop = DropSchedule(kind, layers, (1.0, 0.6, 0.3)[: len(layers) + 1])
    rng, visual = np.random.default_rng(0), 12
    film = rng.integers(0, 64, (2, 3 + visual)).astype(np.int32)
    beginning, plan = prompt(llm, film, visual, film.shape[1], drop)
    room = PLACES + SETTINGS.max_new_tokens
    memory = generate.remember(llm, beginning, plan, schedule=drop, room=room)
    assert sum(group.k.shape[0] for group in memory.groups) == film_layers
    for asked in (5, PLACES):  # the second question finds the memory as the first one did
        question = rng.integers(0, 64, (2, asked)).astype(np.int32)
        whole, plan = prompt(llm, np.concatenate([film, question], 1), visual, film.shape[1] + PLACES, drop)
        logits, cache = generate.begin(llm, whole, plan, schedule=drop, room=SETTINGS.max_new_tokens)
        expected = generate.finish(llm, logits, cache, SETTINGS)
        alone, _ = prompt(llm, question, 0, PLACES, DropSchedule())
        got_logits, got_cache = generate.resume(llm, memory, alone, plan, schedule=drop)
        np.testing.assert_allclose(got_logits, logits, atol=2e-5)  # float32 sums in another order
        got = generate.finish(llm, got_logits, got_cache, SETTINGS)
        np.testing.assert_array_equal(got.ids, expected.ids)


def test_a_question_that_finds_no_room_is_refused(llm: qwen2.Qwen2) -> None:
    film = np.ones((1, 8), np.int32)
    memory = generate.remember(llm, prompt(llm, film, 4, 8, DropSchedule())[0], None, room=PLACES)
    question, _ = prompt(llm, np.ones((1, PLACES), np.int32), 0, PLACES, DropSchedule())
    with pytest.raises(ValueError, match="the question has 6 places but the film was remembered with room for 6"):
        generate.resume(llm, memory, question, None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("none", 1), ("uniform", 4), ("uniform0_attention", 2), ("uniform1_attention", 3), ("attention", 1)],
)
def test_groups_above_the_first_choice_that_asks(kind: str, expected: int) -> None:
    drop = DropSchedule() if kind == "none" else DropSchedule(kind, (1, 2, 3), (1.0, 0.5, 0.25, 0.125))
    assert reuse.num_groups(drop) == expected
