"""Every needle at every depth of every length: trials that a stopped run need not repeat, and cells to draw.

In: a model, a haystack, needles. Out: one JSON line a question, and a table of cells.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hico_jax.evals import journal
from hico_jax.evals.bench.scores import Score, share
from hico_jax.evals.niah import haystack
from hico_jax.evals.niah.haystack import Haystack
from hico_jax.evals.niah.needles import Needle
from hico_jax.evals.niah.probe import Probe

SCORINGS = ("forced", "generated")
CONTROL = "no needle"  # the same questions about the film alone: what guessing scores
Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried. A chain of needles has no depth: it spans the film."""

    frames: tuple[int, ...]
    depths: tuple[float, ...]
    insertions: tuple[str, ...] = haystack.INSERTIONS
    chains: bool = False

    @property
    def places(self) -> tuple[float | None, ...]:
        return (None,) if self.chains else self.depths

    def kept(self, needles: Sequence[Needle], frames_per_clip: int) -> set[int]:
        """Film frames whose pixels some trial takes."""
        if "pixel" not in self.insertions:
            return set()
        counts = {len(needle.pictures) for needle in needles}
        found: set[int] = set()
        shifts = range(frames_per_clip)
        for frames, depth, pictures, shift in itertools.product(self.frames, self.places, counts, shifts):
            found |= haystack.needed(frames, haystack.places(frames, depth, pictures, shift), frames_per_clip)
        return found

    def cells(self) -> Iterator[tuple[str, int, float | None]]:
        """(insertion, frames, depth), short films first; the control of each length comes before its trials."""
        for frames in self.frames:
            yield CONTROL, frames, None
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
    model, geometry = probe.model, probe.model.config.geometry()
    total = len(list(grid.cells())) * sum(len(needle.asked) for needle in needles)
    with journal.Appending(folder / "trials.0.jsonl") as file:
        lines = {line["id"]: line for line in journal.read(folder, "trials")}
        for number, needle in enumerate(needles):
            pictures = needle.pictures
            alone = haystack.alone(model, pictures)
            for insertion, frames, depth in grid.cells():
                names = [f"{insertion}/{frames}/{depth}/{needle.id}/{asked.name}" for asked in needle.asked]
                if all(name in lines for name in names):
                    continue
                where: list[int] = []
                shift = number % geometry.frames_per_clip if insertion == "pixel" else 0
                if insertion != CONTROL:
                    where = haystack.places(frames, depth, len(pictures), shift)
                if insertion != "pixel":
                    trial = haystack.at_features(hay, alone, frames, where, geometry)
                else:
                    trial = haystack.at_pixels(model, hay, pictures, frames, where)
                for name, asked in zip(names, needle.asked, strict=True):
                    if name in lines:
                        continue
                    found = probe.ask(hay, trial, asked)
                    lines[name] = {
                        "id": name, "insertion": insertion, "frames": frames, "depth": depth, "needle": needle.id,
                        "asked": asked.name, "before_frame": where, "question": asked.question,
                        "expected": asked.answer,
                        **dataclasses.asdict(found),
                    }  # fmt: skip
                    journal.add(file, lines[name])
                    tick(len(lines), total)
    return list(lines.values())


def table(lines: Sequence[Line], grid: Grid, insertion: str, scoring: str) -> list[list[float | None]]:
    """Shares by depth (rows) and frames (columns)."""
    mine = [line for line in lines if line["insertion"] == insertion]
    return [
        [share([x[scoring] for x in mine if x["frames"] == f and x["depth"] == d])["share"] for f in grid.frames]
        for d in grid.places
    ]  # fmt: skip


def totals(lines: Sequence[Line], grid: Grid) -> dict[str, dict[str, Score]]:
    """By insertion and scoring: all trials, and the control. Cells are equally large, so this is their mean too."""
    return {
        insertion: {s: share([x[s] for x in lines if x["insertion"] == insertion]) for s in SCORINGS}
        for insertion in (*grid.insertions, CONTROL)
    }


def control(lines: Sequence[Line], grid: Grid) -> list[dict[str, Any]]:
    """The control by length, beside the trials of that length."""
    return [
        {"frames": f, **{i: share([x["forced"] for x in lines if (x["insertion"], x["frames"]) == (i, f)])
                         for i in (*grid.insertions, CONTROL)}}
        for f in grid.frames
    ]  # fmt: skip


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
                "mean": sum(a + b for a, b in pairs) / (2 * len(pairs)) if pairs else None, "both": share(both),
                "only_caption": sum(a and not b for a, b in pairs),
                "only_question": sum(b and not a for a, b in pairs),
            }  # fmt: skip
        found.setdefault(insertion, []).append(row)
    return found
