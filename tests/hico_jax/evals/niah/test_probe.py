"""A question's two scores against another way to compute them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import chat, layout
from data_pipeline.tokenizer import Tokenizer
from hico_jax import generate
from hico_jax.evals.niah import haystack, probe
from hico_jax.evals.niah.needles import Asked
from hico_jax.models.hico import HiCo

ASKED = Asked("colour", "What colour is the card?", "red and blue")


@pytest.fixture(scope="module")
def trial(asked_model: HiCo) -> tuple[haystack.Haystack, haystack.Trial]:
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (3, 4, 32, 32, 3), np.uint8)
    hay = haystack.Haystack(haystack.encode_clips(asked_model, clips, 3), 12, {}, 12)
    needle = haystack.alone(asked_model, list(rng.integers(0, 256, (1, 32, 32, 3), np.uint8)))
    return hay, haystack.at_features(hay, needle, 12, [4], asked_model.config.geometry())


def test_forced_is_what_one_pass_over_prompt_and_answer_says(
    asked_model: HiCo, words: Tokenizer, trial: tuple[haystack.Haystack, haystack.Trial]
) -> None:
    asker = probe.Probe(asked_model, words)
    found = asker.ask(*trial, ASKED)
    ids, answer = asker.ids(ASKED.question, 16), words.encode(ASKED.answer)
    geometry = asked_model.config.geometry()
    labels = [chat.IGNORE] * len(ids) + answer
    row = layout.row([*ids, *answer], labels, [layout.Visual(num_clips=4)], geometry)
    batch = layout.collate([row], geometry, len(row), 4, pixels=False)
    visual = haystack.gather(trial[0].tokens, trial[1].extra, trial[1].index)
    whole = jax.jit(lambda m, b, v: generate.score(m.llm, m.llm(m.splice(b, v), None)[0], len(answer)))
    score = whole(asked_model, batch, visual)
    assert int(score.valid.sum()) == len(answer) > 1
    assert found.log_prob == pytest.approx(float(score.log_probs.sum()), abs=1e-3)
    assert found.forced == bool(score.correct.all())
    assert (found.visual_tokens, found.prompt_tokens) == (16, len(ids) + 15)


def test_what_is_said_greedily_is_the_likeliest_when_forced(
    asked_model: HiCo, words: Tokenizer, trial: tuple[haystack.Haystack, haystack.Trial]
) -> None:
    geometry = asked_model.config.geometry()
    ids = probe.Probe(asked_model, words).ids(ASKED.question, 16)
    row = layout.row(ids, None, [layout.Visual(num_clips=4)], geometry)
    batch = layout.collate([row], geometry, 128, 4, training=False, pixels=False)
    visual = haystack.gather(trial[0].tokens, trial[1].extra, trial[1].index)
    stream = generate.spliced(asked_model, batch, visual)
    config = generate.GenerationConfig(max_new_tokens=8, eos=())
    logits, cache = generate.begin(asked_model.llm, stream, None, room=8)
    answer = np.asarray([7, 300, 11, 5], np.int32)
    wrong, worse = probe.forced(asked_model.llm, logits, cache, answer)
    made = generate.finish(asked_model.llm, logits, cache, config)
    logits, cache = generate.begin(asked_model.llm, stream, None, room=8)
    right, better = probe.forced(asked_model.llm, logits, cache, made.ids[0].astype(np.int32))
    np.testing.assert_array_equal(right, made.ids[0])
    assert wrong[0] == right[0]
    assert (wrong != answer).any()
    assert better > worse


def test_prompts(asked_model: HiCo, words: Tokenizer) -> None:
    paper = probe.Probe(asked_model, words).ids("Who?", 8)
    assert words.decode(paper, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    spoken = words.decode(probe.Probe(asked_model, words, "chat").ids("Who?", 8), skip_special=False)
    assert "\n\nThe video lasts for 8.00 seconds" in spoken
    assert paper.count(-200) == 1


def test_letters_and_words() -> None:
    options = "What?\nOptions: (A) red\n(B) blue\nOnly give the best option. Best option: ("
    for said, right in (("B", True), ("(B)", True), ("B) blue", True), ("blue", True), ("A", False), ("", False)):
        assert probe._means(said, Asked("q", options, "B")) == right, said
    for said, right in (("red", True), ("Red.", True), ("blue", False), ("red card", False)):
        assert probe._means(said, Asked("q", "What?", "red")) == right, said
    assert probe._same("(B", "B")


def test_nothing_of_the_haystacks_size_is_kept(trial: tuple[haystack.Haystack, haystack.Trial]) -> None:
    found = haystack.gather(trial[0].tokens, trial[1].extra, jnp.zeros(4, jnp.int32))
    assert found.shape[1] == 4


@pytest.mark.parametrize(
    ("said", "option"),
    [("red, blue: blue circle (C)", "C"), ("(A) or (B)", "B"), ("C", ""), ("", ""), ("blue (c)", "")],
)
def test_the_last_option_in_brackets_is_the_conclusion(said: str, option: str) -> None:
    assert probe.concluded(said) == option


def test_a_thought_is_judged_by_what_is_said(
    asked_model: HiCo, words: Tokenizer, trial: tuple[haystack.Haystack, haystack.Trial]
) -> None:
    thinker = probe.Probe(asked_model, words, think=True, max_thought_tokens=12)
    found = thinker.ask(*trial, Asked("caption", "Which?", "A"))
    assert found.forced == found.generated == (probe.concluded(found.answer) == "A")
    assert (found.followed, found.named) == (None, None), "nobody said what the way is"
    asked = Asked("caption", "Which?", "A", "red, blue: blue circle")
    found = thinker.ask(*trial, asked)
    assert {"followed": found.followed, "named": found.named} == probe.walked(found.answer, asked.way)


@pytest.mark.parametrize(
    ("said", "followed", "named"),
    [
        ("red, blue, white: white ring (B)", 1.0, True),
        ("red, blue, cyan: white ring (B)", 0.5, True),
        ("red, cyan, white: white star (B)", 0.0, False),
        ("red, blue, white, white: white ring", 1.0, True),
        ("blue, white: white ring (B)", 0.0, True),
        ("B", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_how_far_a_thought_follows(said: str, followed: float, named: bool) -> None:
    assert probe.walked(said, "red, blue, white: white ring") == {"followed": followed, "named": named}
