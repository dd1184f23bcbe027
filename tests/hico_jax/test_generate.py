"""Generation: recorded greedy answers, rows in company and alone, sampling, stopping, scoring."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax import generate
from hico_jax.batch import DropSchedule
from hico_jax.generate import GenerationConfig
from hico_jax.models.llm import qwen2
from hico_jax.models.llm.decoder import Stream

TINY = dataclasses.replace(qwen2.VARIANTS["tiny"], tied=False)
GREEDY = GenerationConfig(max_new_tokens=5, eos=())


def text_stream(model: qwen2.Qwen2, tokens: np.ndarray, lengths: Any = None) -> Stream:
    rows, width = tokens.shape
    lengths = np.full(rows, width) if lengths is None else np.asarray(lengths)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    return Stream(
        x=model.embed(jnp.asarray(tokens.astype(np.int32))),
        positions=jnp.asarray(positions),
        segments=jnp.asarray((positions < lengths[:, None]).astype(np.int32)),
        slots=jnp.full((rows, width), -1, jnp.int32),
    )


def recorded(golden: Any, model: qwen2.Qwen2, name: str) -> tuple[dict[str, np.ndarray], Stream, DropSchedule]:
    """A recorded prompt: text alone, or text around visual tokens."""
    case = golden.case("E_llm", name)
    tensors, config = golden.tensors(case["file"]), case["config"]
    if name == "greedy_plain":
        return tensors, text_stream(model, tensors["input_ids"].reshape(1, -1)), DropSchedule()
    before, count = config["pre"], config["num_image_tokens"]
    ids = np.insert(tensors["text_ids"], [before] * count, 0)[None]
    stream = text_stream(model, ids)
    slots = np.full(ids.shape, -1, np.int32)
    slots[0, before : before + count] = np.arange(count)
    x = stream.x.at[0, before : before + count].set(jnp.asarray(tensors["image_embeds"]))
    layers, ratios = (tuple(config[f"llm_{n}_list"]) for n in ("compress_layer", "image_token_ratio"))
    schedule = DropSchedule(config["llm_compress_type"], layers, ratios)
    return tensors, stream.replace(x=x, slots=jnp.asarray(slots)), schedule


RECORDED = (
    "greedy_plain", "compress_attention_1_3_4", "compress_uniform_1_3_4", "compress_uniform0_attention_1_3_4",
    "compress_uniform1_attention_1_3_4", "compress_attention_4",
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", RECORDED)
def test_greedy_answers_equal_the_reference(name: str, golden: Any, golden_llm: Any, make_plan: Any) -> None:
    model = golden_llm()
    tensors, stream, schedule = recorded(golden, model, name)
    plan = make_plan(stream, schedule, training=False) if schedule.num_stages else None
    stream = stream.replace(survives=plan.survives) if plan else stream
    config = GenerationConfig(max_new_tokens=8, eos=())
    made = generate.continue_stream(model, stream, plan, config, schedule=schedule)
    np.testing.assert_array_equal(made.ids[0], tensors["generated_ids"])
    assert made.lengths.tolist() == [8]
    if name not in ("greedy_plain", "compress_attention_1_3_4"):
        return  # logits step by step twice are enough: each compiles anew

    logits, kv = generate._prefill(model, stream, plan, schedule=schedule, room=8)
    decode = jax.jit(lambda token, kv: model.decode(model.embed(token[:, None]), kv))
    for step, expected in enumerate(tensors["step_logits"]):
        # the reference's own float32 and float64 differ by 2e-5
        np.testing.assert_allclose(logits[0], expected, atol=2e-4)
        x, kv = decode(jnp.asarray(tensors["generated_ids"][step : step + 1].astype(np.int32)), kv)
        logits = generate.logits_of(model, x)[:, 0]


@pytest.mark.parametrize("dropping", [False, True])
def test_rows_in_company_answer_as_alone(dropping: bool, make_plan: Any) -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    schedule = DropSchedule("uniform0_attention", (1, 2), (1.0, 0.6, 0.3)) if dropping else DropSchedule()
    tokens = np.random.default_rng(0).integers(0, 64, (3, 14))
    lengths, visual = (14, 9, 5), (8, 4, 0)
    whole = text_stream(model, tokens, lengths)
    slots = np.full(tokens.shape, -1, np.int32)
    for b, count in enumerate(visual):
        slots[b, 1 : 1 + count] = np.arange(count)
    whole = whole.replace(slots=jnp.asarray(slots))

    plan = make_plan(whole, schedule, training=False)

    def answer(stream: Stream) -> list[list[int]]:
        own = dataclasses.replace(make_plan(stream, schedule, training=False), lengths=plan.lengths)
        stream = stream.replace(survives=own.survives)
        return generate.continue_stream(model, stream, own, GREEDY, schedule=schedule).ids.tolist()

    together = answer(whole)
    alone = [answer(jax.tree.map(lambda a, b=b: a[b : b + 1], whole))[0] for b in range(3)]
    assert together == alone
    assert len({tuple(ids) for ids in together}) > 1


def test_a_row_stops_at_its_end_and_the_loop_with_the_last_row() -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    stream = text_stream(model, np.random.default_rng(0).integers(0, 64, (2, 6)))
    free = generate.continue_stream(model, stream, None, GREEDY)
    end = int(free.ids[0, 2])
    made = generate.continue_stream(model, stream, None, dataclasses.replace(GREEDY, eos=(end, 63)))
    for row, before, length in zip(made.ids, free.ids, made.lengths, strict=True):
        stops = np.flatnonzero(np.isin(before, (end, 63)))
        assert length == (stops[0] + 1 if len(stops) else 5)
        np.testing.assert_array_equal(row[:length], before[:length])
        assert (row[length:] == 0).all()


def test_asking_again_compiles_nothing() -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    prompts = [text_stream(model, np.random.default_rng(s).integers(0, 64, (2, 6))) for s in range(2)]
    config = GenerationConfig(max_new_tokens=3, do_sample=True, eos=())
    generate.continue_stream(model, prompts[0], None, config)
    before = generate._prefill._cache_size(), generate._decode._cache_size()
    generate.continue_stream(TINY.build(rngs=nnx.Rngs(1)), prompts[1], None, dataclasses.replace(config, seed=7))
    assert (generate._prefill._cache_size(), generate._decode._cache_size()) == before


def draws(logits: list[float], config: GenerationConfig, count: int = 4000) -> np.ndarray:
    """How often each token is drawn."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    keys = jax.vmap(jax.random.key)(np.arange(count, dtype=np.int32))
    chosen = jax.jit(generate.choose, static_argnums=3)(rows, jnp.zeros(rows.shape, bool), keys, config)
    return np.bincount(np.asarray(chosen), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),  # 0.4 is not enough, 0.7 is
        ({"top_p": 0.1}, [1, 0, 0, 0]),  # the likeliest always stays
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),  # of what top-k leaves: 4/9, 7/9
        ({"temperature": 0.5, "top_p": 0.55}, [16 / 25, 9 / 25, 0, 0]),  # temperature comes first
    ],
)
def test_draws_follow_the_options(options: dict[str, Any], expected: list[float]) -> None:
    """4,000 draws: the standard deviation of a frequency is at most 0.008."""
    got = draws(np.log([0.4, 0.3, 0.2, 0.1]).tolist(), GenerationConfig(do_sample=True, **options))
    np.testing.assert_allclose(got, expected, atol=0.035)
    assert (got[np.asarray(expected) == 0] == 0).all()


