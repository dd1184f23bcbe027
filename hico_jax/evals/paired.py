"""Two methods on the same questions: the difference of their scores with an interval that uses the pairing.

In: two answers to each question, and what each question is about. Out: plain JSON values.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hico_jax.evals.needle import interval

NOTE = (
    "Differences are in points, on the same questions; the interval draws films (or needles) again with all their "
    "questions, and is at least Newcombe's for paired proportions. A star: it excludes zero. No correction for many "
    "comparisons."
)
Difference = dict[str, Any]  # difference, low, high, number, better, worse, films


def difference(
    first: Sequence[float], second: Sequence[float], about: Sequence[Hashable], *, seed: int = 0, draws: int = 4000
) -> Difference:
    """`first` minus `second`, score by score, with a 95 % interval.

    Questions about one film are not independent, so films are drawn again with all their questions (bootstrap). Where
    scores are 0 or 1 the interval is widened to Newcombe's for paired proportions (1998, method 10), which holds
    where few answers differ and a bootstrap is too sure. `better` and `worse` count the answers that differ.

    Raises:
      ValueError: scores that do not pair.
    """
    if not len(first) == len(second) == len(about):
        raise ValueError(f"{len(first)}, {len(second)} scores and {len(about)} films do not pair")
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    found: Difference = {
        "number": len(a), "films": len(set(about)), "better": int((a > b).sum()), "worse": int((a < b).sum())
    }  # fmt: skip
    if not len(a):
        return found | {"difference": None, "low": -1.0, "high": 1.0}
    low, high = _drawn(a - b, about, seed, draws)
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        cells = [int(((a == x) & (b == y)).sum()) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))]
        wide = newcombe(*cells)
        low, high = min(low, wide[0]), max(high, wide[1])
    return found | {"difference": float((a - b).mean()), "low": float(low), "high": float(high)}


def _drawn(values: np.ndarray, about: Sequence[Hashable], seed: int, draws: int) -> tuple[float, float]:
    """Percentiles of the mean when films are drawn again."""
    names = {name: i for i, name in enumerate(dict.fromkeys(about))}
    of = np.asarray([names[name] for name in about])
    sums, sizes = np.bincount(of, values), np.bincount(of)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(names), size=(draws, len(names)))
    low, high = np.percentile(sums[chosen].sum(1) / sizes[chosen].sum(1), [2.5, 97.5])
    return float(low), float(high)


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of a difference of paired proportions (Newcombe 1998, method 10).

    Example:
      >>> tuple(round(x, 4) for x in newcombe(36, 12, 2, 0))
      (0.0569, 0.3404)
    """
    n = both + only_first + only_second + neither
    p, q = (both + only_first) / n, (both + only_second) / n
    (p_low, p_high), (q_low, q_high) = interval(both + only_first, n), interval(both + only_second, n)
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    excess = both * neither - only_first * only_second
    excess = max(excess - n / 2, 0) if excess > 0 else excess
    phi = excess / math.sqrt(product) if product else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    middle = p - q
    return max(-1.0, middle - reach(p - p_low, q_high - q)), min(1.0, middle + reach(q - q_low, p_high - p))


def by(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], *, rule: str = "strict", key: str = "task"
) -> dict[str, Difference]:
    """The difference over the questions that both answered, as lines of `runner.py`: "all", then by group."""
    others = {line["id"]: line for line in second}
    pairs = [(line, others[line["id"]]) for line in first if line["id"] in others]
    groups: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {"all": pairs}
    for name in sorted({line["groups"][key] for line, _ in pairs if key in line["groups"]}):
        groups[name] = [pair for pair in pairs if pair[0]["groups"].get(key) == name]
    return {
        name: difference([x[rule]["score"] for x, _ in found], [y[rule]["score"] for _, y in found],
                         [x["video"] for x, _ in found])
        for name, found in groups.items()
    }  # fmt: skip


def spelled(found: Difference) -> str:
    """A difference in points, with its interval.

    Example:
      >>> spelled({"difference": 0.05, "low": -0.01, "high": 0.11, "number": 100})
      '+5.0 (-1.0 to +11.0)'
    """
    if found["difference"] is None:
        return "–"
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def starred(found: Difference) -> str:
    """`spelled`, with a star where the interval excludes zero."""
    return spelled(found) + (" *" if excludes_zero(found) else "")


def excludes_zero(found: Difference) -> bool:
    """Whether an advantage may be claimed, one way or the other."""
    return found["low"] > 0 or found["high"] < 0
