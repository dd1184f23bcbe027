from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from hico_jax.convert import load, safetensors_io
from hico_jax.convert.export import export


def test_recorded_checkpoint_comes_back_bit_for_bit(golden, tmp_path):
    source = golden.folder / "F_umt224_ckpt"
    _, model, raw = load.load(source)
    folder = export(model, tmp_path / "out", raw=raw, files=[source / "generation_config.json"])
    before, after = (safetensors.numpy.load_file(f / "model.safetensors") for f in (source, folder))
    shapes = golden.json("F_umt224_ckpt/state_dict_keys.json")
    assert set(after) == set(before) == set(shapes)
    for name, tensor in after.items():
        assert list(tensor.shape) == shapes[name]
        assert tensor.dtype == before[name].dtype
        assert tensor.tobytes() == before[name].tobytes(), name
    assert json.loads((folder / "config.json").read_text()) == raw
    assert (folder / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
def test_round_trip(tmp_path, tiny_untied, limit):
    folder = export(tiny_untied, tmp_path / "out", max_shard_bytes=limit)
    files = sorted(p.name for p in folder.iterdir())
    assert ("model.safetensors" in files) == (limit > 20_000)
    config, model, raw = load.load(folder)
    assert config == tiny_untied.config
    assert raw["torch_dtype"] == "bfloat16"
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(tiny_untied), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_ends_an_answer_is_written(tmp_path, tiny_model):
    """What a file says goes first, then `config.json`, then what the caller knows of the tokenizer."""

    def told(name, **options):
        return json.loads((export(tiny_model, tmp_path / name, **options) / "generation_config.json").read_text())

    assert told("nothing") == {"_from_model_config": True}
    assert told("tokenizer", eos=(7, 5)) == {"_from_model_config": True, "eos_token_id": [7, 5]}
    raw = json.loads((tmp_path / "nothing" / "config.json").read_text()) | {"eos_token_id": 9}
    assert told("config", eos=(7, 5), raw=raw)["eos_token_id"] == 9
    file = tmp_path / "tokenizer" / "generation_config.json"
    assert told("file", eos=(1,), raw=raw, files=[file])["eos_token_id"] == [7, 5]


def test_tied_embeddings_are_written_once(tmp_path, tiny_model):
    names = set(safetensors_io.open_tensors(export(tiny_model, tmp_path / "out")))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_in_another_dtype(tmp_path, tiny_model):
    folder = export(tiny_model, tmp_path / "out", dtype="bfloat16")
    config, model, raw = load.load(folder)
    assert raw["torch_dtype"] == "bfloat16"
    assert config.dtype == "float32"  # of activations: kept
    np.testing.assert_array_equal(model.llm.norm.scale[...], tiny_model.llm.norm.scale[...].astype("bfloat16"))


def test_nothing_is_overwritten_unasked(tmp_path, tiny_model):
    folder = tmp_path / "out"
    folder.mkdir()
    export(tiny_model, folder)  # empty: fine
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export(tiny_model, folder)
    assert (folder / "notes.txt").exists()
    export(tiny_model, folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="exists"):
        export(tiny_model, tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]  # no temporary is left


def test_a_failed_export_leaves_what_was_there(tmp_path, tiny_model, monkeypatch):
    folder = export(tiny_model, tmp_path / "out")
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_io, "write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export(tiny_model, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_missing_files_are_named_before_anything_is_written(tmp_path, tiny_model):
    with pytest.raises(ValueError, match=r"cannot copy .*tokenizer\.json: no such file"):
        export(tiny_model, tmp_path / "out", files=[tmp_path / "tokenizer.json"])
    assert not list(tmp_path.iterdir())
