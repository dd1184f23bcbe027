"""Every needle at every depth of every length: trials that a stopped run need not repeat, and cells to draw.

In: a model, a haystack, needles. Out: one JSON line a question, and a table of cells.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hico_jax.evals import journal, paired
from hico_jax.evals.bench.scores import Score, mean, share
from hico_jax.evals.niah import haystack
from hico_jax.evals.niah.haystack import Haystack, Trial
from hico_jax.evals.niah.needles import Needle
from hico_jax.evals.niah.probe import Probe

SCORINGS = ("forced", "generated")
CONTROL = "no needle"  # the same questions about the film alone: what guessing scores
# More controls, once for each question and length at a depth that goes round with the needles: a grey picture in the
# needle's place; the film and the needle's frames in an order of no meaning; the needle there, but every visual token
# dropped after the second layer; no film at all (which has no length).
BLANK, SHUFFLED, DROPPED, BLIND = "blank needle", "shuffled", "dropped", "blind"
CONTROLS = (CONTROL, BLANK, SHUFFLED, DROPPED, BLIND)
GREY = 128
Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried. A chain of needles has no depth: it spans the film."""

    frames: tuple[int, ...]
    depths: tuple[float, ...]
    insertions: tuple[str, ...] = haystack.INSERTIONS
    chains: bool = False
    controls: tuple[str, ...] = (CONTROL,)
    seed: int = 0

    @property
    def level(self) -> str:
        """The insertion that controls are compared with."""
        return "pixel" if "pixel" in self.insertions else self.insertions[0]

    def depth(self, number: int) -> float | None:
        """Where controls put this needle."""
        return self.places[number % len(self.places)]

    @property
    def places(self) -> tuple[float | None, ...]:
        return (None,) if self.chains else self.depths

    def kept(self, needles: Sequence[Needle], frames_per_clip: int) -> set[int] | None:
        """Film frames whose pixels some trial takes; None is all of them."""
        if SHUFFLED in self.controls:
            return None
        if "pixel" not in self.insertions:
            return set()
        counts = {len(needle.pictures) for needle in needles}
        found: set[int] = set()
        shifts = range(frames_per_clip)
        for frames, depth, pictures, shift in itertools.product(self.frames, self.places, counts, shifts):
            found |= haystack.needed(frames, haystack.places(frames, depth, pictures, shift), frames_per_clip)
        return found

    def cells(self) -> Iterator[tuple[str, int, float | None]]:
        """(insertion, frames, depth), short films first; the controls of each length come before its trials."""
        if BLIND in self.controls:
            yield BLIND, 0, None
        for frames in self.frames:
            yield from ((c, frames, None) for c in self.controls if c != BLIND)
            yield from ((i, frames, d) for i in self.insertions for d in self.places)