def test_penalty_lowers_what_was_said_whatever_its_sign() -> None:
    config = GenerationConfig(repetition_penalty=2.0)
    logits = jnp.asarray([[3.0, 2.0, 1.0], [-1.0, -1.5, -3.0]])
    nothing, first = jnp.zeros((2, 3), bool), jnp.asarray([[True, False, False]] * 2)
    keys = jax.vmap(jax.random.key)(np.arange(2, dtype=np.int32))
    assert generate.choose(logits, nothing, keys, config).tolist() == [0, 0]
    assert generate.choose(logits, first, keys, config).tolist() == [1, 1]


def test_penalty_spares_the_first_token_and_then_forbids_repeats() -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    stream = text_stream(model, np.random.default_rng(0).integers(0, 64, (2, 6)))
    free = generate.continue_stream(model, stream, None, GREEDY)
    strict = generate.continue_stream(model, stream, None, dataclasses.replace(GREEDY, repetition_penalty=1e6))
    np.testing.assert_array_equal(free.ids[:, 0], strict.ids[:, 0])
    assert all(len(set(row)) == 5 for row in strict.ids.tolist())


def test_a_row_draws_from_its_own_seed() -> None:
    model = TINY.build(rngs=nnx.Rngs(0))
    row = np.random.default_rng(0).integers(0, 64, (1, 6))
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=5.0, eos=(), seed=3)
    two = generate.continue_stream(model, text_stream(model, np.repeat(row, 2, 0)), None, config)
    one = generate.continue_stream(model, text_stream(model, row), None, dataclasses.replace(config, seed=4))
    assert two.ids[0].tolist() != two.ids[1].tolist()
    assert two.ids[1].tolist() == one.ids[0].tolist()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"do_sample": True, "temperature": 0.0}, "greedy"),
        ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**wrong)


def test_score_reads_given_answers() -> None:
    """Score the greedy answer itself: every token is the likeliest; change one and it no longer is."""
    model = TINY.build(rngs=nnx.Rngs(0))
    prompt = np.random.default_rng(0).integers(0, 64, (2, 6))
    answer = generate.continue_stream(model, text_stream(model, prompt), None, GREEDY).ids[:, :3].copy()
    answer[1, 2] = (answer[1, 2] + 1) % 64
    tokens = np.concatenate([prompt, answer], axis=1)
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1))).astype(np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    weights[0, 5:8], weights[1, 6:8] = 1, 1  # the second row asks for two tokens only
    stream = text_stream(model, tokens).replace(targets=jnp.asarray(targets), weights=jnp.asarray(weights))
    out, _ = model(stream, None)
    got = generate.score(model, out, 4)
    assert got.valid.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert got.correct.tolist() == [[True, True, True, False], [True, False, False, False]]
    expected = jax.nn.log_softmax(out.x @ model.unembed_weight())
    for b, t in ((0, 5), (0, 6), (0, 7), (1, 6), (1, 7)):
        np.testing.assert_allclose(got.log_probs[b, t - (5 if b == 0 else 6)], expected[b, t, targets[b, t]], atol=1e-5)
