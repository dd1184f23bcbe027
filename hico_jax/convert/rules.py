"""One row per tensor, read left to right on import and right to left on export.

A `Rule` pairs a torch name with our parameter path and says how the axes move. `{i}` in the torch name is
the layer number; our side holds the layers stacked along a leading axis. Because both directions read the
same row, import and export cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """`torch` name, our `path` (joined by `/`), and the axes on both sides.

    `axes` reads like an einops pattern restricted to transposes and groups, for example
    `"(H d) D -> D H d"`; None copies. Group sizes come from `sizes`, given when the rule is applied.

    Example:
      >>> r = Rule("q.weight", "wq", "(H d) D -> D H d")
      >>> r.to_ours(np.zeros((6, 5)), {"H": 3, "d": 2}).shape
      (5, 3, 2)
      >>> r.to_torch(np.zeros((5, 3, 2))).shape
      (6, 5)
    """

    torch: str
    path: str
    axes: str | None = None
    optional: bool = False  # absent from some checkpoints (tied embeddings, for example)

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch

    def pattern(self) -> re.Pattern[str]:
        """Matches this rule's torch names; group `i` is the layer."""
        return re.compile(re.escape(self.torch).replace(re.escape("{i}"), r"(?P<i>\d+)") + r"\Z")

    def names(self, num_layers: int) -> list[str]:
        """Every torch name this rule stands for, layer by layer."""
        return [self.torch.replace("{i}", str(i)) for i in range(num_layers)] if self.stacked else [self.torch]

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The length of every named axis, from the shape of one layer of our parameter."""
        if self.axes is None:
            return {}
        right = _parse(self.axes.split("->")[1])
        flat = [name for group in right for name in group]
        return dict(zip(flat, _split_shape(shape, right, {}, self), strict=True))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the torch tensor, from the shape of one layer of our parameter."""
        if self.axes is None:
            return shape
        lengths = self.sizes(shape)
        return tuple(math.prod(lengths[n] for n in group) for group in _parse(self.axes.split("->")[0]))

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int] | None = None) -> np.ndarray:
        """One layer's torch tensor in our layout."""
        if self.axes is None:
            return tensor
        left, right = (_parse(side) for side in self.axes.split("->"))
        flat_left = [name for group in left for name in group]
        split = tensor.reshape(_split_shape(tensor.shape, left, dict(sizes or {}), self))
        moved = split.transpose([flat_left.index(name) for group in right for name in group])
        lengths = dict(zip(flat_left, split.shape, strict=True))
        return moved.reshape([int(np.prod([lengths[n] for n in group], dtype=np.int64)) for group in right])

    def to_torch(self, array: np.ndarray, sizes: Mapping[str, int] | None = None) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.axes is None:
            return array
        left, right = self.axes.split("->")
        return dataclasses.replace(self, axes=f"{right.strip()} -> {left.strip()}").to_ours(array, sizes)


def _parse(side: str) -> list[list[str]]:
    return [[name] if name else group.split() for group, name in re.findall(r"\(([^)]*)\)|(\S+)", side)]


def _split_shape(shape: tuple[int, ...], groups: list[list[str]], sizes: dict[str, int], rule: Rule) -> list[int]:
    if len(shape) != len(groups):
        raise ValueError(f"{rule.torch} has shape {shape}; its rule {rule.axes!r} expects {len(groups)} axes")
    out: list[int] = []
    for length, group in zip(shape, groups, strict=True):
        if len(group) == 1:
            out.append(length)
            continue
        literal = [int(n) if n.isdigit() else sizes.get(n, 0) for n in group]
        if literal.count(0) > 1:
            raise ValueError(f"{rule.torch}: sizes of {group} are not all given")
        known = int(np.prod([n for n in literal if n], dtype=np.int64))
        if length % known:
            raise ValueError(f"{rule.torch} has shape {shape}; {length} does not split into {group} with {sizes}")
        out.extend(n or length // known for n in literal)
    return out


def match(names: Iterable[str], rules: Iterable[Rule]) -> dict[str, tuple[Rule, int | None]]:
    """Which rule and layer each torch name belongs to; names no rule knows are left out."""
    patterns = [(rule, rule.pattern()) for rule in rules]
    found: dict[str, tuple[Rule, int | None]] = {}
    for name in names:
        for rule, pattern in patterns:
            hit = pattern.match(name)
            if hit:
                found[name] = (rule, int(hit["i"]) if rule.stacked else None)
                break
    return found
