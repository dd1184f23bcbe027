"""What we export runs in PyTorch: `benchmarks/check_with_torch.py`, whose second half needs a Python with torch."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "check_with_torch.py"


@pytest.mark.slow
def test_stock_transformers_and_restated_towers_compute_the_same(tmp_path: pathlib.Path) -> None:
    python = os.environ.get("HICO_TORCH_PYTHON")
    if not python:
        pytest.skip("HICO_TORCH_PYTHON names no Python with torch, transformers and safetensors")
    subprocess.run([sys.executable, str(SCRIPT), "write", str(tmp_path)], check=True, cwd=SCRIPT.parents[1])
    subprocess.run([python, str(SCRIPT), "check", str(tmp_path)], check=True)
