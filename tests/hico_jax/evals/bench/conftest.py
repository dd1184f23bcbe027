"""Official-format files of every benchmark, made once, and a tiny exported model."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from data_pipeline.tokenizer import Tokenizer
from hico_jax.convert import export
from hico_jax.evals.bench import tasks
from hico_jax.models.hico import HiCo
from tests import official_files


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return official_files.make(tmp_path_factory.mktemp("official"))


@pytest.fixture
def items(official: dict[str, dict[str, str]]) -> Any:
    def get(name: str) -> list[tasks.Item]:
        return tasks.read(tasks.BENCHMARKS[name], sources(official, name))

    return get


def sources(official: dict[str, dict[str, str]], name: str) -> tasks.Sources:
    return tasks.Sources(**{k: pathlib.Path(v) for k, v in official[name].items()})


@pytest.fixture(scope="session")
def exported(asked_model: HiCo, words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model")
    file = words.save(folder / "tokenizer")  # type: ignore[attr-defined]
    return export.export(asked_model, folder / "weights", files=[file])
