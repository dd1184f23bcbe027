"""A run's checkpoint goes out parameter by parameter, adapters merged; a damaged one is passed over."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.options import DataConfig
from hico_jax import checkpoint, cli
from hico_jax.config import CheckpointConfig, Experiment, to_json
from hico_jax.convert import lazy, load
from hico_jax.convert.export import export
from hico_jax.models.hico import HiCo
from hico_jax.optim import LLM, LoraConfig


def save(workdir: pathlib.Path, params: Any, *steps: int, config: LoraConfig | None = None) -> None:
    saved = checkpoint.Checkpointer(str(workdir), CheckpointConfig(keep=5))
    told = {"lora": dataclasses.asdict(config)} if config else {}
    for step in steps:
        moved = jax.tree.map(lambda a, step=step: a + step, params)
        saved.save(step, moved, {"m": jnp.zeros(1)}, {"config": told})
    saved.close()


@pytest.fixture
def run(tmp_path: pathlib.Path, tiny_model: HiCo) -> pathlib.Path:
    """Two checkpoints of a run: the model's numbers and 1, and 2."""
    workdir = tmp_path / "run"
    save(workdir, checkpoint.to_dict(nnx.state(tiny_model)), 1, 2)
    experiment = Experiment("test", "tiny", tiny_model.config, DataConfig(tokenizer=str(tmp_path)))
    (workdir / "config.json").write_text(to_json(experiment))
    return workdir


def leaves_of(model: HiCo) -> dict[str, Any]:
    return load.by_path(nnx.split(model)[1])


def test_one_parameter_at_a_time(
    run: pathlib.Path, tmp_path: pathlib.Path, tiny_model: HiCo, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    real = checkpoint.Stored.read
    monkeypatch.setattr(checkpoint.Stored, "read", lambda self, *names: asked.append(names) or real(self, *names))
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == cli.OK
    wanted = leaves_of(tiny_model)
    assert sorted(asked) == sorted((name,) for name in wanted)
    for path, leaf in leaves_of(load.load(tmp_path / "out").model).items():
        np.testing.assert_array_equal(leaf, wanted[path] + 2, err_msg=path)


def test_a_damaged_checkpoint_is_passed_over(
    run: pathlib.Path, tmp_path: pathlib.Path, tiny_model: HiCo, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its damage is known only when the array is read, after others were written: nothing of it may stay."""
    told = checkpoint.Stored.read

    def flipped(self: checkpoint.Stored, *names: str) -> dict[str, np.ndarray]:
        if self.meta["step"] == 2 and names == ("llm/norm/scale",):
            raise checkpoint.DamagedError("step 2 is damaged")
        return told(self, *names)

    monkeypatch.setattr(checkpoint.Stored, "read", flipped)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == cli.OK
    assert "step 2 is damaged; trying the checkpoint before it" in capsys.readouterr().err
    found = leaves_of(load.load(tmp_path / "out").model)
    np.testing.assert_array_equal(found["llm/norm/scale"], leaves_of(tiny_model)["llm/norm/scale"] + 1)

    def all_bad(self: checkpoint.Stored, *names: str) -> dict[str, np.ndarray]:
        raise checkpoint.DamagedError("damaged")

    monkeypatch.setattr(checkpoint.Stored, "read", all_bad)
    before = {p.name for p in tmp_path.iterdir()}
    assert cli.main(["export", str(run), str(tmp_path / "none")]) == cli.MISUSED
    assert "there is no other one to export" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_flipped_bit_is_noticed(run: pathlib.Path, tiny_model: HiCo) -> None:
    found = next(checkpoint.stored(str(run)))
    assert found.meta["step"] == 2
    found.arrays["llm/norm/scale"]["digest"][0] ^= 1
    leaves = lazy.of_checkpoint(found, leaves_of(tiny_model))
    with pytest.raises(checkpoint.DamagedError, match="params/llm/norm/scale is not what was written"):
        leaves["llm/norm/scale"].read()
    wanted = leaves_of(tiny_model) | {"llm/norm/scale": jax.ShapeDtypeStruct((33,), jnp.float32)}
    with pytest.raises(ValueError, match="llm/norm/scale: found 32 float32, expected 33 float32"):
        lazy.of_checkpoint(found, wanted)


def test_adapters_come_out_merged(tmp_path: pathlib.Path, tiny_model: HiCo) -> None:
    """On a weight as it is, and on one that is held in 8 bits."""
    config, rng = LoraConfig(rank=2, alpha=6.0, targets=(LLM,)), np.random.default_rng(0)
    wanted, arrays = leaves_of(tiny_model), checkpoint.flatten(nnx.state(tiny_model))
    expected = {path: np.asarray(array) for path, array in arrays.items()}
    for path in ("llm/blocks/mlp/up", "llm/blocks/mlp/gate"):
        layers, rows, columns = wanted[path].shape
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((layers, rows, 2), (layers, 2, columns)))
        arrays |= {f"lora/{path}/a": jnp.asarray(a), f"lora/{path}/b": jnp.asarray(b)}
        base = expected[path]
        if path.endswith("gate"):
            del arrays[path]
            whole = rng.integers(-9, 9, base.shape).astype(np.int8)
            scale = np.full((layers, 1, columns), 0.5, np.float32)
            arrays |= {f"{path}/qvalue": jnp.asarray(whole), f"{path}/scale": jnp.asarray(scale)}
            base = whole * scale
        expected[path] = base + 3.0 * np.einsum("lir,lro->lio", a, b)
    save(tmp_path, checkpoint.nest(arrays), 0, config=config)
    leaves = lazy.of_checkpoint(next(checkpoint.stored(str(tmp_path))), wanted)
    assert set(leaves) == set(wanted)
    for path, leaf in leaves.items():
        made = leaf.read()
        assert (made.shape, made.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_allclose(made, expected[path], rtol=1e-6, atol=1e-6, err_msg=path)


def test_a_released_folder_goes_out_again(tmp_path: pathlib.Path, tiny_model: HiCo) -> None:
    source = export(tiny_model, tmp_path / "released")
    assert cli.main(["export", str(source), str(tmp_path / "half"), "--dtype", "bfloat16"]) == cli.OK
    half = load.load(tmp_path / "half").model
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(tiny_model), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
