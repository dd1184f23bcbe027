"""Spans of time in answers, as the reference finds them and as they are meant."""

from __future__ import annotations

from typing import Any

import pytest

from hico_jax.evals.bench import grounding


@pytest.mark.parity
def test_spans_as_recorded(golden: Any) -> None:
    recorded = golden.json("H_eval_temporal_grounding.json")
    assert len(recorded["extract_time"]) == 30
    for case in recorded["extract_time"]:
        if "error" in case:
            with pytest.raises(ValueError, match="could not convert"):
                grounding.reference_span(case["in"])
            continue
        found = grounding.reference_span(case["in"])
        assert ([] if found is None else [list(found)]) == case["out"], case


@pytest.mark.parity
def test_overlaps_as_recorded(golden: Any) -> None:
    for case in golden.json("H_eval_temporal_grounding.json")["iou"]:
        if "error" in case:
            with pytest.raises(ZeroDivisionError):
                grounding.hull_iou(case["A"], case["B"])
        else:
            assert grounding.hull_iou(case["A"], case["B"]) == case["out"]


@pytest.mark.parametrize(
    ("answer", "span"),
    [
        ("The event happens in the 24.3 - 30.4 seconds.", (24.3, 30.4)), ("from 10 to 20 seconds", (10, 20)),
        ("starts at 3s and ends at 9s", (3, 9)), ("between 5 and 7 seconds", (5, 7)), ("3.4s - 8.8s", (3.4, 8.8)),
        ("The start time is 0 seconds, and the end time is 12 seconds.", (0, 12)), ("happens in 3.2–8.1 s", (3.2, 8.1)),
        ("Starting time: 0.8 seconds\nEnding time: 1.1 seconds", (0.8, 1.1)), ("30.4 - 24.3", (24.3, 30.4)),
        ("It starts at 00:01:00\nIt ends at 00:00:30", (30, 60)), ("1:05 to 1:20", (65, 80)),
        ("starts at 00:00:18 and ends at 00:00:23.", (18, 23)), ("start: 12.5\nend: 30", (12.5, 30)), ("5 - 5", (5, 5)),
    ],
)  # fmt: skip
def test_strict_reads_what_is_meant(answer: str, span: tuple[float, float]) -> None:
    assert grounding.strict_span(answer) == pytest.approx(span)


@pytest.mark.parametrize("answer", ["", "tomato", "start 4", "1..2 - 3", "the cat", "only 7 seconds"])
def test_strict_does_not_guess(answer: str) -> None:
    assert grounding.strict_span(answer) is None


def test_union_and_hull_agree_where_spans_overlap() -> None:
    assert grounding.iou((0, 10), (5, 15)) == pytest.approx(grounding.hull_iou((0, 10), (5, 15)))
    assert grounding.iou((0, 1), (9, 10)) == 0
    assert grounding.iou((3, 3), (3, 3)) == 0
    assert grounding.iou((2, 4), (2, 4)) == 1
