"""`hico convert` and `hico export` as a user runs them: every recorded checkpoint there and back, every bad input."""

from __future__ import annotations

import errno
import json
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from hico_jax import cli
from hico_jax.convert import export, load, safetensors_io
from tests.hico_jax.convert import pickled

CHECKPOINTS = ("F_umt224_ckpt", "F_internvideo2_ckpt", "I_internvl_hico_ckpt")


def run(*line: Any) -> int:
    return cli.main([str(part) for part in line])


@pytest.mark.parity
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_recorded_checkpoints_come_back_bit_for_bit(golden, tmp_path, capsys, name):
    source = golden.folder / name
    assert run("convert", source, tmp_path / "ours") == cli.OK
    assert run("export", tmp_path / "ours", tmp_path / "back", "--max-shard-bytes", 300_000) == cli.OK
    there, back = capsys.readouterr().out.strip().split("imported")[1].split("exported")
    assert there.split("sha256")[1].strip() == back.split("sha256")[1].strip()
    before = safetensors.numpy.load_file(source / "model.safetensors")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    after = {n: t for file in files for n, t in safetensors.numpy.load_file(file).items()}
    assert len(files) > 1
    assert set(after) == set(before)
    for key, tensor in after.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (
            before[key].dtype, before[key].shape, before[key].tobytes()
        )  # fmt: skip
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((source / file).read_text())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["F_umt224_ckpt", "I_internvl_hico_ckpt"])
def test_the_language_model_alone(golden, tmp_path, name):
    """Out as its own family lays it out, and in again as a starting point."""
    assert run("convert", golden.folder / name, tmp_path / "ours") == cli.OK
    assert run("export", tmp_path / "ours", tmp_path / "llm", "--part", "llm") == cli.OK
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    names = set(safetensors_io.open_tensors(tmp_path / "llm"))
    if name.startswith("F"):
        assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
        assert not [key for key in config if key.startswith("mm_")]
        assert {"model.embed_tokens.weight", "lm_head.weight"} < names
    else:
        assert config["model_type"] == "internlm2"
        assert {"model.tok_embeddings.weight", "output.weight"} < names
    assert run("convert", tmp_path / "llm", tmp_path / "again") == cli.OK


@pytest.fixture
def folder(tmp_path, tiny_model):
    return export.export(tiny_model, tmp_path / "released")


def refused(capsys, tmp_path, *line: Any) -> str:
    """What one bad command says; nothing may be left under the final name, or half-written beside it."""
    before = {p.name for p in tmp_path.iterdir()}
    assert run(*line) == cli.MISUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == before
    return err


def edit(folder: pathlib.Path, change: Any) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({NORM: np.full(32, np.nan, np.float32)}), "32 numbers of 32 that are NaN"),
        (lambda t: t.update({NORM: np.ones(31, np.float32)}), "found (31,), expected (32,)"),
        (lambda t: t.update({NORM: np.ones(32, np.int32)}), "found int32, expected floating-point numbers"),
        (lambda t: t.pop(NORM), "found missing, expected (32,)"),
    ],
)
def test_tensors_that_are_wrong(folder, tmp_path, capsys, change, message):
    edit(folder, change)
    said = refused(capsys, tmp_path, "convert", folder, tmp_path / "ours")
    assert NORM in said
    assert message in said


