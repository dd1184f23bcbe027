"""Needle in a video haystack, at pixel level: one long film, cards at arbitrary frames, questions about them.

The haystack under a card is drawn whether or not the card is, so the blank control differs from the film in the card's
frames only.

In: a length, a seed, needles. Out: an mp4 and its questions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from data_pipeline.video import write_video
from data_pipeline.world.draw import render
from data_pipeline.world.questions import KINDS, Question, ask_all, multiple_choice
from data_pipeline.world.recipes import Dice, Look
from data_pipeline.world.scene import Card, Scene

# Scene indices of films, far above those of any world's videos.
_FILMS = 1 << 31


def write_scene(path: str | os.PathLike[str], scene: Scene) -> None:
    """Draw and encode a scene, frame by frame, so that memory does not grow with its length."""
    write_video(path, render(scene), scene.fps)


@dataclasses.dataclass(frozen=True)
class Needle:
    """A card hidden in the film from `start_s` on."""

    content: str  # a shape, or the text written on the card
    colour: str
    start_s: float
    seconds: float = 4.0


@dataclasses.dataclass(frozen=True)
class Film:
    """A written film: its ground truth and its questions (also with lettered options, in the same order)."""

    path: str
    scene: Scene  # with the cards, even where the film leaves them out
    blank: bool
    questions: tuple[Question, ...]
    choices: tuple[Question, ...]


def needles(
    seed: int,
    num_seconds: float,
    *,
    count: int = 1,
    depth: float | None = None,
    seconds: float = 4.0,
    fps: float = 1.0,
    contents: Sequence[str] | None = None,
    split: str = "test",
) -> tuple[Needle, ...]:
    """Random needles of different colours; split "test" takes held-out pairs, "val" pairs that training shows.

    A single needle sits at `depth` (0 is the first frame, 1 ends with the last one), or anywhere. Several needles share
    the film out between them and sit anywhere in their part.

    Raises:
      ValueError: the film is too short for the needles, or a depth is given for several.
    """
    if num_seconds < count * seconds:
        raise ValueError(f"{count} needles of {seconds} s do not fit {num_seconds} s; make the film longer")
    if depth is not None and (count != 1 or not 0 <= depth <= 1):
        raise ValueError(f"depth is {depth} for {count} needles; give a number from 0 to 1 for one needle")
    dice = Dice(seed, split, _FILMS + 1, Look(fps=fps))
    part = num_seconds / count
    out: list[Needle] = []
    used: set[str] = set()
    for i in range(count):
        colour, content = dice.pair(contents, avoid=used)
        used.add(colour)
        place = float(dice.rng.uniform()) if depth is None else depth
        start = round((i * part + place * (part - seconds)) * fps) / fps
        start = max(start, out[-1].start_s + seconds if out else 0.0)
        out.append(Needle(content, colour, min(start, num_seconds - seconds), seconds))
    return tuple(out)


def haystack(
    path: str | os.PathLike[str],
    *,
    num_seconds: float,
    seed: int,
    needles: Sequence[Needle] = (),
    fps: float = 1.0,
    px: int = 96,
    blank: bool = False,
    split: str = "test",
) -> Film:
    """Write one long film with needles in it; `blank` leaves them out but keeps the questions, as a control.

    Raises:
      ValueError: needles that overlap or lie outside the film.
    """
    dice = Dice(seed, split, _FILMS, Look(px=px, fps=fps))
    placed = [Card(n.content, n.colour, n.start_s, n.start_s + n.seconds) for n in needles]
    placed.sort(key=lambda card: card.start_s)
    scene = dice.scene(float(num_seconds), grounds=dice.cuts(float(num_seconds), (8.0, 24.0)), cards=placed)
    shown = dataclasses.replace(scene, cards=()) if blank else scene
    write_scene(path, shown)
    questions = tuple(q for q in ask_all(scene) if q.kind != "caption")
    choices = tuple(multiple_choice(q, np.random.default_rng((dice.seed, i))) for i, q in enumerate(questions))
    assert all(q.answer in KINDS[q.kind].answers for q in questions)
    return Film(os.fspath(path), scene, blank, questions, choices)
