"""Paired differences against what is known of them: a published example, coverage, and simple cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hico_jax.evals import paired


def test_newcombes_own_example() -> None:
    # Statistics in Medicine 17 (1998), 2635-2650, table II: method 10.
    assert paired.newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    assert paired.newcombe(0, 0, 0, 30)[0] == -paired.newcombe(0, 0, 0, 30)[1] < 0


def test_the_interval_covers_the_truth() -> None:
    """Films of four questions each, answers of one film alike: 95 % of the intervals must hold the true difference."""
    rng, held, trials = np.random.default_rng(0), 0, 150
    about = np.repeat(np.arange(40), 4)
    for trial in range(trials):
        film = np.repeat(rng.uniform(0, 0.6, 40), 4)
        first, second = rng.uniform(size=160) < film + 0.2, rng.uniform(size=160) < film
        found = paired.difference(first.astype(float), second.astype(float), list(about), seed=trial, draws=400)
        held += found["low"] <= 0.2 <= found["high"]
    assert held >= 0.92 * trials
    assert found["films"] == 40


def test_pairing_is_used() -> None:
    """Two methods that differ in one direction on a few questions: the pairing tells them apart."""
    second = np.arange(200) % 2.0
    first = second.copy()
    first[:24:2] = 1.0
    found = paired.difference(first, second, list(range(200)))
    assert (found["difference"], found["better"], found["worse"]) == (pytest.approx(0.06), 12, 0)
    assert paired.excludes_zero(found)
    turned = paired.difference(second, first, list(range(200)))
    assert turned["high"] == pytest.approx(-found["low"], abs=0.01)
    assert paired.spelled(found).startswith("+6.0 (+")


def test_few_answers_that_differ_prove_nothing() -> None:
    first = [1.0, 1.0, 1.0, 1.0] + [0.0] * 60
    found = paired.difference(first, [0.0] * 64, list(range(64)))
    assert found["low"] <= 0.001
    assert not paired.excludes_zero(paired.difference([1.0], [0.0], ["a"]))
    assert not paired.excludes_zero(paired.difference([1.0] * 9, [1.0] * 9, list(range(9))))
    one_film = paired.difference([1.0] * 40 + [0.0] * 40, [0.0] * 80, ["a"] * 40 + ["b"] * 40)
    assert one_film["low"] == 0.0, "forty questions about one film are one film"
    assert not paired.excludes_zero(one_film)


def test_shares_of_overlap_and_nothing_at_all() -> None:
    found = paired.difference([0.5, 0.75], [0.25, 0.5], ["a", "b"])
    assert (found["difference"], found["low"], found["high"]) == (0.25, 0.25, 0.25)
    assert paired.spelled(paired.difference([], [], [])) == "–"
    with pytest.raises(ValueError, match="do not pair"):
        paired.difference([1.0], [], [])


def test_lines_are_paired_by_their_question() -> None:
    def line(name: str, task: str, score: float) -> dict[str, object]:
        return {"id": name, "groups": {"task": task}, "video": name, "strict": {"score": score}}

    first = [line("a", "x", 1.0), line("b", "y", 1.0), line("c", "y", 0.0)]
    second = [line("c", "y", 1.0), line("a", "x", 0.0)]
    found = paired.by(first, second)
    assert list(found) == ["all", "x", "y"]
    assert [found[k]["difference"] for k in found] == [0.0, 1.0, -1.0]
    assert [found[k]["number"] for k in found] == [2, 1, 1]
