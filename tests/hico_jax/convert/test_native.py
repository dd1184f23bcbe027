from __future__ import annotations

import argparse
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from hico_jax.convert import command, load, native
from hico_jax.convert.export import export
from hico_jax.parallel.mesh import MeshConfig, make_mesh


def convert(source, target, **changes):
    settings = {"like": None, "allow_pickle": False, "tokens_per_frame": None, "dtype": None, "overwrite": False}
    settings |= {"max_shard_bytes": 20_000} | changes
    command.main_convert(argparse.Namespace(source=source, target=target, **settings))
    return target


@pytest.fixture
def folder(tmp_path, tiny_model):
    return convert(export(tiny_model, tmp_path / "released"), tmp_path / "ours")


def test_it_comes_back_bit_for_bit_and_on_a_mesh(folder, tiny_model):
    assert len(list(folder.glob("*.safetensors"))) > 3
    found = load.load(folder)
    assert found.config == tiny_model.config
    spread = load.load(folder, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2))).model
    for a, b, c in zip(*map(jax.tree.leaves, (found.model, spread, tiny_model)), strict=True):
        assert a.dtype == b.dtype == c.dtype
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)
    half = load.load(folder, dtype="bfloat16").model
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


def test_a_part_of_it_starts_a_model_but_is_none(tmp_path, tiny_model, folder):
    tensors = safetensors.numpy.load_file(tmp_path / "released" / "model.safetensors")
    chosen = {n: t for n, t in tensors.items() if "mm_projector" in n}
    safetensors.numpy.save_file(chosen, tmp_path / "projector.safetensors")
    part = convert(tmp_path / "projector.safetensors", tmp_path / "part", like="tiny")
    with pytest.raises(ValueError, match="holds a part of a model only"):
        load.load(part)
    blank = jax.tree.map(lambda p: p * 0, tiny_model)
    model, paths = load.load_into(blank, [part])
    assert {path.split("/")[0] for path in paths} == {"projector"}
    np.testing.assert_array_equal(model.projector.first.w[...], tiny_model.projector.first.w[...])
    whole, paths = load.load_into(blank, [folder])
    np.testing.assert_array_equal(whole.llm.norm.scale[...], tiny_model.llm.norm.scale[...])


def test_a_folder_that_does_not_fit_its_config(folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["released"]["intermediate_size"] = 50
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"llm/blocks/mlp/gate: found \(3, 32, 48\), expected \(3, 32, 50\)"):
        load.load(folder)


def test_the_receipt(tmp_path):
    tally = native.Tally()
    for name, value in (("a", np.ones((2, 3), np.float32)), ("b", np.zeros(4, np.float16))):
        tally.add(name, f"llm/{name}", value)
    receipt = tally.receipt()
    assert (receipt.parameters, receipt.bytes) == ({"llm": 10}, 32)
    other = native.Tally()
    other.add("a", "llm/a", np.ones((2, 3), np.float32).T.copy().T)  # another layout in memory, the same tensor
    other.add("b", "llm/b", np.zeros(4, np.float16))
    assert other.receipt().checksum == receipt.checksum
    other.add("c", "llm/c", np.zeros(1))
    assert other.receipt().checksum != receipt.checksum
    assert receipt.text("imported", "X").startswith("imported 10 parameters (llm 10) to X\n32 bytes in ")
