from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "arguments", [("--instants=20",), ("--instants=20", "--signal=TERM"), ("--instants=20", "--processes=2")]
)
def test_a_run_killed_anywhere_repeats_the_run_never_killed(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "benchmarks/kill_anywhere.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
