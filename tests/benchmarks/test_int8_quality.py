"""The comparison's arithmetic, and its short form."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from benchmarks import int8_quality


def test_equal_logits_have_no_error_and_others_have() -> None:
    x = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    same = int8_quality.compared(x, x)
    assert same["logits_error_max"] == 0
    assert same["same_first_token"] == 1
    other = int8_quality.compared(x, -x)
    assert other["same_first_token"] == 0
    assert other["divergence_nats"] > 0.1


def test_rounding_to_8_bits_is_a_percent_of_the_logits(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "quality.json"
    assert int8_quality.main(["--variant", "tiny", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert 0 < found["logits_error_rms"] < 0.03 * found["logits_spread"]
