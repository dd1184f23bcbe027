from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from hico_jax.convert import safetensors_io as io


def some_tensors():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "odd": rng.integers(0, 9, 3).astype(np.uint8),  # what follows is not aligned
        "half": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 4), np.float16),
        "ids": np.arange(4, dtype=np.int64),
        "mask": np.array([True, False]),
    }


def specs(tensors):
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_round_trip(tmp_path):
    tensors = some_tensors()
    io.write_file(tmp_path / "x.safetensors", specs(tensors), tensors.__getitem__)
    same(io.open_tensors(tmp_path / "x.safetensors"), tensors)


def test_others_read_what_we_write(tmp_path):
    tensors = some_tensors()
    assert io.write_tensors(tmp_path, specs(tensors), tensors.__getitem__) == ["model.safetensors"]
    same(safetensors.numpy.load_file(tmp_path / "model.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]  # no temporary file is left


def test_we_read_what_others_write(tmp_path):
    tensors = some_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    same(io.open_tensors(tmp_path), tensors)


def test_shards(tmp_path):
    tensors = some_tensors()
    names = io.write_tensors(tmp_path, specs(tensors), tensors.__getitem__, max_shard_bytes=62)
    assert names[0] == "model-00001-of-00002.safetensors"
    assert names[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert all((tmp_path / n).stat().st_size < 1000 for n in names)
    same(io.open_tensors(tmp_path), tensors)


def test_views_stay_on_disk_and_are_read_only(tmp_path):
    tensors = some_tensors()
    io.write_tensors(tmp_path, specs(tensors), tensors.__getitem__)
    array = io.open_tensors(tmp_path)["a"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    tensors = some_tensors()

    def read(name):
        if name == "half":
            raise OSError("disk on fire")
        return tensors[name]

    with pytest.raises(OSError, match="on fire"):
        io.write_file(file, specs(tensors), read)
    assert file.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def write(path: pathlib.Path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "header claims": ({"a": entry()}, bytes(4), 10**12),
    "not JSON": (b"{oops", b"", None),
    "is a list": ([], b"", None),
    "a name appears twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', bytes(4), None),
    "not exactly dtype": ({"a": {"dtype": "F32"}}, bytes(4), None),
    "dtype 'F3'": ({"a": entry("F3")}, bytes(4), None),
    "whole numbers": ({"a": entry(shape=(-1,))}, bytes(4), None),
    "offsets": ({"a": entry(offsets=(0, 8))}, bytes(4), None),
    "needs 8": ({"a": entry(shape=(2,))}, bytes(4), None),
    "starts at byte": ({"a": entry(), "b": entry()}, bytes(4), None),
    "tensors end at": ({"a": entry()}, bytes(5), None),
    "dimensions": ({"a": entry(shape=(1,) * 40)}, bytes(4), None),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named(tmp_path, what):
    header, data, length = DAMAGED[what]
    with pytest.raises(ValueError, match="is damaged: .*" + what):
        io.open_tensors(write(tmp_path / "x.safetensors", header, data, length))


def test_any_damage_is_a_value_error_or_harmless(tmp_path):
    tensors = some_tensors()
    file = tmp_path / "x.safetensors"
    io.write_file(file, specs(tensors), tensors.__getitem__)
    whole, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(0, len(whole))] = rng.integers(0, 256)
        file.write_bytes(damaged[: len(whole) - int(rng.integers(0, 2)) * int(rng.integers(0, len(whole)))])
        try:
            found = io.open_tensors(file)
            total = sum(found[name].nbytes for name in found)
            assert total <= len(whole)
        except ValueError:
            refused += 1
    assert refused > 100


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        io.open_tensors(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found: pytorch_model\.bin.*pickled code"):
        io.open_tensors(tmp_path)
    with pytest.raises(ValueError, match="pickled code"):
        io.open_tensors(tmp_path / "pytorch_model.bin")


def test_an_index_stays_in_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for file in ("../x.safetensors", "/etc/passwd", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ValueError, match="only files of the same folder"):
            io.open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone\.safetensors, which is missing"):
        io.open_tensors(tmp_path)
    write(tmp_path / "gone.safetensors", {"b": entry()}, bytes(4))
    with pytest.raises(ValueError, match="says a is in gone"):
        io.open_tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        io.open_tensors(tmp_path)


def test_a_dtype_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="c is complex64"):
        io.write_file(tmp_path / "x.safetensors", {"c": (np.dtype(np.complex64), (1,))}, lambda n: np.zeros(1))
