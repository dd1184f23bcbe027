from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def trial(*arguments: str) -> dict[str, Any]:
    """In a process of its own: the readers' threads complain about the damage after the fact."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/corrupt_checkpoints.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_damage_is_restored_silently() -> None:
    found = trial("--flips=12", "--truncations=6", "--swaps=6", "--seed=1")
    assert sum(found[kind].get("fall-back", 0) for kind in ("flips", "truncations", "swaps")) > 0, found


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_damage_is_restored_silently_in_full() -> None:
    found = trial()
    assert all(found[kind]["fall-back"] > 0 for kind in ("flips", "truncations", "swaps")), found
