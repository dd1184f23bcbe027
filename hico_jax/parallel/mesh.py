"""Make the device mesh from four sizes, one of which may be -1.

In: `MeshConfig`. Out: a `jax.sharding.Mesh` with axes `data fsdp sequence tensor`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the four mesh axes; -1 (at most one) takes what is left of the devices."""

    data: int = 1  # copies of the weights
    fsdp: int = -1  # weights and optimizer state split, gathered for use
    sequence: int = 1  # one long row split over devices
    tensor: int = 1  # heads and MLP split

    def __post_init__(self) -> None:
        sizes = self.sizes
        if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
            named = dict(zip(AXES, sizes, strict=True))
            raise ValueError(f"mesh sizes are {named}; each must be positive, at most one -1")

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.data, self.fsdp, self.sequence, self.tensor)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh over `devices` (JAX devices; default: all).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = list(config.sizes)
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices but there are "
            f"{len(devices)}; change mesh.data, mesh.fsdp, mesh.sequence or mesh.tensor, or set one of them to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
