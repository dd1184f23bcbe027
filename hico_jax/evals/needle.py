"""A needle in a video haystack, at pixel level: films of several lengths with a card at several depths.

Each film is encoded to mp4 with the card at its frames, read back, watched whole and asked about. Nothing is
spliced at feature level. Controls ask the same questions with the card left out, without the film, or with the
frames shuffled.

In: a `Viewer`. Out: one `Trial` for each answer; `grid` and `share` sum them up.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipeline.world import films
from data_pipeline.world.questions import Question
from hico_jax.film import Film, Viewer
from hico_jax.generate import GenerationConfig

MAX_NEW_TOKENS = 6  # answers are single words


@dataclasses.dataclass(frozen=True)
class Trial:
    """One question about one film, and what was answered."""

    seconds: float  # of the film
    frames: int  # seen
    depth: float  # 0: the card is at the very start, 1: at the very end
    kind: str
    question: str
    expected: str
    answer: str
    visual_tokens: int
    answer_s: float

    @property
    def correct(self) -> bool:
        return self.answer == self.expected


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A film with its card, ready to be watched."""

    film: films.Film
    seconds: float
    depth: float


def hide(
    folder: pathlib.Path,
    seconds: float,
    depth: float,
    seed: int,
    *,
    cards: int = 1,
    blank: bool = False,
    split: str = "val",
) -> Hidden:
    """Write one film with its card at `depth` (`cards` of them anywhere); the same arguments write the same film.

    No film of "val" or "test" shares a scene with training; a "test" card also has a pair of colour and shape that
    training never shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    placed = films.needles(seed, seconds, count=cards, depth=depth if cards == 1 else None, split=split)
    name = f"{split}_{seconds:g}s_{cards}cards_{depth:.2f}_{seed}{'_blank' if blank else ''}.mp4"
    film = films.haystack(folder / name, num_seconds=seconds, seed=seed, needles=placed, blank=blank, split=split)
    return Hidden(film, seconds, depth)


def ask(
    viewer: Viewer, hidden: Hidden, film: Film | None, *, kinds: Sequence[str] = ("card_colour", "card_shape")
) -> Iterator[Trial]:
    """Every question of these kinds about a watched film, in one batch. None asks without the film."""
    asked: list[Question] = [q for q in hidden.film.questions if q.kind.startswith(tuple(kinds))]
    if not asked:
        return
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, eos=viewer.tokenizer.eos_ids)
    answers = viewer.ask_many([film] * len(asked), [q.text for q in asked], config=config)
    for question, answer in zip(asked, answers, strict=True):
        yield Trial(
            seconds=hidden.seconds, frames=0 if film is None else film.num_frames, depth=hidden.depth,
            kind=question.kind, question=question.text, expected=question.answer, answer=answer.text,
            visual_tokens=answer.visual_tokens, answer_s=answer.seconds,
        )  # fmt: skip


def haystack(
    viewer: Viewer,
    folder: pathlib.Path,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int,
    seed: int = 0,
    split: str = "val",
    done: Callable[[Sequence[Trial]], None] | None = None,
) -> list[Trial]:
    """The grid: `repeats` films for every length in seconds and every depth; all questions about each."""
    trials: list[Trial] = []
    for length in lengths:
        for place, depth in enumerate(depths):
            for i in range(repeats):
                hidden = hide(folder, length, depth, seed + (length * len(depths) + place) * repeats + i, split=split)
                trials += ask(viewer, hidden, viewer.watch(hidden.film.path))
                pathlib.Path(hidden.film.path).unlink()  # a grid of films would fill the disk
                if done is not None:
                    done(trials)
    return trials


def share(trials: Sequence[Trial]) -> float | None:
    """Correct answers among all; None when nothing was asked."""
    return sum(t.correct for t in trials) / len(trials) if trials else None


def grid(trials: Sequence[Trial], lengths: Sequence[int], depths: Sequence[float]) -> list[list[float | None]]:
    """`share` by depth (rows) and length (columns)."""
    return [[share([t for t in trials if t.seconds == s and t.depth == d]) for s in lengths] for d in depths]


def interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share: what the true one may be, given so few trials.

    Example:
      >>> tuple(round(x, 2) for x in interval(38, 40))
      (0.84, 0.99)
    """
    if total == 0:
        return 0.0, 1.0
    z, p = 1.96, correct / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def shuffled(count: int, seed: int) -> np.ndarray:
    """An order of frames that keeps none of the film's own."""
    return np.random.default_rng(seed).permutation(count)
