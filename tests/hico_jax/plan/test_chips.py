from __future__ import annotations

import pytest

from hico_jax.plan.chips import Topology


@pytest.mark.parametrize(
    ("text", "count", "slices", "name"),
    [
        ("v5p:4x4x4", 64, 1, "v5p:4x4x4"),
        ("2*v5e:4x8", 64, 2, "v5e:4x8"),
        ("h100:8", 8, 1, "h100:8"),
        ("V6E:8x8", 64, 1, "v6e:8x8"),
    ],
)
def test_names(text: str, count: int, slices: int, name: str) -> None:
    found = Topology.parse(text)
    assert (found.count, found.slices, found.name) == (count, slices, name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5p", "reads CHIP:SHAPE"),
        ("v5q:4x4x4", "did you mean v5"),
        ("tpu9:4x4", "known chips are v5e"),
        ("v5p:4x4", "a slice of v5p reads v5p:4x4x4"),
        ("v5e:0x4", "a slice of v5e reads v5e:4x4"),
    ],
)
def test_mistakes(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Topology.parse(text)