def run(
    probe: Probe,
    hay: Haystack,
    needles: Sequence[Needle],
    grid: Grid,
    folder: pathlib.Path,
    *,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """All trials that the folder does not hold yet; returns all."""
    total = len(list(grid.cells())) * sum(len(needle.asked) for needle in needles)
    with journal.Appending(folder / "trials.0.jsonl") as file:
        lines = {line["id"]: line for line in journal.read(folder, "trials")}
        trials = _Trials(probe, hay, grid, needles)
        for insertion, frames, depth, number in _order(grid, len(needles)):
            needle = needles[number]
            names = [f"{insertion}/{frames}/{depth}/{needle.id}/{asked.name}" for asked in needle.asked]
            if all(name in lines for name in names):
                continue
            asker, seen, trial, place, where = trials.make(insertion, frames, depth, number)
            for name, asked in zip(names, needle.asked, strict=True):
                if name in lines:
                    continue
                found = asker.ask(seen, trial, asked)
                lines[name] = {
                    "id": name, "insertion": insertion, "frames": frames, "depth": place, "needle": needle.id,
                    "asked": asked.name, "before_frame": where, "question": asked.question,
                    "expected": asked.answer,
                    **dataclasses.asdict(found),
                }  # fmt: skip
                journal.add(file, lines[name])
                tick(len(lines), total)
    return list(lines.values())


def _order(grid: Grid, needles: int) -> Iterator[tuple[str, int, float | None, int]]:
    """Cells needle by needle; those of shuffled films last and length by length, so that one such film is held."""
    cells = list(grid.cells())
    yield from ((*cell, n) for n in range(needles) for cell in cells if cell[0] != SHUFFLED)
    yield from ((*cell, n) for cell in cells if cell[0] == SHUFFLED for n in range(needles))


class _Trials:
    """Makes trials; holds what the next one may need again."""

    def __init__(self, probe: Probe, hay: Haystack, grid: Grid, needles: Sequence[Needle]) -> None:
        self.probe, self.hay, self.grid, self.needles = probe, hay, grid, needles
        self.dropped = probe.dropped() if DROPPED in grid.controls else probe
        self.grey = np.full((probe.model.config.geometry().image_px,) * 2 + (3,), GREY, np.uint8)
        self.alone: tuple[Any, Any] = None, None
        self.mixed: tuple[Any, Any] = None, None

    def make(
        self, insertion: str, frames: int, depth: float | None, number: int
    ) -> tuple[Probe, Haystack, Trial, float | None, list[int]]:
        """Who is asked about what: the probe, a haystack and a trial of it, the needle's depth and where it stands."""
        model, hay, geometry = self.probe.model, self.hay, self.probe.model.config.geometry()
        pictures = self.needles[number].pictures
        if insertion in (CONTROL, BLIND):
            return self.probe, hay, haystack.at_features(hay, hay.tokens[:, :1], frames, [], geometry), None, []
        if insertion == SHUFFLED:
            key = frames, len(pictures)
            if self.mixed[0] != key:
                self.mixed = None, None  # let the last one go first
                rng = np.random.default_rng((self.grid.seed, *key))
                self.mixed = key, haystack.mixed(model, hay, *key, rng)
            film = self.mixed[1]
            return self.probe, film.hay, haystack.at_random(model, film, pictures), None, []
        level = self.grid.level if insertion in CONTROLS else insertion
        place = self.grid.depth(number) if insertion in CONTROLS else depth
        asker = self.dropped if insertion == DROPPED else self.probe
        if insertion == BLANK:
            pictures = (self.grey,) * len(pictures)
        shift = number % geometry.frames_per_clip if level == "pixel" else 0
        where = haystack.places(frames, place, len(pictures), shift)
        if level == "pixel":
            return asker, hay, haystack.at_pixels(model, hay, pictures, frames, where), place, where
        key = number, insertion == BLANK
        if self.alone[0] != key:
            self.alone = key, haystack.alone(model, pictures)
        return asker, hay, haystack.at_features(hay, self.alone[1], frames, where, geometry), place, where


def table(lines: Sequence[Line], grid: Grid, insertion: str, scoring: str) -> list[list[float | None]]:
    """Shares by depth (rows) and frames (columns)."""
    return [[cell["share"] for cell in row] for row in scores(lines, grid, insertion, scoring)]


def scores(lines: Sequence[Line], grid: Grid, insertion: str, scoring: str) -> list[list[Score]]:
    """`table` with the interval of each cell."""
    mine = [line for line in lines if line["insertion"] == insertion]
    return [
        [share([x[scoring] for x in mine if x["frames"] == f and x["depth"] == d]) for f in grid.frames]
        for d in grid.places
    ]  # fmt: skip


def totals(lines: Sequence[Line], grid: Grid) -> dict[str, dict[str, Score]]:
    """By insertion and scoring: all trials, and the control. Cells are equally large, so this is their mean too."""
    return {
        insertion: {s: share([x[s] for x in lines if x["insertion"] == insertion]) for s in SCORINGS}
        for insertion in (*grid.insertions, *grid.controls)
    }


def control(lines: Sequence[Line], grid: Grid) -> list[dict[str, Any]]:
    """The controls by length, beside the trials of that length. The blind one has no length and stands beside all."""

    def of(insertion: str, frames: int) -> Score:
        cell = insertion, frames * (insertion != BLIND)
        return share([x["forced"] for x in lines if (x["insertion"], x["frames"]) == cell])

    names = (*grid.insertions, *grid.controls)
    return [{"frames": f, **{name: of(name, f) for name in names}} for f in grid.frames]


def differences(lines: Sequence[Line], grid: Grid, needles: Sequence[str]) -> dict[str, dict[str, paired.Difference]]:
    """By control and scoring: what the needle scores more, question by question, at the control's length and depth."""
    order = {name: n for n, name in enumerate(needles)}
    key = lambda x, frames: (x["needle"], x["asked"], frames)
    there = {
        key(x, x["frames"]): x for x in lines
        if x["insertion"] == grid.level and x["depth"] == grid.depth(order[x["needle"]])
    }  # fmt: skip
    found: dict[str, dict[str, paired.Difference]] = {}
    for name in grid.controls:
        mine = {key(x, x["frames"]): x for x in lines if x["insertion"] == name}
        pairs = [(x, mine[k]) for x in there.values() if (k := key(x, x["frames"] * (name != BLIND))) in mine]
        found[name] = {
            s: paired.difference([float(x[s]) for x, _ in pairs], [float(y[s]) for _, y in pairs],
                                 [x["needle"] for x, _ in pairs])
            for s in SCORINGS
        }  # fmt: skip
    return found


def ways(lines: Sequence[Line], grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """Of thoughts about chains whose way is known, by insertion and length: how far they follow, what they end with.

    `followed` is the share of hints followed before the first one missed, `whole` how often none is missed, `named` how
    often the last card is described rightly, `letter` how often the letter after that is the right one.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    cells = [(i, f) for i in (*grid.insertions, *grid.controls) for f in ((0,) if i == BLIND else grid.frames)]
    for cell in cells:
        mine = [x for x in lines if (x["insertion"], x["frames"]) == cell and x.get("followed") is not None]
        if mine:
            found.setdefault(cell[0], []).append({
                "frames": cell[1], "followed": mean([x["followed"] for x in mine]),
                "whole": share([x["followed"] == 1 for x in mine]), "named": share([x["named"] for x in mine]),
                "letter": share([x["generated"] for x in mine]),
            })  # fmt: skip
    return found


def joint(lines: Sequence[Line], grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """Of chains, by insertion and length: caption and question scores, their mean, how often both or one is right."""
    found: dict[str, list[dict[str, Any]]] = {}
    for insertion, frames in itertools.product(grid.insertions, grid.frames):
        mine = [x for x in lines if x["insertion"] == insertion and x["frames"] == frames]
        row: dict[str, Any] = {"frames": frames}
        for scoring in SCORINGS:
            sides = [{x["needle"]: x[scoring] for x in mine if x["asked"] == a} for a in ("caption", "question")]
            pairs = [(sides[0][n], sides[1][n]) for n in sides[0] if n in sides[1]]
            both = [float(a and b) for a, b in pairs]
            row[scoring] = {
                "caption": share([float(a) for a, _ in pairs]), "question": share([float(b) for _, b in pairs]),
                "mean": mean([(a + b) / 2 for a, b in pairs]), "both": share(both),
                "only_caption": sum(a and not b for a, b in pairs),
                "only_question": sum(b and not a for a, b in pairs),
            }  # fmt: skip
        found.setdefault(insertion, []).append(row)
    return found
