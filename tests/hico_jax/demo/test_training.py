"""The demo's training commands, and what it says of the run that was killed."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any

import pytest

from hico_jax import config
from hico_jax.demo import training
from hico_jax.demo.plan import Stage

STAGE = Stage("stage3", "stage3_sft", "stage3.yaml", 40, ("optim.lr=0.002", "data.batch_size=8"), kill_at=20)


def entries(*steps: int, **changes: Any) -> str:
    lines = [{"step": s, "loss": 1 / s, "grad_norm": 2.0, "accuracy": 0.5, "step_s": 0.1} | changes for s in steps]
    return "".join(json.dumps(line) + "\n" for line in lines)


def stopped(folder: pathlib.Path, before: str, after: str, origin: str = "resumed at step 4") -> dict[str, Any]:
    (folder / "killed.jsonl").write_text(before)
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text(after)
    (folder / "run" / "env.json").write_text(json.dumps({"origin": origin}))
    return training.compare(folder / "killed.jsonl", folder / "run")


def test_a_resume_that_repeats_every_number(tmp_path: pathlib.Path) -> None:
    """How long a step took may differ."""
    found = stopped(tmp_path, entries(*range(1, 8)), entries(*range(1, 11), step_s=0.3))
    assert found == {
        "killed_after": 7, "resumed_from": 4, "steps_run_twice": 3, "identical": True,
        "losses": [[s, 1 / s, 1 / s] for s in (5, 6, 7)],
    }  # fmt: skip


@pytest.mark.parametrize("changed", training.COMPARED)
def test_a_resume_that_differs_in_one_number(tmp_path: pathlib.Path, changed: str) -> None:
    after = entries(*range(1, 7)) + entries(7, **{changed: 0.1428571428571429}) + entries(8)
    assert not stopped(tmp_path, entries(*range(1, 8)), after)["identical"]


def test_a_run_that_began_anew(tmp_path: pathlib.Path) -> None:
    found = stopped(tmp_path, entries(1, 2, 3), entries(1, 2, 3, 4), "random weights, seed 0")
    assert (found["resumed_from"], found["steps_run_twice"]) == (0, 3)


def test_the_command_of_a_stage(tmp_path: pathlib.Path) -> None:
    command = training.line(STAGE, tmp_path, tmp_path / "stage2", 7)
    assert command[:4] == [sys.executable, "-m", "hico_jax", "train"]
    assert pathlib.Path(command[4].removeprefix("--config=").removesuffix(":nano")).is_file()
    assert f"--config.init.parent={tmp_path / 'stage2'}" in command
    assert "--config.optim.lr=0.002" in command
    assert not any("init.parent" in flag for flag in training.line(STAGE, tmp_path, None, 7))


def test_every_flag_is_a_key_of_the_configuration(tmp_path: pathlib.Path) -> None:
    import importlib

    view = importlib.import_module(f"configs.{STAGE.config}").get_config("nano")
    for flag in training.line(STAGE, tmp_path, tmp_path, 7)[5:]:
        *path, last = flag.removeprefix("--config.").split("=")[0].split(".")
        node = view
        for name in path:
            node = node[name]
        assert last in node, flag
    assert config.freeze(view).stage


def test_the_command_as_a_user_types_it(tmp_path: pathlib.Path) -> None:
    text = training.shown(training.line(STAGE, tmp_path, None, 7))
    assert text.startswith("hico train --config=configs/stage3_sft.py:nano --config.workdir=")
    assert "--config.train.steps=40 " in text


def test_a_failed_stage_names_its_command() -> None:
    failing = [sys.executable, "-c", "raise SystemExit(3)", "train"]
    with pytest.raises(RuntimeError, match="training ended with exit code 3: hico train"):
        training.finish(failing)


def test_a_stage_that_ends_before_the_plug_is_pulled(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 0 before step 5"):
        training.kill([sys.executable, "-c", "", "train"], tmp_path / "none", 5, tmp_path / "killed.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_programs_are_compiled_ahead_one_after_the_other_until_training_ends(tmp_path: pathlib.Path) -> None:
    script = "import sys, time; open(sys.argv[1], 'w').write(sys.argv[3]); time.sleep(int(sys.argv[2]))"
    waits = {"a": "0", "b": "600", "c": "0"}
    commands = [[sys.executable, "-c", script, str(tmp_path / name), wait] for name, wait in waits.items()]
    with training.compiled_ahead(commands):
        began = time.monotonic()
        while not (tmp_path / "b").exists():
            assert time.monotonic() - began < 60
            time.sleep(0.02)
    assert (tmp_path / "a").read_text() == "--compile_only"
    assert not (tmp_path / "c").exists()  # the second was still at it, and is stopped
