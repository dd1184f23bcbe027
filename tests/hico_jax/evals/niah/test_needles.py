"""Needles from the paper's files and from the made-up world."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from data_pipeline.world import draw, questions
from data_pipeline.world.questions import TAIL, THINK
from data_pipeline.world.scene import COLOURS, SHAPES, Card
from hico_jax.evals.niah import needles


def test_the_papers_files(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "one.json").write_text(json.dumps([{"question": "Q (", "answer": "A", "image": "a.jpg", "id": 3}]))
    (found,) = needles.read(tmp_path / "one.json", tmp_path, 32, hops=False)
    assert (found.id, [(a.name, a.question, a.answer) for a in found.asked]) == ("3", [("question", "Q (", "A")])
    (shown,) = found.pictures
    assert shown.shape == (32, 32, 3)
    assert abs(int(shown[0, 0, 0]) - 123) < 4  # padded to a square of the mean colour
    record = {"images": ["a.jpg", "b.jpg"], "question1": "C", "answer1": "B", "question2": "Q", "answer2": "D"}
    (tmp_path / "many.json").write_text(json.dumps([record]))
    (chain,) = needles.read(tmp_path / "many.json", tmp_path, 32, hops=True)
    assert len(chain.pictures) == 2
    assert [(a.name, a.answer) for a in chain.asked] == [("caption", "B"), ("question", "D")]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"answer": "A", "image": "a.jpg"}, "[0]: its field 'question' is missing"), (3, "it is a int, not a record"),
        ({"question": "q", "answer": "A", "image": "gone.jpg"}, "gone.jpg"),
        ({"question": "q", "answer": "A", "image": "a.jpg", "way": "red"}, "its way is 'red'; it must be like"),
    ],
)  # fmt: skip
def test_faulty_files_are_named(tmp_path: pathlib.Path, record: object, words: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "n.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=re.escape(words)):
        needles.read(tmp_path / "n.json", tmp_path, 32, hops=False)


def test_the_worlds_needles_repeat_and_differ() -> None:
    found, again, other = needles.world(4, 32, 5), needles.world(4, 32, 5), needles.world(4, 32, 6)
    assert [n.asked for n in found] == [n.asked for n in again]
    assert [n.asked for n in found] != [n.asked for n in other]
    assert {n.asked[0].name for n in found} == {"colour", "shape"}
    assert all(n.asked[0].answer in (*COLOURS, *SHAPES) for n in found)
    (lettered, *_) = needles.world(1, 32, 5, letters=True)
    assert lettered.asked[0].question.endswith(questions.TAIL)
    letter = "ABCD".index(lettered.asked[0].answer)
    options = re.findall(r"\([A-D]\) (\w+)", lettered.asked[0].question)
    assert options[letter] == found[0].asked[0].answer


def test_a_chain_leads_from_card_to_card() -> None:
    (chain,) = needles.world_chains(1, 5, 64, 0)
    assert len(chain.pictures) == 5
    caption, question = chain.asked
    start = re.search(r"Find the frame of a (\w+) card", caption.question)
    assert start is not None
    assert start.group(1) in COLOURS
    options = re.findall(r"\([A-D]\) a (\w+) (\w+)", caption.question)
    colour, shape = options["ABCD".index(caption.answer)]
    assert colour != start.group(1)
    assert re.findall(r"\([A-D]\) (\w+)", question.question)["ABCD".index(question.answer)] == shape
    plain = [draw.still(Card(s, c, 0.0, 4.0), 64) for c in COLOURS for s in SHAPES]
    same = [any(np.array_equal(p, q) for q in plain) for p in chain.pictures]
    assert sum(same) == 1  # only the last card has no hint
    with pytest.raises(ValueError, match="2 to 8 cards, decoys included, not 9"):
        needles.world_chains(1, 9, 64, 0)


def test_decoys_hide_which_card_is_last() -> None:
    plain = [draw.still(Card(s, c, 0.0, 4.0), 64) for c in COLOURS for s in SHAPES]
    for needle in needles.world_chains(4, 5, 64, 0, decoys=2):
        assert len(needle.pictures) == 7
        assert sum(any(np.array_equal(p, q) for q in plain) for p in needle.pictures) == 2
    with pytest.raises(ValueError, match="decoys included, not 9"):
        needles.world_chains(1, 6, 64, 0, decoys=3)


def test_a_thoughtful_question_keeps_its_options_and_answer() -> None:
    caption, _ = needles.world_chains(1, 5, 64, 0)[0].asked
    asked = needles.thoughtful(caption)
    assert asked.question == caption.question.removesuffix(TAIL) + THINK
    assert (asked.name, asked.answer) == (caption.name, caption.answer)


def test_written_needles_are_read_again(tmp_path: pathlib.Path) -> None:
    chains = needles.world_chains(2, 5, 32, 1)
    path = needles.dump(chains, tmp_path)
    found = needles.read(path, tmp_path / "images", 32, hops=True)
    assert [n.asked for n in found] == [n.asked for n in chains]
    for ours, theirs in zip(found, chains, strict=True):
        np.testing.assert_array_equal(np.stack(ours.pictures), np.stack(theirs.pictures))
