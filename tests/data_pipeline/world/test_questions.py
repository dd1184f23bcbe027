from __future__ import annotations

import re

import numpy as np
import pytest

from data_pipeline.world.questions import (
    KINDS,
    TAIL,
    THINK,
    Question,
    ask,
    ask_all,
    choose,
    conversation,
    follow,
    multiple_choice,
    paper_chain,
    thinking,
)
from data_pipeline.world.recipes import RECIPES, Look, make_scene
from data_pipeline.world.scene import DIGITS, LETTERS, WORDS, Card, Ground, Mover, Scene

GROUND = (Ground(0.0, 3),)
RED_RING = Card("ring", "red", 1.0, 4.0)
BLUE_SEVEN = Card("7", "blue", 6.0, 8.0)


def _scene(**events: object) -> Scene:
    return Scene(**{"seed": 0, "duration_s": 8.0, "fps": 2.0, "px": 32, "grounds": GROUND, **events})


def _answers(scene: Scene) -> dict[str, str]:
    return {q.kind: q.answer for q in ask_all(scene)}


def test_one_card():
    assert _answers(_scene(cards=(RED_RING,))) == {
        "card_colour": "red", "card_shape": "ring", "when": "1", "count_cards": "1", "present": "yes",
        "caption": "a card with a red ring",
    }  # fmt: skip


def test_one_card_with_something_written():
    assert _answers(_scene(cards=(BLUE_SEVEN,))) == {
        "card_colour": "blue", "card_text": "7", "when": "6", "part": "end", "count_cards": "1", "present": "yes",
        "caption": "a card with a blue 7",
    }  # fmt: skip


def test_two_cards_depend_on_order():
    assert _answers(_scene(cards=(RED_RING, BLUE_SEVEN))) == {
        "first_colour": "red", "second_colour": "blue", "first_shape": "ring",
        "order_red": "first", "order_blue": "second", "shape_of_red": "ring", "count_cards": "2", "present": "yes",
        "caption": "a card with a red ring, then a card with a blue 7",
    }  # fmt: skip
    swapped = (Card("7", "blue", 1.0, 4.0), Card("ring", "red", 6.0, 8.0))
    assert _answers(_scene(cards=swapped)) == {
        "first_colour": "blue", "second_colour": "red", "second_shape": "ring",
        "order_red": "second", "order_blue": "first", "shape_of_red": "ring", "count_cards": "2", "present": "yes",
        "caption": "a card with a blue 7, then a card with a red ring",
    }  # fmt: skip


CHAIN = (
    Card("star", "blue", 0.0, 2.0),  # the end: nothing is written on it
    Card("ring", "red", 2.0, 4.0, hint="green"),  # the start: nothing names it
    Card("cross", "green", 4.0, 6.0, hint="blue"),
)


def test_a_chain_is_followed_from_the_card_that_nothing_names():
    assert [card.colour for card in follow(CHAIN)] == ["red", "green", "blue"]
    assert follow((RED_RING, BLUE_SEVEN)) == ()
    asked = _answers(_scene(cards=CHAIN))
    assert {k: v for k, v in asked.items() if k.startswith(("chain", "hint"))} == {
        "hint_red": "green", "hint_green": "blue", "chain_colour_red": "blue", "chain_shape_red": "star",
    }  # fmt: skip
    assert asked["caption"].startswith("a card with a blue star, then a card with a red ring that says green, then")


def test_the_words_of_the_paper():
    rng = np.random.default_rng(0)
    caption, last = paper_chain(follow(CHAIN), rng)
    for (question, letter), right in ((caption, "a blue star"), (last, "star")):
        assert question.startswith("Find the frame of a red card. Locate the final frame based on the instructions")
        assert question.endswith(TAIL)
        assert f"({letter}) {right}\n" in question
    asked = choose(_scene(cards=CHAIN), {"chain": 1.0}, rng, turns=2, paper_share=1.0)
    assert {q.kind for q in asked} == {"chain_colour_red", "chain_shape_red"}
    assert all(q.answer in q.options == ("A", "B", "C", "D") and q.text.endswith(TAIL) for q in asked)
    assert "a blue star" in next(q.text for q in asked if q.kind == "chain_colour_red")


def test_a_thought_names_every_card_on_the_way():
    rng = np.random.default_rng(0)
    (question, letter), _ = paper_chain(follow(CHAIN), rng)
    text, answer = thinking(question, letter, follow(CHAIN))
    assert text.endswith(THINK)
    assert TAIL not in text
    assert answer == f"red, green, blue: blue star ({letter})"
    assert _answers(_scene(cards=CHAIN))["walk_red"] == "red, green, blue"
    asked = choose(_scene(cards=CHAIN), {"chain": 1.0}, rng, turns=2, paper_share=1.0, think_share=1.0)
    assert all(q.text.endswith(THINK) and q.answer.startswith("red, green, blue: blue star (") for q in asked)


