from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from hico_jax import checkpoint
from hico_jax.checkpoint import Checkpointer
from hico_jax.config import CheckpointConfig
from hico_jax.parallel import sharding
from hico_jax.parallel.mesh import MeshConfig, make_mesh

PARAMS = {"llm": {"w": np.arange(64, dtype=np.float32).reshape(8, 8), "b": np.ones(8, np.float32)}}
MOMENTS = {"0": {"mu": {"llm": {"w": np.full((8, 8), 0.5, np.float32)}}, "count": np.int32(3)}}


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def wanted(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays(tree))


def save(folder: pathlib.Path, *steps: int, keep: int = 5) -> None:
    saved = Checkpointer(str(folder), CheckpointConfig(keep=keep))
    for step in steps:
        params = jax.tree.map(lambda a, step=step: a + step, arrays(PARAMS))
        saved.save(step, params, arrays(MOMENTS), {"data": {"position": step}, "config": {}})
    saved.close()


def restore(folder: pathlib.Path, params: Any = PARAMS) -> checkpoint.Restored:
    saved = Checkpointer(str(folder), CheckpointConfig())
    try:
        return saved.restore(wanted(params), wanted(MOMENTS))
    finally:
        saved.close()


def test_what_is_saved_comes_back(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 2, 5)
    found = restore(tmp_path)
    assert checkpoint.latest_step(str(tmp_path)) == found.meta["step"] == 5
    assert found.meta["data"] == {"position": 5}
    np.testing.assert_array_equal(found.params["llm"]["w"], PARAMS["llm"]["w"] + 5)
    np.testing.assert_array_equal(found.optimizer["0"]["count"], 3)
    alone = checkpoint.load_params(str(tmp_path), wanted(PARAMS))
    np.testing.assert_array_equal(alone.params["llm"]["b"], PARAMS["llm"]["b"] + 5)
    assert alone.optimizer is None


def test_a_folder_may_be_named_from_here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(pathlib.Path("run"), 2)
    found = restore(pathlib.Path("run"))
    np.testing.assert_array_equal(found.params["llm"]["w"], PARAMS["llm"]["w"] + 2)
    assert found.meta["step"] == 2
    assert checkpoint.load_params("run", wanted(PARAMS)).meta["step"] == 2
    assert not found.skipped


def test_the_newest_are_kept(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1, 2, 3, keep=2)
    saved = Checkpointer(str(tmp_path), CheckpointConfig())
    assert saved.steps() == [2, 3]
    saved.close()


def on_mesh(tree: Any) -> Any:
    mesh = make_mesh(MeshConfig(1, 4, 1, 2))
    sizes = dict(mesh.shape)
    axes = {2: ("embed", "mlp"), 1: (None,), 0: ()}
    return jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, sharding.spec(a.shape, axes[a.ndim], sizes))), arrays(tree)
    )


def test_it_comes_back_on_another_mesh(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    places = wanted(on_mesh(PARAMS))
    found = checkpoint.load_params(str(tmp_path), places).params["llm"]["w"]
    assert found.sharding == places["llm"]["w"].sharding
    np.testing.assert_array_equal(found, PARAMS["llm"]["w"] + 1)


def test_it_comes_back_from_a_mesh_to_one_device(tmp_path: pathlib.Path) -> None:
    saved = Checkpointer(str(tmp_path), CheckpointConfig())
    saved.save(1, on_mesh(PARAMS), on_mesh(MOMENTS), {})
    saved.close()
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays(PARAMS))
    found = checkpoint.load_params(str(tmp_path), abstract).params["llm"]["w"]
    assert len(found.devices()) == 1
    np.testing.assert_array_equal(found, PARAMS["llm"]["w"])


def test_all_differences_are_told_at_once(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    other = {"llm": {"w": np.zeros((8, 9), np.float32), "norm": np.zeros(3, np.float32)}}
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        restore(tmp_path, other)
    text = str(caught.value)
    assert "params/llm/w: found 8x8 float32, expected 8x9 float32" in text
    assert "params/llm/norm: absent, expected 3 float32" in text
    assert "params/llm/b: found 8 float32, expected nothing" in text


def damage(folder: pathlib.Path, step: int) -> None:
    """Write other numbers of the same shape, as a flipped bit that no compression notices would."""
    inner = folder / checkpoint.FOLDER / str(step)
    other = Checkpointer(str(folder / "other"), CheckpointConfig())
    changed = jax.tree.map(lambda a: a + step, arrays(PARAMS))
    changed["llm"]["w"] = jnp.asarray(changed["llm"]["w"]).at[3, 4].mul(1.0000001)
    other.save(step, changed, arrays(MOMENTS), {})
    other.close()
    (inner / "params").rename(inner / "was")
    (folder / "other" / checkpoint.FOLDER / str(step) / "params").rename(inner / "params")


def test_a_damaged_checkpoint_is_passed_over_and_can_be_saved_again(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path, 2)
    assert restore(tmp_path).meta["step"] == 1
    save(tmp_path, 2)
    found = restore(tmp_path)
    assert found.meta["step"] == 2
    np.testing.assert_array_equal(found.params["llm"]["w"], PARAMS["llm"]["w"] + 2)


def test_damage_without_another_checkpoint_is_an_error(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    damage(tmp_path, 1)
    with pytest.raises(ValueError, match="params/llm/w is not what was written"):
        restore(tmp_path)
    with pytest.raises(ValueError, match="params/llm/w is not what was written"):
        checkpoint.load_params(str(tmp_path), wanted(PARAMS))


def test_an_unreadable_file_is_damage(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    (tmp_path / checkpoint.FOLDER / "1" / "meta" / "metadata").write_text("{")
    with pytest.raises(ValueError, match="meta cannot be read"):
        restore(tmp_path)


def test_what_a_killed_save_leaves_is_ignored(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / checkpoint.FOLDER
    (folder / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (folder / "3").mkdir()  # begun, without its last item
    assert checkpoint.latest_step(str(tmp_path)) == 1
    (folder / "3").rmdir()
    assert restore(tmp_path).meta["step"] == 1


def test_a_run_without_checkpoint(tmp_path: pathlib.Path) -> None:
    assert checkpoint.latest_step(str(tmp_path)) is None
    with pytest.raises(ValueError, match=r"holds no checkpoint.*init\.parent"):
        checkpoint.load_params(str(tmp_path), wanted(PARAMS))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16, np.uint8, np.bool_])
def test_any_flipped_bit_changes_the_digest(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, (3, 5, 7)).astype(dtype)
    clean = checkpoint.manifest({"a": jnp.asarray(array)})["a"]["digest"]
    for _ in range(20):
        flipped = array.copy()
        raw = flipped.view(np.uint8).reshape(-1)
        raw[rng.integers(raw.size)] ^= 1 if dtype is np.bool_ else 1 << int(rng.integers(8))
        assert checkpoint.manifest({"a": jnp.asarray(flipped)})["a"]["digest"] != clean
    moved = np.roll(array, 1) if not np.array_equal(np.roll(array, 1), array) else array + 1
    assert checkpoint.manifest({"a": jnp.asarray(moved)})["a"]["digest"] != clean


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16, np.uint8, np.bool_])
def test_numpy_and_the_device_agree_on_digests(dtype: Any) -> None:
    array = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 5, 7)).astype(dtype))
    assert list(checkpoint._digest_here(np.asarray(array))) == checkpoint._digests([array])[0].tolist()


def test_a_digest_does_not_depend_on_the_layout() -> None:
    assert checkpoint.manifest(arrays(PARAMS)) == checkpoint.manifest(on_mesh(PARAMS))
