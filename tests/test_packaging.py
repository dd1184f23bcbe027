"""What an installed program needs besides Python files goes into the wheel."""

from __future__ import annotations

import pathlib
import tomllib

from hico_jax import weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_file_that_is_no_python_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packages = [name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert packages == ["hico_jax", "data_pipeline", "configs"]
    for name in packages:
        folder = ROOT / name
        there = {p for p in folder.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
        there = {p for p in there if p.name != "README.md"}  # for those who read the source
        packed = {p for pattern in patterns.get(name, []) for p in folder.glob(pattern) if p.suffix != ".py"}
        packed = {p for p in packed if "__pycache__" not in p.parts}
        assert {str(p.relative_to(ROOT)) for p in there - packed} == set()
    shipped = {p.name for name in weights.NAMES for p in weights.folder(name).iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "MODEL_CARD.md"} <= shipped


def test_requirements_are_part_of_what_builds() -> None:
    """The wheel's dependencies are read from a file, which must be there when an sdist is built."""
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    assert [ROOT / f for f in dynamic["dependencies"]["file"] if not (ROOT / f).is_file()] == []
    assert PROJECT["project"]["license-files"] == ["LICENSE"]