def test_files_that_are_wrong(folder, tmp_path, capsys):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "is damaged" in refused(capsys, tmp_path, "convert", folder, tmp_path / "ours")
    (folder / "model.safetensors").write_bytes(whole)
    assert run("export", folder, tmp_path / "shards", "--max-shard-bytes", 50_000) == cli.OK
    capsys.readouterr()
    last = max((tmp_path / "shards").glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    said = refused(capsys, tmp_path, "convert", tmp_path / "shards", tmp_path / "ours")
    assert f"{last} is damaged" in said
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (folder / safetensors_io.INDEX).write_text(json.dumps(index))
    said = refused(capsys, tmp_path, "convert", folder, tmp_path / "ours")
    assert "names model-00001-of-00002.safetensors, which is missing" in said
    (folder / safetensors_io.INDEX).unlink()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    assert "model_type 'llama', which is not" in refused(capsys, tmp_path, "convert", folder, tmp_path / "ours")
    assert "does not exist" in refused(capsys, tmp_path, "convert", tmp_path / "nothing", tmp_path / "ours")


def test_a_pickle(folder, tmp_path, capsys):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    pickled.save(folder / "pytorch_model.bin", tensors)
    assert "pass --allow-pickle" in refused(capsys, tmp_path, "convert", folder, tmp_path / "ours")
    assert run("convert", folder, tmp_path / "ours", "--allow-pickle") == cli.OK
    capsys.readouterr()

    class Hostile:
        def __reduce__(self) -> Any:
            return pathlib.Path.touch, (tmp_path / "ran",)

    pickled.save(folder / "pytorch_model.bin", tensors, extra=Hostile())
    said = refused(capsys, tmp_path, "convert", folder, tmp_path / "other", "--allow-pickle")
    assert "Nothing in it was run" in said


def test_a_tokenizer_of_another_model(folder, tmp_path, capsys, words):
    words.save(folder)
    said = refused(capsys, tmp_path, "convert", folder, tmp_path / "ours")
    assert "tokens but the model has rows for 64" in said


def test_an_export_says_what_ends_an_answer(folder, tmp_path, words):
    words.save(folder)
    (folder / export.GENERATION).unlink()
    assert run("export", folder, tmp_path / "out") == cli.OK
    assert json.loads((tmp_path / "out" / export.GENERATION).read_text())["eos_token_id"] == list(words.eos_ids)


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_full_disk(folder, tmp_path, capsys, monkeypatch, verb):
    source = folder
    if verb == "export":
        assert run("convert", folder, tmp_path / "ours") == cli.OK
        capsys.readouterr()
        source = tmp_path / "ours"
    real = safetensors_io.write_file

    def full(file: pathlib.Path, *args: Any) -> None:
        real(file, *args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_io, "write_file", full)
    assert "became full" in refused(capsys, tmp_path, verb, source, tmp_path / "target")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has 10 free; nothing was written" in refused(capsys, tmp_path, verb, source, tmp_path / "target")


def test_an_interruption_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    """Of a new folder, and of one that was to be replaced."""
    assert run("convert", folder, tmp_path / "ours") == cli.OK
    before = {p: p.read_bytes() for p in (tmp_path / "ours").iterdir()}

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_io, "write_file", stop)
    assert run("convert", folder, tmp_path / "new") == cli.INTERRUPTED
    assert run("export", tmp_path / "ours", tmp_path / "out") == cli.INTERRUPTED
    assert run("convert", folder, tmp_path / "ours", "--overwrite") == cli.INTERRUPTED
    assert {p.name for p in tmp_path.iterdir()} == {"released", "ours"}
    assert {p: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3, 30])
def test_a_kill_leaves_nothing_that_looks_complete(folder, tmp_path, after):
    """SIGKILL while tensor number `after` is written; the same command then succeeds."""
    line = ["convert", str(folder), str(tmp_path / "ours")]
    code = f"""
import os, signal
from hico_jax import cli
from hico_jax.convert import native
real, count = native.Tally.add, iter(range(10**6))
def add(*args):
    if next(count) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
native.Tally.add = add
cli.main({line!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "ours").exists()
    assert run(*line) == cli.OK
    assert load.load(tmp_path / "ours").config == load.load(folder).config


def test_what_is_there_is_replaced_only_when_asked(folder, tmp_path, capsys):
    assert run("convert", folder, tmp_path / "ours") == cli.OK
    capsys.readouterr()
    assert "is not an empty folder" in refused(capsys, tmp_path, "convert", folder, tmp_path / "ours")
    assert run("convert", folder, tmp_path / "ours", "--overwrite", "--dtype", "bfloat16") == cli.OK
    capsys.readouterr()
    found = safetensors_io.open_tensors(tmp_path / "ours")
    assert {e.dtype.name for _, e in found.items_on_disk()} == {"bfloat16"}
    assert "in our layout already" in refused(capsys, tmp_path, "convert", tmp_path / "ours", tmp_path / "x")


def test_a_part_needs_a_name(folder, tmp_path, capsys):
    file = folder / "model.safetensors"
    assert "say of which with --like" in refused(capsys, tmp_path, "convert", file, tmp_path / "x")
    assert "did you mean" in refused(capsys, tmp_path, "convert", file, tmp_path / "x", "--like", "umt_qwen2_7")
