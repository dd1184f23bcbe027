"""Sums of scores: as recorded from the reference, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hico_jax.evals.bench import grounding, scores, tasks

MVBENCH, CHARADES = tasks.BENCHMARKS["mvbench"], tasks.BENCHMARKS["charades_sta"]


def line(score: float, *, task: str = "t", status: str = "answered", key: str = "", identity: str = "") -> Any:
    verdict = {"parsed": "A", "score": score, "note": ""}
    return {
        "id": identity or str(np.random.default_rng().integers(1 << 40)), "groups": {"task": task}, "status": status,
        "answer": "A", "note": "", "key": key, "reference": verdict, "strict": verdict,
    }  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", ["mvbench", "mlvu", "lvbench"])
def test_accuracy_as_recorded(golden: Any, name: str) -> None:
    recorded = golden.json(f"H_eval_{name}.json")
    rows = [(c["response"], c["score"]) for c in recorded["process_results"]]
    for case in recorded["aggregate"]:
        given = rows if isinstance(case["results"], str) else [(r["pred_answer"], r["score"]) for r in case["results"]]
        lines = [line(score, status="answered" if text else "empty") for text, score in given]
        found = scores.summarize(tasks.BENCHMARKS[name], lines)["reference"]["score"]["share"]
        assert 100 * (found or 0) == pytest.approx(case["out"], abs=1e-9)


@pytest.mark.parity
def test_other_accuracies_as_recorded(golden: Any) -> None:
    for name, field in (("perceptiontest", "correct"), ("videomme", "correct")):
        recorded = golden.json(f"H_eval_{name}.json")
        lines = [line(float(c[field])) for c in recorded["process_results"]]
        found = scores.summarize(tasks.BENCHMARKS[name], lines)["reference"]["score"]["share"]
        assert found * (100 if name == "videomme" else 1) == pytest.approx(recorded["aggregate"][0]["out"], abs=1e-9)
    recorded = golden.json("H_eval_longvideobench.json")
    kept = [c for c in recorded["process_results"] if not c["random_fallback"]]
    lines = [line(float(c["parsed_pred"] == c["answer"])) for c in kept]
    found = scores.summarize(tasks.BENCHMARKS["longvideobench"], lines)["reference"]["score"]["share"]
    assert found == recorded["aggregate"][0]["out"]


@pytest.mark.parity
def test_recalls_as_recorded(golden: Any) -> None:
    """A submission's keys hold the truth; one of the three stops the reference on a number it cannot read."""
    stopped = 0
    for case in golden.json("H_eval_temporal_grounding.json")["eval_main"]:
        lines = []
        for key, answer in case["submission"].items():
            low, high = map(float, key.split(">>>")[2].strip("[]").split(","))
            item = tasks.Item(id=key, source="", groups={"task": "c"}, span=(low, high))
            verdict = CHARADES.reference(item, answer)
            lines.append(line(verdict.score, key=key, identity=key))
            stopped += "stops here" in verdict.note
        if "values" in case:
            found = scores.summarize(CHARADES, lines)["reference"]
            for threshold in grounding.THRESHOLDS:
                assert 100 * found[f"R@{threshold}"]["share"] == pytest.approx(case["values"][str(threshold)], abs=1e-9)
    assert stopped == 1


def test_the_reference_forgets_empty_answers_and_strict_does_not() -> None:
    lines = [line(1), line(0), line(0, status="empty"), line(0, status="unreadable"), line(0, status="invalid")]
    found = scores.summarize(MVBENCH, lines)
    assert found["reference"]["score"]["share"] == pytest.approx(1 / 4)
    assert found["strict"]["score"]["share"] == pytest.approx(1 / 5)
    assert (found["counts"]["empty"], found["counts"]["unreadable"], found["counts"]["answered"]) == (1, 1, 2)


def test_tasks_are_weighted_by_their_size_with_empty_answers() -> None:
    lines = [line(1, task="a"), *[line(0, task="a", status="empty")] * 3, *[line(0, task="b")] * 4]
    found = scores.summarize(MVBENCH, lines)["reference"]
    assert found["score"]["share"] == pytest.approx((4 * 1.0 + 4 * 0.0) / 8)  # one in five would be the plain share


def test_micro_and_macro() -> None:
    lines = [*[line(1, task="a")] * 9, line(0, task="b")]
    found = scores.summarize(tasks.BENCHMARKS["mlvu"], lines)["strict"]
    assert found["score"]["share"] == pytest.approx(0.9)
    assert found["macro"]["share"] == pytest.approx(0.5)
    assert found["macro"]["low"] <= 0.5 <= found["macro"]["high"]


def test_the_reference_scores_a_repeated_question_once() -> None:
    lines = [line(1, key="k", identity="1"), line(0, key="k", identity="2"), line(0.6, key="m", identity="3")]
    found = scores.summarize(CHARADES, lines)
    assert found["reference"]["score"]["share"] == pytest.approx(0.3)
    assert found["strict"]["score"]["share"] == pytest.approx(1.6 / 3)
    assert found["strict"]["R@0.5"]["share"] == pytest.approx(2 / 3)


def test_intervals_cover_the_truth() -> None:
    """Of 200 draws from a known mean at most about one in twenty may miss it."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        found = scores.mean(rng.beta(2, 3, 80).tolist(), draws=300)
        missed += not found["low"] <= 0.4 <= found["high"]
    assert missed <= 20
    assert scores.mean([])["share"] is None
    assert scores.share([])["share"] is None


def test_breakdowns_add_up() -> None:
    lines = [line(1, task="a"), line(0, task="b"), line(1, task="b")]
    by = scores.summarize(MVBENCH, lines)["by"]["task"]
    assert {k: v["strict"]["number"] for k, v in by.items()} == {"a": 1, "b": 2}
