from __future__ import annotations

import collections
import dataclasses

import pytest

from data_pipeline.world.questions import ask_all, follow
from data_pipeline.world.recipes import RECIPES, SPLITS, Look, held_out, make_scene, scene_seed
from data_pipeline.world.scene import COLOURS, DIGITS, SHAPES, Scene

LOOK = Look(contents=DIGITS, written=0.3)


def _scenes(split: str, number: int = 20) -> list[Scene]:
    return [
        make_scene(recipe, seed=0, split=split, index=i, look=LOOK) for i in range(number) for recipe in RECIPES
    ]  # fmt: skip


def _pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(c.colour, c.content) for c in scene.cards} | {(m.colour, m.shape) for m in scene.movers}


def test_the_same_arguments_give_the_same_scene():
    for recipe in RECIPES:
        first, again = (make_scene(recipe, seed=3, split="val", index=7, look=LOOK) for _ in range(2))
        assert first == again
        assert first != make_scene(recipe, seed=4, split="val", index=7, look=LOOK)
        assert first != make_scene(recipe, seed=3, split="val", index=8, look=LOOK)


def test_no_two_splits_share_a_scene_or_a_ground():
    for number, split in enumerate(SPLITS):
        for scene in _scenes(split):
            assert scene.seed % 3 == number
            assert all(g.seed % 3 == number for g in scene.grounds)


def test_seeds_of_one_split_do_not_repeat():
    seeds = {scene_seed(seed, split, index) for seed in range(5) for split in SPLITS for index in range(50)}
    assert len(seeds) == 5 * 3 * 50


def test_held_out_pairs_appear_in_test_and_only_there():
    for split in SPLITS:
        for scene in _scenes(split):
            assert all(held_out(*pair) == (split == "test") for pair in _pairs(scene)), (split, scene)


def test_held_out_pairs_are_balanced():
    pairs = [(c, s) for c in COLOURS for s in SHAPES if held_out(c, s)]
    assert collections.Counter(c for c, _ in pairs) == dict.fromkeys(COLOURS, 1)
    assert set(collections.Counter(s for _, s in pairs).values()) == {1, 2}


def test_recipes_do_what_they_say():
    for scene in (make_scene("two_cards", seed=0, split="train", index=i) for i in range(50)):
        first, second = scene.cards
        assert first.colour != second.colour
        assert second.start_s >= first.end_s
        assert min(c.end_s - c.start_s for c in scene.cards) >= 2
    assert {len(make_scene("count", seed=0, split="train", index=i).movers) for i in range(40)} == {1, 2, 3, 4}
    assert {make_scene("mover", seed=0, split="train", index=i).movers[0].direction for i in range(40)} == {
        "left", "right", "up", "down",
    }  # fmt: skip
    assert {len(make_scene("scenes", seed=0, split="train", index=i).grounds) for i in range(40)} == {1, 2, 3}


def test_cards_last_as_long_as_asked_and_sit_anywhere():
    scenes = [make_scene("card", seed=0, split="train", index=i) for i in range(300)]
    assert all(3 <= s.cards[0].end_s - s.cards[0].start_s <= 5 for s in scenes)
    assert min(s.cards[0].start_s for s in scenes) == 0
    assert any(s.cards[0].end_s == s.duration_s for s in scenes)
    assert {c.content for s in scenes for c in s.cards} == set(SHAPES)


def test_long_films_have_cuts():
    scene = make_scene("card", seed=0, split="train", index=1, look=Look(fps=1.0, seconds=(60.0, 64.0)))
    lengths = [b.start_s - a.start_s for a, b in zip(scene.grounds, scene.grounds[1:], strict=False)]
    assert 2 <= len(lengths) + 1 <= 8
    assert all(8 <= n <= 24 for n in lengths)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="recipe is 'dance'"):
        make_scene("dance", seed=0, split="train", index=0)
    with pytest.raises(ValueError, match="split is 'dev'"):
        make_scene("card", seed=0, split="dev", index=0)


def test_chains_visit_every_card_once():
    lengths, orders = set(), set()
    for index in range(40):
        scene = make_scene("chain", seed=0, split="train", index=index, look=Look(seconds=(28.0, 32.0)))
        found = follow(scene.cards)
        assert sorted(card.colour for card in found) == sorted(card.colour for card in scene.cards)
        lengths.add(len(found))
        orders.add(found == scene.cards)
    assert lengths == {2, 3, 4, 5, 6, 7}
    assert orders == {True, False}


def test_of_two_chains_each_is_followed_from_its_own_start():
    ends = set()
    for index in range(40):
        scene = make_scene("two_chains", seed=0, split="train", index=index, look=Look(seconds=(28.0, 32.0)))
        named = {card.hint for card in scene.cards if card.hint}
        starts = [card.colour for card in scene.cards if card.colour not in named]
        assert len(starts) == 2
        found = [follow(scene.cards, start) or tuple(c for c in scene.cards if c.colour == start) for start in starts]
        assert sorted(c.colour for chain in found for c in chain) == sorted(c.colour for c in scene.cards)
        assert any(len(chain) > 1 for chain in found)
        ends.add(tuple(sorted(map(len, found))))
    assert (1, 2) in ends
    assert any(min(pair) > 1 for pair in ends)


def test_a_lone_hint_is_read_and_leads_nowhere():
    for index in range(20):
        scene = make_scene("hint", seed=0, split="train", index=index, look=LOOK)
        (card,) = scene.cards
        assert card.hint not in ("", card.colour)
        assert follow(scene.cards) == ()
        asked = {question.kind: question for question in ask_all(scene)}
        assert asked[f"hint_{card.colour}"].answer == card.hint
        assert asked["caption"].answer.endswith(f"that says {card.hint}")
        assert not any(kind.startswith(("chain", "walk")) for kind in asked)


def test_a_chain_ends_where_a_hint_names_no_card():
    first, second = (make_scene("hint", seed=0, split="train", index=i, look=LOOK).cards[0] for i in range(2))
    first = dataclasses.replace(first, colour="red", hint="blue")
    second = dataclasses.replace(second, colour="blue", hint="white")
    assert follow((second, first)) == (first, second)
