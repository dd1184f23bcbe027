"""The benchmark of long films runs on a machine with little more than JAX."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from data_pipeline.world import films

ROOT = pathlib.Path(__file__).resolve().parents[2]
BARE = """
import importlib.abc, runpy, sys

MISSING = {"orbax", "grain", "ml_collections", "etils", "qwix", "tensorflow_datasets", "tensorstore", "safetensors"}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bare(folder: pathlib.Path, *arguments: str) -> str:
    """What the benchmark prints where those packages are missing."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(ROOT / "benchmarks" / "long_video.py"), "--model", "nano", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_table_of_films_that_are_too_long(tmp_path: pathlib.Path) -> None:
    said = bare(tmp_path, "--frames", "16", "--max-tokens", "0", "--json", "table.json")
    assert "| 16 | off | 256 | 256 tokens are more than --max-tokens 0 |" in said
    assert [line["visual_tokens"] for line in json.loads((tmp_path / "table.json").read_text())] == [256, 64, 64]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["off", "clip and video level"])
def test_a_line_needs_nothing_but_jax_av_pillow_and_tokenizers(way: str, tmp_path: pathlib.Path) -> None:
    films.haystack(tmp_path / "film.mp4", num_seconds=16, seed=0, split="val")
    found = json.loads(bare(tmp_path, "--line", str(tmp_path / "film.mp4"), "16", way).splitlines()[-1])
    assert found["visual_tokens"] == 16 * (16 if way == "off" else 4)
    assert len(found["kept"]) == (0 if way == "off" else 2)
    assert all(found[step] > 0 for step in ("read", "vision", "merge", "project", "prefill", "decode"))
