from __future__ import annotations

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
