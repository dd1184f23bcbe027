from __future__ import annotations

import pathlib

import pytest

from benchmarks import damage


def test_damaged_samples_are_counted_and_named_and_no_other(tmp_path: pathlib.Path) -> None:
    found = damage.trial(tmp_path, 60, seed=3)
    assert not found["wrong"], found
    assert found["damaged"] == 60
    assert found["masked, counted and named"] > 20
    assert len(found["by source"]) >= 5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_damaged_samples(seed: int, tmp_path: pathlib.Path) -> None:
    found = damage.trial(tmp_path, 1000, seed)
    assert not found["wrong"], found
