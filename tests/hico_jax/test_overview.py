from __future__ import annotations

import pathlib

import jax
import pytest

from configs import finetune_lora, stage3_sft
from data_pipeline.world import make
from hico_jax import config, overview, train
from hico_jax.models import layers
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.start import abstract_start

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_7b_run_is_told_without_being_made() -> None:
    found = config.freeze(stage3_sft.get_config("umt_qwen2_7b"))
    lines = overview.dry_run(found, make_mesh(MeshConfig(1, 8, 1, 1)))
    llm = next(line.split() for line in lines if line.startswith("llm"))
    assert llm[1:3] == ["7,615,616,512", "0"]
    assert int(llm[3].replace(",", "")) == pytest.approx(7_615_616_512 * 4 / 8, rel=0.01)  # float32, eighths
    optimizer = next(line.split() for line in lines if line.startswith("optimizer"))
    assert int(optimizer[1].replace(",", "")) == pytest.approx(2 * 7.92e9 * 4 / 8, rel=0.01)
    assert any("256 rows of 32768 tokens and 128 clips" in line for line in lines)


@pytest.mark.parametrize(("base", "size"), [("full", 4), ("int8", 1)])
def test_adapters_of_a_7b_model_in_bytes(base: str, size: int) -> None:
    found = config.freeze(finetune_lora.get_config(f"umt_qwen2_7b,base={base}"))
    state = abstract_start(found, make_mesh(MeshConfig(), jax.devices()[:1])).state
    trains = layers.num_params(state.trainable)
    assert trains == 28 * 16 * (2 * 3584 + 2 * (3584 + 512) + 2 * 3584 * 0 + 3584 * 2 + 3 * (3584 + 18944))
    held = sum(a.dtype.itemsize * a.size for a in jax.tree.leaves(state.frozen))
    adapted = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    whole = 4 * (7_615_616_512 + 290_479_104 + 16_522_240)
    assert held == pytest.approx(whole - (4 - size) * adapted, rel=0.002)  # and a scale for each output


def test_the_flag_prints_and_stops(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--config={ROOT}/configs/debug_tiny.py", f"--config.workdir={tmp_path / 'run'}", "--dry_run"]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "bytes/device" in said
    assert "TFLOP" in said
    assert not (tmp_path / "run").exists()


def test_compiling_alone_writes_no_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make.make_world(tmp_path / "world", preset="tiny", seed=0)
    assert made["items"]
    argv = [
        f"--config={ROOT}/configs/debug_tiny.py", f"--config.workdir={tmp_path / 'run'}", "--compile_only",
        f"--config.data.annotations={tmp_path / 'world' / 'short.yaml'}",
        f"--config.data.tokenizer={tmp_path / 'world'}"
    ]  # fmt: skip
    assert train.main(argv) == 0
    assert "compiled in" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
