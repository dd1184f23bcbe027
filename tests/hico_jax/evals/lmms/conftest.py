from __future__ import annotations

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[4]


@pytest.fixture
def venv() -> pathlib.Path:
    """The environment that the published lmms-eval is installed in."""
    found = pathlib.Path(os.environ.get("HICO_LMMS_VENV", ROOT / ".lmms"))
    if not (found / "bin" / "lmms-eval").exists():
        pytest.skip(f"lmms-eval is not installed in {found}; `bash launch/lmms_eval.sh` does it")
    return found
