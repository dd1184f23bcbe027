from __future__ import annotations

import dataclasses

import jax
import pytest

from hico_jax.parallel.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "count", "sizes"),
    [
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 1, 2)),
        (MeshConfig(data=-1, fsdp=1, sequence=4), 8, (2, 1, 4, 1)),
        (MeshConfig(fsdp=2, tensor=-1), 4, (1, 2, 1, 2)),
    ],
)
def test_sizes(config: MeshConfig, count: int, sizes: tuple[int, ...]) -> None:
    mesh = make_mesh(config, jax.devices()[:count])
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == sizes


def test_all_devices_are_taken_by_default() -> None:
    assert make_mesh(MeshConfig()).size == len(jax.devices()) == 8


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"each must be positive, at most one -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match=r"'tensor': 0.*each must be positive"):
        MeshConfig(tensor=0)
    with pytest.raises(ValueError, match=r"each must be positive"):
        MeshConfig(data=-2)


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(tensor=3), MeshConfig(data=16), MeshConfig(fsdp=4)])
def test_sizes_that_do_not_fit_the_devices(config: MeshConfig) -> None:
    with pytest.raises(ValueError, match=r"needs \d+ devices but there are 8; change mesh\.data"):
        make_mesh(config)


def test_sizes_are_worked_out_for_devices_that_are_not_here() -> None:
    assert MeshConfig(data=2, sequence=4, context="usp").fitted(64) == MeshConfig(2, 8, 4, 1, context="usp")
    with pytest.raises(ValueError, match=r"needs 3 devices but there are 4 in each slice"):
        MeshConfig(fsdp=3, slices=2).fitted(8)
    with pytest.raises(ValueError, match=r"5 devices are not 2 equal slices"):
        MeshConfig(slices=2).fitted(5)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made from, of a v6e that is not here."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("sizes", [(32, 2), (2, 32), (8, 8), (64, 1)])
def test_a_side_of_the_torus_may_be_split(sizes: tuple[int, int]) -> None:
    """The two that share a row are neighbours; JAX alone refuses 32 x 2 chips of 8 x 8."""
    chips = [Chip(8 * y + x, (x, y, 0)) for y in range(8) for x in range(8)]
    mesh = make_mesh(MeshConfig(1, *sizes, 1), chips)
    assert mesh.devices.shape == (1, *sizes, 1)
    assert {chip.id for chip in mesh.devices.flat} == set(range(64))
    if sizes == (32, 2):
        for one, other in mesh.devices.reshape(sizes):
            assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1
