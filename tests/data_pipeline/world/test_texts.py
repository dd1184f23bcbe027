from __future__ import annotations

import dataclasses
import re

import numpy as np

from data_pipeline.world.presets import PRESETS
from data_pipeline.world.questions import KINDS, THINK
from data_pipeline.world.recipes import held_out
from data_pipeline.world.texts import corpus, option_items, text_items, told_items


def test_text_items_have_no_media():
    items = text_items(np.random.default_rng(0), 40)
    assert len(items) == 40
    assert items == text_items(np.random.default_rng(0), 40)
    assert all(set(item) == {"id", "conversations"} for item in items)
    assert all([t["from"] for t in item["conversations"]] == ["human", "gpt"] for item in items)
    assert not any("<image>" in turn["value"] for item in items for turn in item["conversations"])


def _walk(told: str, start: str) -> list[str]:
    """The chain from a colour on, read from what is told alone."""
    cards = re.findall(r"a card with a (\w+) (\w+)(?: that says (\w+))?", told)
    content, hint = ({colour: row[i] for colour, *row in cards} for i in (0, 1))
    way = [start]
    while hint[way[-1]]:
        way.append(hint[way[-1]])
    return [*way, content[way[-1]]]


def test_told_films_hold_what_their_answers_need():
    preset = dataclasses.replace(PRESETS["hico_nano"], told=60)
    items = told_items(preset, 0)
    assert items == told_items(preset, 0)
    assert len(items) > 50
    walked = 0
    for item in items:
        assert set(item) == {"id", "conversations"}
        told, _, first = item["conversations"][0]["value"].partition("\n")
        assert told.startswith("The video shows ")
        assert not any(held_out(c, s) for c, s in re.findall(r"a (\w+) (circle|square|triangle|star|cross|ring)", told))
        turns = [first, *(t["value"] for t in item["conversations"][1:])]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            options = dict(re.findall(r"\(([A-D])\) (.+)", question))
            colour = re.match(r"(?:Question: )?(?:Find the frame of a|Start at the) (\w+) card", question)
            if not colour:
                continue
            *way, content = _walk(told, colour[1])
            if THINK in question:
                assert answer.startswith(f"{', '.join(way)}: {way[-1]} {content} (")
                answer = answer[-2]
            said = options.get(answer, answer)
            assert said in (content, way[-1], f"a {way[-1]} {content}", ", ".join(way)), (told, question)
            walked += 1
    assert walked > 40


def test_options_have_the_letter_that_is_asked_for():
    items = option_items(np.random.default_rng(0), 20)
    assert items == option_items(np.random.default_rng(0), 20)
    letters = set()
    for item in items:
        for asked, answer in zip(item["conversations"][::2], item["conversations"][1::2], strict=True):
            options = dict(re.findall(r"\(([A-D])\) (.+)", asked["value"]))
            assert len(set(options.values())) == 4
            last = asked["value"].rpartition(" ")[2][:-1]
            if asked["value"].splitlines()[-1].startswith("What is option"):
                assert options[last] == answer["value"]
                continue
            assert options[answer["value"]] == asked["value"].splitlines()[-1].removeprefix("Which option is ")[:-1]
            letters.add(answer["value"])
    assert letters == set("ABCD")


def test_the_corpus_has_every_word_the_model_must_say():
    lines = corpus("nano", scenes=100)
    assert lines == corpus("nano", scenes=100)
    words = set(" ".join(lines).replace("?", " ").replace(".", " ").split())
    for name, kind in KINDS.items():
        assert set(kind.answers) <= words, name
    for name in PRESETS["nano"].weights:
        if name in KINDS:
            wording = KINDS[name].wording.rstrip("?.").replace(",", "")
            assert set(wording.split()) <= {w.rstrip(",") for w in words}, name


def test_answers_are_one_token_in_a_small_vocabulary():
    from data_pipeline.tokenizer import train_bpe

    tokenizer = train_bpe(corpus("nano"), 512)
    for name in ("card_colour", "card_shape", "order_red", "present"):
        for answer in KINDS[name].answers:
            assert len(tokenizer.encode(answer)) == 1, answer
