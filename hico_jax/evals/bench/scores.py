"""Answers to scores: the reference's sums, the strict ones, micro and macro, each with a 95 % interval.

In: one dict for each question, as `runner.py` keeps them. Out: plain JSON values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hico_jax.evals.bench.grounding import THRESHOLDS
from hico_jax.evals.bench.tasks import Benchmark
from hico_jax.evals.needle import interval

RULES = ("reference", "strict")
Line = Mapping[str, Any]
Score = dict[str, Any]  # share, low, high, number


def share(scores: Sequence[float]) -> Score:
    """Right answers among all, with a Wilson interval; None where there are none."""
    right, number = float(sum(scores)), len(scores)
    low, high = interval(right, number)  # type: ignore[arg-type]
    return {"share": right / number if number else None, "low": low, "high": high, "number": number}


def mean(scores: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Score:
    """The mean of numbers that are not 0 or 1, with a bootstrap interval (2,000 draws, seeded)."""
    if not scores:
        return {"share": None, "low": 0.0, "high": 1.0, "number": 0}
    values = np.asarray(scores, np.float64)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"share": float(values.mean()), "low": float(low), "high": float(high), "number": len(scores)}


def macro(groups: Mapping[str, Sequence[float]], *, seed: int = 0, draws: int = 2000) -> Score:
    """The mean over groups of their means; questions are drawn again inside their groups for the interval."""
    arrays = [np.asarray(g, np.float64) for g in groups.values() if len(g)]
    if not arrays:
        return {"share": None, "low": 0.0, "high": 1.0, "number": 0}
    rng = np.random.default_rng(seed)
    drawn = [np.mean([a[rng.integers(len(a), size=len(a))].mean() for a in arrays]) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    middle = float(np.mean([a.mean() for a in arrays]))
    return {"share": middle, "low": float(low), "high": float(high), "number": sum(map(len, arrays))}


def counted(lines: Iterable[Line], rule: str, benchmark: Benchmark) -> list[Line]:
    """The lines in a rule's denominator: strict counts all, the reference forgets some (`matchers.QUIRKS`)."""
    lines = list(lines)
    if rule == "strict":
        return lines
    if benchmark.drops_empty:
        return [line for line in lines if line["status"] != "empty"]
    if benchmark.span:  # a submission is a dict: the last answer to the same question stands
        return list({line["key"] or line["id"]: line for line in lines}.values())
    return lines


def summarize(benchmark: Benchmark, lines: Sequence[Line]) -> dict[str, Any]:
    """Everything the report prints about one benchmark."""
    found: dict[str, Any] = {"benchmark": benchmark.name, "number": len(lines), "counts": counts(lines)}
    for rule in RULES:
        found[rule] = _rule(benchmark, lines, rule)
    keys = sorted({key for line in lines for key in line["groups"]})
    found["by"] = {
        key: {
            value: {rule: _points(benchmark, [x for x in lines if x["groups"].get(key) == value], rule)[0]
                    for rule in RULES}
            for value in sorted({line["groups"][key] for line in lines if key in line["groups"]})
        }
        for key in keys
    }  # fmt: skip
    return found


def _points(benchmark: Benchmark, lines: Sequence[Line], rule: str) -> tuple[Score, list[float]]:
    scores = [line[rule]["score"] for line in counted(lines, rule, benchmark)]
    return (mean(scores) if benchmark.span else share(scores)), scores


def _rule(benchmark: Benchmark, lines: Sequence[Line], rule: str) -> dict[str, Any]:
    score, points = _points(benchmark, lines, rule)
    if benchmark.span:
        recalls = {f"R@{t}": share([float(p >= t) for p in points]) for t in THRESHOLDS}
        return {"score": score, "name": "mIoU", **recalls}
    tasks = sorted({line["groups"]["task"] for line in lines})
    groups = {t: _points(benchmark, [x for x in lines if x["groups"]["task"] == t], rule)[1] for t in tasks}
    if rule == "reference" and benchmark.drops_empty:
        score = _weighted(score, groups, {t: sum(x["groups"]["task"] == t for x in lines) for t in tasks})
    if rule == "reference" and benchmark.name == "longvideobench" and score["share"] is not None:
        score["share"] = round(score["share"], 5)
    return {"score": score, "name": "accuracy", "macro": macro(groups)}


def _weighted(score: Score, groups: Mapping[str, Sequence[float]], sizes: Mapping[str, int]) -> Score:
    """The harness's sum: tasks without their empty answers, weighted by their sizes with them."""
    total = sum(sizes.values())
    value = sum(sizes[t] * (sum(g) / len(g) if g else 0.0) for t, g in groups.items()) / max(total, 1)
    low, high = interval(value * score["number"], score["number"])  # type: ignore[arg-type]
    return {"share": value, "low": low, "high": high, "number": score["number"]}


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """How the questions went: each status, and what was out of the ordinary."""
    found: dict[str, int] = {}
    for line in lines:
        found[line["status"]] = found.get(line["status"], 0) + 1
    found["noted"] = sum(bool(line["note"]) for line in lines)
    found["guessed"] = sum(line["reference"]["note"] == "guessed" for line in lines)
    found["not understood (strict)"] = sum(x["strict"]["parsed"] is None and x["status"] == "answered" for x in lines)
    return found
