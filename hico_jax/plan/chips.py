"""What a chip can do, and which chips a name stands for.

Peaks and links are the vendors' published figures; `link` is one link, one way, of the axis a ring runs along.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator."""

    name: str
    peak: float  # bf16 FLOP/s
    memory: float  # bytes of HBM
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s
    links: int  # that a gather over all devices can use at once
    tpu: bool = True
    dims: int = 2  # of the torus

    @property
    def ratio(self) -> float:
        """FLOPs per byte sent at which compute and one link take equal time."""
        return self.peak / self.link


_G = 2.0**30
CHIPS = {
    c.name: c
    for c in (
        Chip("v5e", 197e12, 16 * _G, 820e9, 45e9, 2),
        Chip("v5p", 459e12, 95 * _G, 2765e9, 90e9, 3, dims=3),
        Chip("v6e", 918e12, 32 * _G, 1640e9, 90e9, 2),
        Chip("a100", 312e12, 80e9, 2039e9, 300e9, 1, tpu=False),
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, 1, tpu=False),
        Chip("h200", 989e12, 141e9, 4800e9, 450e9, 1, tpu=False),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of one kind, in slices."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As the TPU compiler reads it; one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @classmethod
    def parse(cls, text: str) -> Topology:
        """`v5p:4x4x4`, two slices of it `2*v5p:4x4x4`, or GPUs `h100:8`.

        Raises:
          ValueError: it does not read so, or the chip is unknown.

        Example:
          >>> Topology.parse("2*v5e:4x8").count
          64
        """
        found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text.strip().lower())
        if not found:
            raise ValueError(
                f"--topology is {text!r}; it reads CHIP:SHAPE, for example v5p:4x4x4, 2*v5e:8x8 (two slices) or h100:8"
            )
        slices, name, shape = int(found[1] or 1), found[2], tuple(int(n) for n in found[3].split("x"))
        if name not in CHIPS:
            near = difflib.get_close_matches(name, CHIPS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known chips are {', '.join(CHIPS)}"
            raise ValueError(f"--topology names the chip {name!r}; {hint}")
        chip = CHIPS[name]
        if 0 in shape or slices < 1 or (chip.tpu and len(shape) != chip.dims):
            example = "x".join(["4"] * chip.dims) if chip.tpu else "8"
            raise ValueError(f"--topology is {text!r} but a slice of {name} reads {name}:{example}, for example")
        return cls(chip, shape, slices)
