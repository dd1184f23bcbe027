"""What is hidden: pictures with questions, from the paper's files or from the made-up world.

In: a JSON file and a folder of pictures, or a seed. Out: `Needle`s; one with several pictures is a chain of hints.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.image import pad_square, read_image, resize
from data_pipeline.world import draw
from data_pipeline.world.questions import TAIL, THINK, paper_chain, paper_needle, told_way
from data_pipeline.world.scene import COLOURS, SHAPES, Card
from hico_jax.evals.bench import annotations
from hico_jax.shapes import UInt8, ndarray


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question about a needle, by the name its score goes under."""

    name: str
    question: str
    answer: str
    way: str = ""  # of a chain, where it is known: its cards and the last one's content, see `questions.told_way`


@dataclasses.dataclass(frozen=True)
class Needle:
    """Pictures in the order in which they stand in the film, and what is asked about them."""

    id: str
    pictures: tuple[UInt8[ndarray, "height width 3"], ...]
    asked: tuple[Asked, ...]


def read(path: pathlib.Path, images: pathlib.Path, px: int, hops: bool) -> list[Needle]:
    """Needles of a file in the paper's format, its pictures padded to squares and resized.

    Single-hop records have `image`, `question`, `answer`; multi-hop ones `images`, and both questions with a 1 and a 2.
    `way`, which the paper's files lack, is what `questions.told_way` says of a chain.

    Raises:
      ValueError: a field or a picture is missing; the record is named.
    """
    found = []
    for place, record in enumerate(annotations.load(path)):
        try:
            if not isinstance(record, dict):
                raise annotations.Fault(f"it is a {type(record).__name__}, not a record")
            names = annotations.texts(record, "images") if hops else (annotations.text(record, "image"),)
            way = annotations.text(record, "way") if record.get("way") else ""
            if way and not re.fullmatch(r"[^:,]+(,[^:,]+)+:[^:]+", way):
                raise annotations.Fault(f"its way is {way!r}; it must be like 'red, blue: blue circle'")
            marks = (("caption", "1"), ("question", "2")) if hops else (("question", ""),)
            asked = tuple(
                Asked(
                    name, annotations.text(record, f"question{mark}"), annotations.text(record, f"answer{mark}"), way
                )
                for name, mark in marks
            )  # fmt: skip
        except annotations.Fault as fault:
            raise ValueError(f"{path}[{place}]: {fault}") from None
        pictures = tuple(picture(images / name, px) for name in names)
        found.append(Needle(str(record.get("id", place)), pictures, asked))
    return found


def picture(path: pathlib.Path, px: int) -> UInt8[ndarray, "px px 3"]:
    """One picture as the paper's script prepares it: padded to a square of the mean colour, then resized."""
    return resize(np.asarray(pad_square(read_image(path))), px, px)


def world(number: int, px: int, seed: int, *, letters: bool = False) -> list[Needle]:
    """Cards of the made-up world, one question each: its colour, then the shape on the next. Pairs occur in training.

    `letters` asks as the paper does, with four options and a letter for an answer.
    """
    found = []
    for i in range(number):
        rng = np.random.default_rng((seed, i))
        colour, shape = _pair(rng, avoid=())
        if i % 2 == 0:
            asked = ("colour", "What colour is the card?", colour, tuple(COLOURS))
        else:
            asked = ("shape", "What shape is on the card?", shape, SHAPES)
        name, question, answer, allowed = asked
        if letters:
            question, answer = paper_needle(question, answer, allowed, rng)
        found.append(
            Needle(f"world{i}", (draw.still(Card(shape, colour, 0.0, 4.0), px),), (Asked(name, question, answer),))
        )
    return found


def world_chains(number: int, hops: int, px: int, seed: int, *, decoys: int = 0) -> list[Needle]:
    """Chains of cards: each has the colour of the next written on it; the last has none. Shuffled in the film.

    Both questions of the paper: which caption fits the last card, and what is on it; four options each. In a chain as
    the paper makes them the last card is the only one without a hint, and can be found without following any.
    `decoys` more cards are a chain of their own, so that this does not help.

    Raises:
      ValueError: more cards than colours.
    """
    if hops < 2 or hops + decoys > len(COLOURS):
        raise ValueError(
            f"a chain of the made-up world has 2 to {len(COLOURS)} cards, decoys included, not {hops + decoys}"
        )
    found = []
    for i in range(number):
        rng = np.random.default_rng((seed, i))
        pairs: list[tuple[str, str]] = []
        for _ in range(hops + decoys):
            pairs.append(_pair(rng, avoid=[colour for colour, _ in pairs]))
        hints = [colour for colour, _ in pairs[1:]] + [""]
        hints[hops - 1] = ""
        cards = [
            Card(shape, colour, 0.0, 4.0, hint=hint) for (colour, shape), hint in zip(pairs, hints, strict=True)
        ]  # fmt: skip
        pictures = [draw.still(card, px) for card in cards]
        order = rng.permutation(len(cards))
        caption, last = paper_chain(cards[:hops], rng, cards[hops:])
        way = told_way(cards[:hops])
        asked = Asked("caption", *caption, way), Asked("question", *last, way)
        found.append(Needle(f"chain{i}", tuple(pictures[j] for j in order), asked))
    return found


def thoughtful(asked: Asked) -> Asked:
    """The same question, to be answered with the way to the answer first."""
    return dataclasses.replace(asked, question=asked.question.removesuffix(TAIL) + THINK)


def _pair(rng: np.random.Generator, avoid: Sequence[str]) -> tuple[str, str]:
    """A colour and a shape that training shows together."""
    from data_pipeline.world.recipes import held_out

    allowed = [(c, s) for c in COLOURS for s in SHAPES if c not in avoid and not held_out(c, s)]
    return allowed[int(rng.integers(len(allowed)))]


def dump(needles: Sequence[Needle], folder: pathlib.Path) -> pathlib.Path:
    """Write needles in the paper's format, pictures beside the file; for other programs to read."""
    records = []
    for needle in needles:
        names = []
        for i, pixels in enumerate(needle.pictures):
            names.append(f"{needle.id}_{i}.png")
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / names[-1])
        record: dict[str, Any] = {"id": needle.id}
        record |= {"images": names} if len(names) > 1 else {"image": names[0]}
        for mark, asked in zip(("1", "2") if len(needle.asked) > 1 else ("",), needle.asked, strict=True):
            record |= {f"question{mark}": asked.question, f"answer{mark}": asked.answer}
            record |= {"way": asked.way} if asked.way else {}
        records.append(record)
    path = folder / "needles.json"
    path.write_text(json.dumps(records, indent=1))
    return path
