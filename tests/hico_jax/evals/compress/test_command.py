"""`hico compress`: the table, with a model and with a stand-in for it; mistakes in one line."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from data_pipeline.tokenizer import Tokenizer
from hico_jax import cli
from hico_jax.convert import export
from hico_jax.evals.bench import runner, tasks
from hico_jax.evals.compress import world
from hico_jax.film import Viewer
from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo
from tests import official_files
from tests.parrot import Parrot


@pytest.fixture(scope="module")
def model(asked_model: HiCo, words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    file = words.save(folder / "tokenizer")  # type: ignore[attr-defined]
    return str(export.export(asked_model, folder / "weights", files=[file]))


def test_a_model_under_one_compressor(
    model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.items
    monkeypatch.setattr(world, "items", lambda *arguments: whole(*arguments)[:2])  # of one length: one program
    line = ["compress", "--model", model, "--out", str(tmp_path), "--films", "1", "--seconds", "8", "--methods", "even"]
    assert cli.main([*line, "--max-frames", "8"]) == cli.OK
    out = capsys.readouterr().out
    assert "| uniform sampling | 1 | 1 |" in out
    (row,) = json.loads((tmp_path / "compress.json").read_text())["rows"]
    assert row["prefill_mib"] > 0
    assert row["answer_s"] > 0
    assert row["by"]["appearance"]["strict"]["number"] == 2


def test_every_method_on_a_benchmark(
    model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ModelAnswerer", lambda *_, **__: Parrot())
    files: Any = official_files.make(tmp_path / "files", 1)["mvbench"]
    line = ["compress", "--model", model, "--out", str(tmp_path / "out"), "--benchmark", "mvbench"]
    line += ["--annotations", files["annotations"], "--videos", files["videos"]]
    line += ["--methods", "merge,pyramid,none,drop-all,blind"]
    assert cli.main(line) == cli.OK
    out = capsys.readouterr().out
    rows = [row for row in out.splitlines() if row.startswith("| ")]
    assert len(rows) == 1 + 5
    assert "control: the questions without the video | 0 | 0 |" in out
    assert "action_count" in rows[0]
    page = (tmp_path / "out" / "compress.html").read_text()
    assert "PyramidDrop style" in page
    assert "may do better" in page
    before = sorted((tmp_path / "out").rglob("answers.*.jsonl"))
    assert len(before) == 5
    assert "data:image/jpeg;base64," in page


def test_a_blind_model_is_asked_without_the_film(viewer: Viewer, noise_film: pathlib.Path) -> None:
    blind = runner.ModelAnswerer(viewer, blind=True)
    item = tasks.Item(id="q", source="", groups={}, video=str(noise_film), prompt="What colour is the card?")
    found = blind.answer(blind.watch(item), item, 4)
    assert found.facts["visual_tokens"] == 0
    assert found.text == viewer.ask(None, item.prompt, config=GenerationConfig(4, eos=viewer.tokenizer.eos_ids)).text


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--methods", "merge,zip"], "there is no method 'zip'; known are merge"),
        (["--tokens-per-frame", "99"], "--tokens-per-frame is 99; the tower gives 4 patches"),
        (["--benchmark", "mvbench"], "--benchmark needs --annotations"),
    ],
)
def test_mistakes(
    more: list[str], expected: str, model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compress", "--model", model, "--out", str(tmp_path), *more]) == cli.MISUSED
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
