"""Make the device mesh from four sizes, one of which may be -1, and a number of slices.

In: `MeshConfig`. Out: a `jax.sharding.Mesh` with axes `data fsdp sequence tensor`, and `slice` before them when the
devices are of several slices, between which the network is slow: only sums of gradients cross it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

SLICE = "slice"
AXES = ("data", "fsdp", "sequence", "tensor")
CONTEXTS = ("auto", "ring", "gather", "usp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the four mesh axes of a slice; -1 (at most one) takes what is left of its devices."""

    data: int = 1  # copies of the weights
    fsdp: int = -1  # weights and optimizer state split, gathered for use
    sequence: int = 1  # one long row split over devices
    tensor: int = 1  # heads and MLP split
    slices: int = 1  # TPU slices joined by the data-centre network, each with a copy of the weights
    context: str = "auto"  # attention over a split row: ring, gather, usp, or auto

    def __post_init__(self) -> None:
        sizes = self.sizes
        if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
            named = dict(zip(AXES, sizes, strict=True))
            raise ValueError(f"mesh sizes are {named}; each must be positive, at most one -1")
        if self.slices < 1:
            raise ValueError(f"mesh.slices is {self.slices}; it must be at least 1")
        if self.context not in CONTEXTS:
            raise ValueError(f"mesh.context is {self.context!r}; it must be one of {', '.join(CONTEXTS)}")

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.data, self.fsdp, self.sequence, self.tensor)

    def fitted(self, count: int) -> MeshConfig:
        """The same for `count` devices, its -1 worked out.

        Raises:
          ValueError: the sizes do not multiply to the number of devices.
        """
        if count % self.slices:
            raise ValueError(
                f"{count} devices are not {self.slices} equal slices; set mesh.slices to the number of slices"
            )
        each, sizes = count // self.slices, list(self.sizes)
        if -1 in sizes:
            sizes[sizes.index(-1)] = max(1, each // math.prod(s for s in sizes if s > 0))
        if math.prod(sizes) != each:
            of_slice = " in each slice" if self.slices > 1 else ""
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices but there are "
                f"{each}{of_slice}; change mesh.data, mesh.fsdp, mesh.sequence or mesh.tensor, or set one of them to -1"
            )
        return dataclasses.replace(self, **dict(zip(AXES, sizes, strict=True)))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh over `devices` (JAX devices; default: all).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.fitted(len(devices)).sizes
    if config.slices == 1:
        types = (AxisType.Auto,) * len(AXES)
        try:
            return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # 32 x 2 over a torus of 8 x 8: a side is split, which JAX does unasked on v5e only
            arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(arranged, AXES, axis_types=types)
    shape, names = (config.slices, *sizes), (SLICE, *AXES)
    if hasattr(devices[0], "slice_index"):
        arranged = mesh_utils.create_hybrid_device_mesh(
            (1, *sizes), (config.slices, *(1 for _ in sizes)), devices, allow_split_physical_axes=True
        )
    else:  # simulated
        arranged = np.asarray(devices).reshape(shape)
    return Mesh(arranged.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
