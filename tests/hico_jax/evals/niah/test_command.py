"""`hico niah` end to end with a tiny model, and mistakes in one line."""

from __future__ import annotations

import json
import pathlib

import pytest
from PIL import Image

from data_pipeline.tokenizer import Tokenizer
from hico_jax import ask, cli
from hico_jax.batch import DropSchedule
from hico_jax.convert import export
from hico_jax.evals.niah import grid, needles
from hico_jax.models.hico import HiCo


@pytest.fixture(scope="module")
def model(asked_model: HiCo, words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    file = words.save(folder / "tokenizer")  # type: ignore[attr-defined]
    return str(export.export(asked_model, folder / "weights", files=[file]))


def test_the_made_up_world(model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["niah", "--model", model, "--out", str(tmp_path), "--frames", "16", "--depths", "0,0.4", "--count", "2"]
    line += ["--controls", "blank,shuffled,blind"]
    assert cli.main(line) == cli.OK
    said = capsys.readouterr().out
    assert "feature" in said
    assert "pixel" in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["totals"]["pixel"]["forced"]["number"] == 4
    assert summary["totals"]["no needle"]["forced"]["number"] == 2
    assert summary["card"]["prompt"] == "chat"
    controls = [name for name in grid.CONTROLS if name != grid.DROPPED]
    assert list(summary["differences"]) == controls
    assert all(d["forced"]["number"] == 2 for d in summary["differences"].values())
    told = (tmp_path / "report.md").read_text()
    assert all(f"| {name} | " in told for name in controls)
    assert set(summary["tables"]) == {f"{i}, {s}" for i in ("feature", "pixel") for s in ("forced", "generated")}
    for name in ("heatmap_pixel_forced.png", "heatmap_feature_generated.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size[0] > 200
    text = (tmp_path / "report.html").read_text()
    assert "<svg" in text
    assert text.count("data:image/jpeg;base64,") == 3  # the film, and both cards with what was said
    assert "What colour is the card?" in text
    assert "| pixel, forced | 16 |" in (tmp_path / "report.md").read_text()
    before = (tmp_path / "trials.0.jsonl").read_bytes()
    assert cli.main(line) == cli.OK
    assert (tmp_path / "trials.0.jsonl").read_bytes() == before
    capsys.readouterr()
    assert cli.main([*line, "--seed", "1"]) == cli.MISUSED
    assert "holds trials made with other settings: seed 0 (now 1)" in capsys.readouterr().err


def test_a_users_film_and_chains(model: str, noise_film: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = needles.dump(needles.world_chains(1, 3, 32, 0), tmp_path)
    line = ["niah", "--model", model, "--out", str(tmp_path / "out"), "--haystack", str(noise_film)]
    line += ["--needles", str(path), "--images", str(tmp_path / "images"), "--hops", "3"]
    line += ["--insertion", "pixel", "--frames", "8"]
    assert cli.main(line) == cli.OK
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (row,) = summary["joint"]["pixel"]
    assert row["forced"]["both"]["number"] == 1
    assert (summary["card"]["test"], summary["card"]["prompt"]) == ("multi-hop", "paper")
    assert "only caption" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_every_control_of_a_model_that_drops(model: str, tmp_path: pathlib.Path) -> None:
    line = ["niah", "--model", model, "--out", str(tmp_path), "--frames", "8,16", "--depths", "0,0.4", "--count", "2"]
    assert cli.main([*line, "--controls", "all", "--drop", "uniform0_attention:1,2:1,0.5,0.25"]) == cli.OK
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["card"]["drop"]["kind"] == "uniform0_attention"
    assert [d["forced"]["number"] for d in summary["differences"].values()] == [4] * len(grid.CONTROLS)


@pytest.mark.slow
@pytest.mark.parametrize("drop", [False, True])
def test_eight_devices_find_what_one_finds(
    drop: bool, asked_model: HiCo, words: Tokenizer, tmp_path: pathlib.Path
) -> None:
    made = asked_model
    if drop:
        made = ask.with_drop(made, DropSchedule("uniform0_attention", (1, 2), (1.0, 0.5, 0.25)))
    file = words.save(tmp_path / "tokenizer")  # type: ignore[attr-defined]
    weights = str(export.export(made, tmp_path / "weights", files=[file]))
    found = []
    for devices in ("1", "8"):
        out = tmp_path / devices
        line = ["niah", "--model", weights, "--out", str(out), "--frames", "32", "--depths", "0,0.4", "--count", "2"]
        assert cli.main([*line, "--controls", "all", "--devices", devices]) == cli.OK
        found.append([json.loads(x) for x in (out / "trials.0.jsonl").read_text().splitlines()])
    assert len(found[0]) == 18
    for one, eight in zip(*found, strict=True):
        assert one["log_prob"] == pytest.approx(eight["log_prob"], abs=1e-3)
        for name in ("id", "answer", "forced", "generated", "visual_tokens", "prompt_tokens"):
            assert one[name] == eight[name], name


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--devices", "9"], "--devices is 9 but this machine has 8"),
        (["--frames", "3"], "--frames 3 is less than one clip of 4 frames"),
        (["--controls", "blank,cat"], "there is no control 'cat'; known are no, blank, shuffled, dropped, blind"),
        (["--frames", "x"], "'x' is not a whole number"),
        (["--think"], "--think is for chains: give --hops 2 or more"),
        (["--depths", "2"], "'2' is not a number from 0 to 1"),
        (["--hops", "9"], "2 to 8 cards, decoys included, not 9"),
        (["--needles", "gone.json"], "gone.json: there is no such annotation file"),
        (["--haystack", "gone.mp4"], "gone.mp4: no such file"),
        (["--haystack", "{film}", "--frames", "64"], "gives 12 frames at one a second; 64 were asked for"),
    ],
)
def test_mistakes(
    more: list[str],
    expected: str,
    model: str,
    noise_film: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [word.format(film=noise_film) for word in more]
    assert cli.main(["niah", "--model", model, "--out", str(tmp_path), *given]) == cli.MISUSED
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