def test_a_mover():
    assert _answers(_scene(movers=(Mover("star", "green", 0.0, 8.0, vx=-0.1),))) == {
        "count_cards": "0", "present": "no", "count_shapes": "1", "mover_colour": "green", "mover_shape": "star",
        "direction": "left", "caption": "a green star moves left",
    }  # fmt: skip


@pytest.mark.parametrize(("blink_s", "answer", "verb"), [(2.0, "yes", "blinks"), (0.0, "no", "stands still")])
def test_a_shape_that_may_blink(blink_s: float, answer: str, verb: str):
    answers = _answers(_scene(movers=(Mover("star", "green", 0.0, 8.0, blink_s=blink_s),)))
    assert answers["blinks"] == answer
    assert answers["caption"] == f"a green star {verb}"
    assert "direction" not in answers


def test_counts():
    movers = tuple(Mover("star", "green", 0.0, 8.0, x=x) for x in (0.2, 0.5, 0.8))
    assert _answers(_scene(movers=movers)) == {
        "count_cards": "0", "present": "no", "count_shapes": "3", "caption": "3 bright shapes",
    }  # fmt: skip
    assert _answers(_scene(grounds=(*GROUND, Ground(4.0, 6)))) == {
        "count_cards": "0", "present": "no", "count_scenes": "2", "caption": "2 empty scenes",
    }  # fmt: skip
    three = (RED_RING, Card("star", "green", 4.0, 5.0), BLUE_SEVEN)
    assert _answers(_scene(cards=three))["count_cards"] == "3"


@pytest.mark.parametrize(
    ("start_s", "end_s", "part"),
    [(0.0, 3.0, "start"), (2.5, 5.5, "middle"), (5.0, 8.0, "end"), (1.0, 4.3, None), (3.9, 6.9, None)],
)
def test_part_is_asked_where_it_is_clear(start_s: float, end_s: float, part: str | None):
    assert _answers(_scene(cards=(Card("ring", "red", start_s, end_s),))).get("part") == part


def test_every_kind_comes_up_and_answers_from_its_list():
    look = Look(contents=(*DIGITS, *LETTERS, *WORDS), written=0.5)
    seen = set()
    for i in range(60):
        for recipe in RECIPES:
            for q in ask_all(make_scene(recipe, seed=0, split="train", index=i, look=look)):
                seen.add(q.kind)
                assert not KINDS[q.kind].answers or q.answer in KINDS[q.kind].answers, q
                assert not KINDS[q.kind].answers or re.fullmatch(r"\w+", q.answer), "answers are single words"
    assert seen == set(KINDS)


def test_multiple_choice_has_one_right_option_in_any_place():
    places = set()
    for seed in range(30):
        open_question = Question("card_colour", "What colour is the card?", "red")
        question = multiple_choice(open_question, np.random.default_rng(seed))
        assert len(set(question.options)) == 4
        assert question.options["ABCD".index(question.answer)] == "red"
        places.add(question.answer)
        assert question.text.startswith("Question: What colour is the card?\nOption:\n(A) ")
        assert question.text.endswith("\nOnly give the best option.")
    assert places == set("ABCD")


def test_wrong_options_are_of_the_same_sort():
    question = multiple_choice(Question("card_text", "What is written on the card?", "CAT"), np.random.default_rng(0))
    assert set(question.options) <= set(WORDS)


def test_open_text_gets_no_options():
    with pytest.raises(ValueError, match="cannot be given options"):
        multiple_choice(Question("caption", "Describe the video.", "a star"), np.random.default_rng(0))


def test_choice_follows_the_weights():
    scene = _scene(cards=(RED_RING,))
    rng = np.random.default_rng(0)
    kinds = [choose(scene, {"card_colour": 3.0, "present": 1.0}, rng, turns=1)[0].kind for _ in range(400)]
    assert set(kinds) == {"card_colour", "present"}
    assert 0.68 < kinds.count("card_colour") / 400 < 0.82  # three standard deviations around 3/4
    assert choose(scene, {"direction": 1.0}, rng, turns=2) == []


def test_a_first_word_weighs_for_its_kinds():
    rng = np.random.default_rng(0)
    asked = choose(_scene(cards=(RED_RING, BLUE_SEVEN)), {"order": 1.0}, rng, turns=5)
    assert {q.kind for q in asked} == {"order_red", "order_blue"}


def test_a_conversation_shows_the_media_once():
    questions = [
        Question("present", "Is there a card?", "yes"),
        Question("card_colour", "What colour is the card?", "red"),
    ]
    assert conversation(questions) == [
        {"from": "human", "value": "<image>\nIs there a card?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "What colour is the card?"},
        {"from": "gpt", "value": "red"},
    ]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'smell'"):
        ask("smell", _scene())
