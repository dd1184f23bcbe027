"""What `docs/serve.md` and the README show works as it stands; only the address, the model and the film are others."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hico_jax
from hico_jax import api
from hico_jax.api import Model
from hico_jax.generate import GenerationConfig
from hico_jax.serve import session
from tests.hico_jax.serve.test_app import Served

ROOT = pathlib.Path(__file__).resolve().parents[3]


def blocks(name: str) -> list[tuple[str, str]]:
    """Language and text of a page's examples."""
    return re.findall(r"```(bash|python)\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)


BLOCKS = blocks("docs/serve.md")
README = [(kind, text) for kind, text in blocks("README.md") if "127.0.0.1:8000" in text]


@pytest.fixture(scope="module")
def served(make_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(make_model(), tmp_path_factory.mktemp("uploads"), name="nano")
    yield server
    server.close()


@pytest.fixture
def there(tmp_path: pathlib.Path, films: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with the examples' films, and sessions that say little."""
    shutil.copy(films[0], tmp_path / "film.mp4")
    shutil.copy(films[1], tmp_path / "other.mp4")
    monkeypatch.chdir(tmp_path)
    few = functools.partial(GenerationConfig, max_new_tokens=4)  # a random model never ends
    monkeypatch.setattr(session, "GenerationConfig", few)
    return tmp_path


def test_there_are_examples() -> None:
    assert [kind for kind, _ in BLOCKS] == ["bash", "python", "python", "python"]


README_PYTHON = [text for kind, text in README if kind == "python"]
CURL = [text for kind, text in (*BLOCKS, *README) if kind == "bash"]


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("bash") is None, reason="curl or bash is missing")
@pytest.mark.parametrize("text", CURL, ids=range(len(CURL)))
def test_curl(text: str, served: Served, there: pathlib.Path) -> None:
    script = text.replace("http://127.0.0.1:8000", served.url).replace("python3", sys.executable)
    done = subprocess.run(["bash", "-euc", script], cwd=there, capture_output=True, text=True, timeout=60, check=True)
    assert '"finish_reason":' in done.stdout
    assert '"completion_tokens":' in done.stdout


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_python(
    number: int, served: Served, there: pathlib.Path, make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(api, "load", lambda folder, dtype=None: make_model())
    code = BLOCKS[number][1].replace("http://127.0.0.1:8000", served.url)
    told: dict[str, Any] = {}
    exec(compile(code, "docs/serve.md", "exec"), told)
    said = capsys.readouterr().out
    assert "did not run again" in said if number < 3 else said.startswith("3 ")


@pytest.mark.parametrize("text", README_PYTHON, ids=range(len(README_PYTHON)))
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_readme(text: str, served: Served, there: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(text.replace("http://127.0.0.1:8000", served.url), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_example_in_cells(
    there: pathlib.Path, make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(hico_jax, "load", lambda folder: make_model())
    monkeypatch.setattr(sys, "argv", ["session.py", "model", os.fspath(there / "film.mp4")])
    path = ROOT / "docs/serve/session.py"
    exec(compile(path.read_text("utf-8"), str(path), "exec"), {"__name__": "__main__"})
    assert "12 frames of 12 s; open after" in capsys.readouterr().out
