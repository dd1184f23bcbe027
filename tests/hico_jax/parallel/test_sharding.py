"""Which dim of which array is split, by worked examples; the rest is the compiler's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from hico_jax import registry
from hico_jax.batch import Batch
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.parallel.sharding import (
    RULES,
    ClipShare,
    batch_shardings,
    clip_share,
    put,
    row_shares,
    rows_filled,
    rows_of,
    shard,
    shardings,
    spec,
)  # fmt: skip

SIZES = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((64, 128), ("embed", "mlp"), P(("fsdp",), ("tensor",))),
        ((3, 64, 128), ("embed", "mlp"), P(None, ("fsdp",), ("tensor",))),  # three layers, stacked
        ((64, 127), ("embed", "mlp"), P(("fsdp",), None)),  # not divisible: whole
        ((64, 64), ("embed", "embed"), P(("fsdp",), None)),  # an axis is used once
        ((8, 16, 64), ("batch", "length", None), P(("data", "fsdp"), None, None)),  # one device a row
        ((2, 16, 64), ("batch", "length", "embed"), P(("data",), None, ("fsdp",))),  # fsdp is free for the width
        ((8, 4, 8, 8, 3), ("clips", None, None, None, None), P(("data", "fsdp", "tensor"), None, None, None, None)),
        ((6, 4), ("clips", None), P(("data",), None)),  # 3 is odd: two devices, no more
        ((5,), (None,), P(None)),
    ],
)
def test_spec(shape: tuple[int, ...], axes: tuple[str | None, ...], expected: P) -> None:
    assert spec(shape, axes, SIZES) == expected


def test_a_long_row_is_split() -> None:
    assert spec((1, 32, 8), ("batch", "length", None), {"data": 1, "sequence": 4}) == P(None, ("sequence",), None)


def test_an_axis_nobody_knows() -> None:
    with pytest.raises(KeyError, match=r"'widht' is not in parallel\.sharding\.RULES"):
        spec((4,), ("widht",), SIZES)


def test_nothing_is_asked_for_without_a_mesh() -> None:
    x = jnp.ones((4, 4))
    assert shard(x, "batch", None) is x
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert shard(x, "batch", None) is x


def test_an_activation_is_split_inside_a_mesh() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        y = jax.jit(lambda x: shard(x * 2.0, "batch", None))(jnp.ones((8, 3)))
    assert y.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(y, 2)


def test_every_parameter_has_its_place() -> None:
    """Also those of layers that are stacked, and without a single array."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    state = nnx.split(nnx.eval_shape(lambda: registry.model_config("nano").build(rngs=nnx.Rngs(0))))[1]
    found = shardings(state, mesh)
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(state))
    assert found["llm"]["blocks"]["mlp"]["gate"].spec == P(None, ("fsdp",), ("tensor",))
    assert found["llm"]["embedding"].spec == P(("tensor",), ("fsdp",))
    split = [s for s in jax.tree.leaves(found) if s.spec != P(*[None] * len(s.spec))]
    assert len(split) > len(jax.tree.leaves(found)) / 2  # norms and biases may stay whole


def test_a_batch_is_split_by_rows_and_long_rows_too() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, sequence=4))
    made = Batch.fake(registry.model_config("tiny").geometry(), rows=4, clips=2, text=16)
    found = batch_shardings(made, mesh)
    assert found.tokens.spec == P(("data",), ("sequence",))
    assert found.clips.spec == P(("data",), None, None, None, None, None)  # 2 clips do not divide by 4
    placed = jax.device_put(made, found)
    assert placed.tokens.addressable_shards[0].data.shape == (2, made.shape[1] // 4)


def test_the_table_names_mesh_axes_only() -> None:
    assert {axis for axes in RULES.values() for axis in axes} == {"slice", "data", "fsdp", "sequence", "tensor"}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (64, [tuple(range(4 * i, 4 * i + 4)) for i in range(16)]),  # fsdp=64: each host its own rows
        (1, [(0,)]),  # sequence=64: one row on all hosts
        (4, [(0,), (1,), (2,), (3,)]),  # fsdp=4, sequence=16: four hosts share a row
        (32, [(2 * i, 2 * i + 1) for i in range(16)]),
    ],
)
def test_which_rows_the_hosts_of_a_pod_bring(parts: int, expected: list[tuple[int, ...]]) -> None:
    assert row_shares(np.arange(64).reshape(parts, -1) // 4) == expected


def test_chips_far_apart_and_rows_that_overlap() -> None:
    scattered = np.arange(64).reshape(4, 16).T.reshape(64, 1) // 4  # as a torus may order them
    assert sorted(sum(row_shares(scattered), ())) == list(range(64))
    with pytest.raises(ValueError, match="overlap in part"):
        row_shares(np.array([[0, 0], [0, 1], [1, 1]]))


def test_rows_are_put_where_the_mesh_wants_them() -> None:
    mesh = make_mesh(MeshConfig(1, 2, 4, 1))
    batch = {"tokens": np.arange(32, dtype=np.int32).reshape(2, 16), "clips": np.zeros((2, 0, 4, 8, 8, 3), np.uint8)}
    assert rows_of(mesh) == (0, 1)
    found = put(batch, mesh)
    np.testing.assert_array_equal(found["tokens"], batch["tokens"])
    assert found["tokens"].sharding.spec == P(("fsdp",), ("sequence",))
    assert found["clips"].shape == batch["clips"].shape


def test_rows_that_do_not_divide_are_refused_or_filled_up_with_copies_that_do_not_count() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    made = Batch.fake(registry.model_config("tiny").geometry(), rows=6, clips=1)
    with pytest.raises(ValueError, match=r"6 rows cannot be split over slice x data x fsdp = 4 .* a multiple of 4"):
        put(made, mesh)
    filled = rows_filled(made, mesh, 2)
    assert len(put(filled, mesh).clips) == 8
    for new, old in zip(jax.tree.leaves(filled), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(new[:6], old)
    np.testing.assert_array_equal(filled.clips[6:], made.clips[[5, 5]])
    assert not filled.weights[6:].any()
    assert made.weights[5].any()
    assert rows_filled(filled, mesh, 2) is filled


@pytest.mark.parametrize("count", [16, 12, 6, 7])
@pytest.mark.parametrize(("sequence", "tensor"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_process_decodes_the_clips_of_its_devices(count: int, sequence: int, tensor: int) -> None:
    mesh = make_mesh(MeshConfig(1, 1, sequence, tensor))
    where = batch_shardings({"clips": jax.ShapeDtypeStruct((1, count, 4, 8, 8, 3), np.uint8)}, mesh)["clips"]
    parts = where.devices_indices_map((1, count, 4, 8, 8, 3))
    places = np.array([d.id for d in mesh.devices.flat]).reshape(sequence, tensor)
    for mine in ({0, 1, 2, 3}, {2, 5}):
        expected = np.zeros(count, bool)
        for device, index in parts.items():
            if device.id in mine:
                expected[index[1]] = True
        share = ClipShare((sequence, tensor), tuple(map(tuple, np.argwhere(np.isin(places, list(mine))).tolist())))
        np.testing.assert_array_equal(share(count), expected)
    assert clip_share(mesh) is None  # one process has all of them
