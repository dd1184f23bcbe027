from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from hico_jax.convert import load
from hico_jax.convert.export import export
from hico_jax.models import layers
from hico_jax.parallel.mesh import MeshConfig, make_mesh

TOWER = "model.vision_tower.vision_tower.encoder."


@pytest.fixture
def folder(tmp_path, tiny_model):
    return export(tiny_model, tmp_path / "tiny")


def edit(folder, change):
    """Rewrite the weights of a folder after `change(tensors)`."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_recorded_checkpoint(golden):
    config, model, raw = load.load(golden.folder / "F_umt224_ckpt")
    assert (config.vision.num_blocks, config.vision.embed_dim, config.llm.num_layers) == (2, 64, 6)
    assert (config.max_length, config.dtype, config.drop.kind) == (4096, "float32", "none")
    assert raw == golden.json("F_umt224_ckpt/config.json")
    tensors = golden.tensors("F_umt224_ckpt/model.safetensors")
    assert layers.num_params(model) == sum(t.size for t in tensors.values()) == 445_824
    qkv = tensors[f"{TOWER}blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(model.vision.blocks.attn.wqkv[...][1, :, 2, 3, 5], qkv[2 * 64 + 3 * 16 + 5])
    conv = tensors[f"{TOWER}patch_embed.proj.weight"]
    np.testing.assert_array_equal(model.vision.patch.w[...][4, 9, 2], conv[:, 2, 0, 4, 9])
    up = tensors["model.layers.3.mlp.up_proj.weight"]
    np.testing.assert_array_equal(model.llm.blocks.mlp.up[...][3], up.T)
    np.testing.assert_array_equal(model.projector.second.w[...], tensors["model.mm_projector.mlp.2.weight"].T)


def test_parameter_and_activation_types(folder, tiny_model):
    _, half, _ = load.load(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    equal(half, jax.tree.map(lambda p: p.astype("bfloat16"), tiny_model))
    config, same, _ = load.load(folder, activations="bfloat16")
    assert config.dtype == same.config.dtype == "bfloat16"
    equal(same, tiny_model)


def test_weights_are_never_random_first(folder, monkeypatch):
    """Nothing is drawn: the model exists as shapes until its tensors come."""
    drawn = []
    real = jax.random.normal

    def normal(key, *args, **kwargs):
        drawn.append(isinstance(key, jax.core.Tracer))
        return real(key, *args, **kwargs)

    monkeypatch.setattr(jax.random, "normal", normal)
    load.load(folder)
    assert drawn
    assert all(drawn)


def test_onto_a_mesh(folder, tiny_model, monkeypatch):
    """Each shard is read from disk as it is: a parameter that is spread is never whole in memory."""
    read = []
    real = load.Part.__getitem__

    def recorded(part, index):
        made = real(part, index)
        read.append((part._rule.path, made.shape))
        return made

    monkeypatch.setattr(load.Part, "__getitem__", recorded)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, model, _ = load.load(folder, mesh=mesh)
    equal(model, tiny_model)
    leaves = load.by_path(nnx.split(model)[1])
    assert {path for path, _ in read} == set(leaves)
    assert all(shape == leaves[path].sharding.shard_shape(leaves[path].shape) for path, shape in read)
    split = [leaf for leaf in jax.tree.leaves(model) if leaf.sharding.shard_shape(leaf.shape) != leaf.shape]
    assert len(split) > 20
    assert model.vision.blocks.up.w.get_metadata("axes") == ("vision_embed", "mlp")


def test_every_difference_is_listed_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.image_newline"] = np.zeros(3, np.float32)
        tensors[f"{TOWER}blocks.0.mlp.fc1.weight"] = np.zeros((7, 32), np.float32)
        tensors[f"{TOWER}blocks.2.mlp.fc1.bias"] = np.zeros(128, np.float32)

    edit(folder, change)
    with pytest.raises(ValueError, match="5 tensors differ") as error:
        load.load(folder)
    for line in (
        "model.norm.weight  (ours: llm/norm/scale): found missing, expected (32,)",
        "model.layers.1.mlp.up_proj.weight  (ours: llm/blocks/mlp/up): found missing, expected (48, 32)",
        "model.image_newline  (ours: -): found (3,), expected no such tensor",
        f"{TOWER}blocks.0.mlp.fc1.weight  (ours: vision/blocks/up/w): found (7, 32), expected (128, 32)",
        f"{TOWER}blocks.2.mlp.fc1.bias  (ours: vision/blocks/up/b): found (128,), expected 2 layers",
    ):
        assert line in str(error.value)


def test_tied_embeddings_may_be_stored_twice(folder, tiny_model):
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    equal(load.load(folder).model, tiny_model)


def test_untied_embeddings_must_be_there(tmp_path, tiny_untied):
    folder = export(tiny_untied, tmp_path / "untied")
    equal(load.load(folder).model, tiny_untied)
    edit(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight .*found missing, expected \(64, 32\)"):
        load.load(folder)


def test_a_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="does not exist; give a folder"):
        load.load(folder)


def test_the_file_may_go_after_loading(folder, tiny_model):
    model = load.load(folder).model
    (folder / "model.safetensors").write_bytes(b"")
    shutil.rmtree(folder)
    equal(model, tiny_model)


def test_parts_into_a_model(tmp_path, tiny_model):
    tensors = safetensors.numpy.load_file(export(tiny_model, tmp_path / "a") / "model.safetensors")
    for part, start in (("llm", r"model\.(layers|norm|embed)"), ("projector", r"model\.mm_projector")):
        chosen = {name: t for name, t in tensors.items() if re.match(start, name)}
        safetensors.numpy.save_file(chosen, tmp_path / f"{part}.safetensors")
    blank = jax.tree.map(lambda p: p * 0, tiny_model)
    model, paths = load.load_into(blank, [tmp_path / "llm.safetensors", tmp_path / "projector.safetensors"])
    equal(model.llm, tiny_model.llm)
    equal(model.projector, tiny_model.projector)
    equal(model.vision, blank.vision)
    wanted = load.by_path(nnx.split(tiny_model)[1])
    assert set(paths) == {path for path in wanted if not path.startswith("vision")}


def test_parts_that_do_not_fit(tmp_path, tiny_model):
    file = tmp_path / "x.safetensors"
    for tensors, what in (
        ({"other": np.zeros(1)}, "other  .*expected no such tensor"),
        ({"model.norm.weight": np.zeros(3)}, r"found \(3,\), expected \(32,\)"),
        ({"model.layers.0.mlp.up_proj.weight": np.zeros((48, 32))}, r"layers\.1\.mlp\.up_proj.*missing"),
        ({}, "none of its 0 tensors"),
    ):
        safetensors.numpy.save_file(tensors, file)
        with pytest.raises(ValueError, match=what):
            load.load_into(tiny_model, [file])


def test_config_is_read_back(folder, tiny_model):
    config, _, raw = load.load(folder)
    assert config == tiny_model.config
    assert raw == json.loads((folder / "config.json").read_text())
