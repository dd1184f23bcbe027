from __future__ import annotations

import pathlib
from typing import Any

import pytest

from benchmarks import elastic


def line(step: int, order: int, loss: float) -> dict[str, Any]:
    return {"step": step, "order": order, "loss": loss, "grad_norm": 1.0}


def test_another_order_or_loss_is_noticed() -> None:
    control = [line(1, 7, 2.0), line(2, 8, 1.0)]
    assert elastic.compare(control, [line(1, 7, 2.0), line(2, 8, 1.000001)])["same"]
    assert not elastic.compare(control, [line(1, 7, 2.0), line(2, 8, 1.001)])["same"]
    assert not elastic.compare(control, [line(1, 7, 2.0), line(2, 9, 1.0)])["same"]
    assert not elastic.compare(control, [])["same"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("plan", elastic.PLANS)
def test_a_run_on_changing_machines_is_the_same_run(plan: str, tmp_path: pathlib.Path) -> None:
    found = elastic.trial(tmp_path, [plan], 3, "tiny")
    assert all(run["same"] for run in found["runs"]), found
