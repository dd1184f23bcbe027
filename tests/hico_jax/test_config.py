from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from data_pipeline.options import DataConfig
from hico_jax import config, registry
from hico_jax.batch import DropSchedule
from hico_jax.config import Experiment

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = f"--config={ROOT}/configs/stage3_sft.py"


@pytest.fixture
def experiment() -> Experiment:
    model = dataclasses.replace(registry.model_config("tiny"), drop=DropSchedule("uniform", (1, 2), (1.0, 0.5, 0.25)))
    return Experiment("test", "tiny", model, DataConfig(batch_size=4, length_buckets=(64, 128)))


def test_thaw_and_freeze_are_inverse(experiment: Experiment) -> None:
    assert config.freeze(config.thaw(experiment)) == experiment


def test_json_is_exact(experiment: Experiment) -> None:
    text = config.to_json(experiment)
    assert config.from_json(text) == experiment
    assert config.to_json(config.from_json(text)) == text
    assert json.loads(text)["model"]["llm"]["arch"] == "qwen2"


def test_every_kind_of_field_is_overridden(experiment: Experiment) -> None:
    view = config.thaw(experiment)
    view.optim.lr = 0.5
    view.optim.warmup_steps = 7
    view.train.steps = 3
    view.model.drop.layers = (1,)
    view.model.drop.ratios = (1.0, 0.5)
    view.optim.rates = (("llm/.*", None), (".*", 0.1))
    frozen = config.freeze(view)
    assert (frozen.optim.lr, frozen.optim.warmup_steps, frozen.num_steps) == (0.5, 7, 3)
    assert frozen.model.drop == DropSchedule("uniform", (1,), (1.0, 0.5))
    assert frozen.optim.rates == (("llm/.*", None), (".*", 0.1))


def test_the_view_is_locked_and_typed(experiment: Experiment) -> None:
    view = config.thaw(experiment)
    with pytest.raises(AttributeError, match="steps"):
        view.train.stepz = 3
    with pytest.raises(TypeError):
        view.optim.warmup_steps = "many"


def edited(experiment: Experiment, path: str, value: Any) -> dict[str, Any]:
    tree = json.loads(config.to_json(experiment))
    *parents, key = path.split(".")
    inner = tree
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.learning_rate", 1.0, "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("model.llm.num_layer", 1, "unknown key model.llm.num_layer; did you mean model.llm.num_layers?"),
        ("mesh.xyz", 1, "unknown key mesh.xyz; valid keys are context, data, fsdp, sequence, slices, tensor"),
        ("optim.lr", "fast", "optim.lr is 'fast'; it must be float"),
        ("train.steps", 0, "train.steps must be positive, got 0"),
        ("train.steps", 1.5, r"train.steps is 1.5; it must be int \| None"),
        ("optim.clip_norm", True, "optim.clip_norm is True; it must be float"),
        ("model.vision.arch", "vit", "vision.arch is 'vit'; it must be one of umt"),
        ("model.llm", 3, "model.llm is 3"),
        ("data.length_buckets", [1, "a"], r"data.length_buckets\[1\] is 'a'; it must be int"),
        ("mesh.tensor", 4, "4 heads and 2 key/value heads cannot be split over mesh.tensor=4; use a divisor of 2"),
        ("optim.accumulate", 3, "data.batch_size is 4 but optim.accumulate is 3"),
        ("checkpoint.keep", 0, "checkpoint.every is 1000 and keep is 0"),
    ],
)
def test_mistakes_are_named(experiment: Experiment, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.freeze(edited(experiment, path, value))


def test_a_missing_key_is_named(experiment: Experiment) -> None:
    tree = json.loads(config.to_json(experiment))
    del tree["model"]["llm"]["vocab_size"]
    with pytest.raises(ValueError, match=r"missing key model\.llm\.vocab_size"):
        config.freeze(tree)


def test_flags_choose_and_tune() -> None:
    found = config.from_flags(
        [
            f"{FILE}:nano,rates=intended", "--config.optim.warmup_steps=5", "--config.data.max_frames=4",
            "--config.init.parent=runs/a", "--config.data.length_buckets=(256,)", "--config.train.steps=None",
        ]
    )  # fmt: skip
    assert found.model_name == "nano"
    assert found.optim.rates[0] == (r"vision/.*", 2e-6)
    assert (found.optim.warmup_steps, found.data.max_frames, found.init.parent) == (5, 4, "runs/a")
    assert found.data.length_buckets == (256,)
    assert found.train.steps is None
    separate = config.from_flags(["--config", f"{ROOT}/configs/stage3_sft.py:nano", "--config.train.steps=9"])
    assert separate.num_steps == 9


def test_our_configurations_are_found_from_any_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed program has no checkout around it. A file of the user's own goes first."""
    monkeypatch.chdir(tmp_path)
    assert config.from_flags(["--config=configs/debug_tiny.py"]).model_name == "tiny"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "debug_tiny.py").write_text("def get_config():\n    raise ValueError('mine')\n")
    with pytest.raises(ValueError, match="mine"):
        config.from_flags(["--config", "configs/debug_tiny.py"])
    with pytest.raises(ValueError, match=r"no configuration file configs/common\.py; configs/ holds debug_tiny\.py, "):
        config.from_flags(["--config=configs/common.py"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no configuration is given"),
        (["--config=nothing.py:nano"], "no configuration file nothing.py"),
        ([f"{FILE}:nan"], "unknown model 'nan'; did you mean nano?"),
        ([f"{FILE}:nano,speed=3"], "unknown option 'speed' after the colon; options and defaults are: rates=applied"),
        ([f"{FILE}:nano,rates=odd"], "option rates is 'odd'"),
        ([f"{FILE}:nano", "--config.optim.learning_rate=5"], "did you mean optim.lr?"),
        ([f"{FILE}:nano", "--config.optim.lr.x=5"], "unknown key optim.lr.x; optim.lr is a value"),
        ([f"{FILE}:nano", "--config.optim.lr=abc"], "--config.optim.lr=abc: could not convert"),
        ([f"{FILE}:nano", "--steps=3"], "Unknown command line flag 'steps'"),
        ([f"{FILE}:nano", "extra"], "unexpected argument 'extra'"),
        ([f"{FILE}:nano", "--config.train.steps=0"], "train.steps must be positive"),
    ],
)
def test_mistakes_in_flags_are_one_sentence(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        config.from_flags(argv)
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)
