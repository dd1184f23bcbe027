from __future__ import annotations

import contextlib
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest

from hico_jax.convert import pickles, safetensors_io
from tests.hico_jax.convert import pickled

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "count": np.array(7),
}


@pytest.mark.parametrize("wrap", ["", "state_dict", "module"])
def test_tensors_are_read_where_they_lie(tmp_path, wrap):
    file = tmp_path / "x.pt"
    pickled.save(file, TENSORS, wrap=wrap)
    found = safetensors_io.Tensors(pickles.read_pickle(file))
    assert set(found) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


class Hostile:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call", [os.mkdir, eval, getattr])
def test_code_is_refused_and_never_run(tmp_path, call):
    mark = tmp_path / "ran"
    argument = {os.mkdir: (str(mark),), eval: (f"__import__('os').mkdir({str(mark)!r})",), getattr: ("a", "upper")}[
        call
    ]
    file = tmp_path / "x.pt"
    pickled.save(file, TENSORS, extra=Hostile(call, *argument))
    with pytest.raises(ValueError, match=f"is refused: it asks for .*{call.__name__}.*Nothing in it was run"):
        pickles.read_pickle(file)
    assert not mark.exists()


def test_damaged_files(tmp_path):
    file = tmp_path / "x.pt"
    pickled.save(file, TENSORS)
    whole = file.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=str(file)):
            pickles.read_pickle(file)
    pickled.save(file, TENSORS, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        pickles.read_pickle(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        pickles.read_pickle(file)


def test_what_is_not_tensors_by_name(tmp_path):
    file = tmp_path / "x.pt"
    pickled.save(file, {})
    with pytest.raises(ValueError, match="holds no tensors"):
        pickles.read_pickle(file)
    pickled.save(file, {"t": np.zeros((2, 3), np.float32).T})
    with pytest.raises(ValueError, match="t is not contiguous"):
        pickles.read_pickle(file)


def test_random_bytes_in_the_pickle_never_pass_as_something_else(tmp_path):
    """Any change to the pickle gives tensors or one ValueError; never a call, never another error."""
    file, rng = tmp_path / "x.pt", np.random.default_rng(0)
    pickled.save(file, TENSORS)
    with zipfile.ZipFile(file) as archive:
        parts = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    for _ in range(200):
        data = parts["archive/data.pkl"].copy()
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        with zipfile.ZipFile(file, "w") as archive:
            for name, part in (parts | {"archive/data.pkl": data}).items():
                archive.writestr(name, bytes(part))
        with contextlib.suppress(ValueError):
            pickles.read_pickle(file)
