"""`hico compress`: the table, with a model and with a stand-in for it; mistakes in one line."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
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


class Deaf(Parrot):
    """Says nothing."""

    def answer(self, *_: Any) -> runner.Reply:
        return runner.Reply("", {"frames": 8})


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
    line += ["--methods", "merge,drop-uniform,drop-attention,drop-all,blind"]
    assert cli.main(line) == cli.OK
    out = capsys.readouterr().out
    rows = [row for row in out.splitlines() if row.startswith("| ")]
    assert len(rows) == 1 + 5 + 1 + 5
    told = json.loads((tmp_path / "out" / "compress.json").read_text())["differences"]
    assert [(d["first"], d["second"]) for d in told] == [
        ("drop-uniform", "merge"), ("drop-attention", "merge"), ("drop-all", "merge"), ("blind", "merge"),
        ("drop-attention", "drop-uniform"),
    ]  # fmt: skip
    assert told[-1]["by"]["all"]["number"] == 4
    assert told[-1]["by"]["all"]["difference"] == 0.0
    assert "merging, attention drop: 0.5, 0.25 left after layers 1, 2 − merging, uniform drop" in out
    assert "control: the questions without the video | 0 | 0 |" in out
    assert "action_count" in rows[0]
    page = (tmp_path / "out" / "compress.html").read_text()
    assert "attention drop" in page
    assert "may do better" in page
    before = sorted((tmp_path / "out").rglob("answers.*.jsonl"))
    assert len(before) == 5
    assert "data:image/jpeg;base64," in page
    # Nothing is asked twice; another number of tokens is another comparison; --fresh asks all methods anew.
    content = [path.read_bytes() for path in before]
    assert cli.main(line) == cli.OK
    assert [path.read_bytes() for path in before] == content
    assert cli.main([*line, "--tokens-per-frame", "2"]) == cli.MISUSED
    assert 'tokens_compared "the model\'s own" (now 2)' in capsys.readouterr().err
    monkeypatch.setattr(runner, "ModelAnswerer", lambda *_, **__: Deaf())
    assert cli.main([*line, "--fresh"]) == cli.OK
    assert all(json.loads(x)["answer"] == "" for path in before for x in path.read_text().splitlines())


def test_a_blind_model_is_asked_without_the_film(viewer: Viewer, noise_film: pathlib.Path) -> None:
    blind = runner.ModelAnswerer(viewer, shown="nothing")
    item = tasks.Item(id="q", source="", groups={}, video=str(noise_film), prompt="What colour is the card?")
    found = blind.answer(blind.watch(item), item, 4)
    assert found.facts["visual_tokens"] == 0
    assert found.text == viewer.ask(None, item.prompt, config=GenerationConfig(4, eos=viewer.tokenizer.eos_ids)).text


def test_what_controls_are_shown(viewer: Viewer, noise_film: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    encode = viewer._encode
    item = tasks.Item(id="q", source="", groups={}, video=str(noise_film), prompt="What colour is the card?")
    for shown in ("film", "shuffled", "blank"):
        frames: list[Any] = []
        monkeypatch.setattr(viewer, "_encode", lambda f, frames=frames: frames.append(f) or encode(f))
        film = runner.ModelAnswerer(viewer, shown=shown).watch(item)
        seen[shown] = (film.num_frames, film.num_clips, film.visual.shape, list(film.indices)), np.concatenate(frames)
    assert seen["film"][0] == seen["shuffled"][0] == seen["blank"][0], "as many frames, told the same times"
    straight, mixed = seen["film"][1], seen["shuffled"][1]
    assert len(straight) > 4
    assert sorted(f.tobytes() for f in straight) == sorted(f.tobytes() for f in mixed)
    assert (straight != mixed).any()
    assert set(np.unique(seen["blank"][1])) == {128}
    again = viewer.watch(noise_film, order=runner._mixed(str(noise_film)))
    np.testing.assert_array_equal(again.visual, runner.ModelAnswerer(viewer, shown="shuffled").watch(item).visual)
    with pytest.raises(ValueError, match="what is shown is 'half'"):
        runner.ModelAnswerer(viewer, shown="half")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--methods", "merge,zip"], "there is no method 'zip'; known are merge"),
        (["--methods", "merge,blind", "--pairs", "merge:zip"], "--pairs has 'merge:zip'; write A:B of the methods"),
        (["--schedule", "4"], "'4' does not read as LAYERS:RATIOS"),
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
