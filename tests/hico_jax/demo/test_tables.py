"""Tables from results made by hand."""

from __future__ import annotations

from typing import Any

from hico_jax.demo import tables


def summary(right: int) -> dict[str, Any]:
    return {"asked": 8, "right": right, "share": right / 8, "low": 0.1, "high": 0.9}


def counted(right: int) -> dict[str, Any]:
    return {"by_kind": {"card_colour": summary(right), "card_shape": summary(1)}, "total": summary(right)}


def test_shares() -> None:
    assert tables.percent(None) == "-"
    assert tables.percent(0.125) == "12.5 %"


def test_a_row_of_compression_says_what_is_kept() -> None:
    found = counted(6) | {"name": "even", "kept": 0.25, "visual_tokens": 1000, "seconds": 0.5}
    assert tables.row(found) == ["even", "1,000 -> 250", "0.50", "75.0 %", "10.0 % to 90.0 %"]
    assert tables.row(found | {"kept": None})[1] == "1,000"


def test_every_stage_has_a_row() -> None:
    made = tables.stages_table({"first": counted(6) | {"px": 64}, "last": counted(4) | {"px": 80}, "seconds": 16})
    assert [r[:2] for r in made["rows"]] == [["first", "64 px"], ["last", "80 px"]]
    assert made["rows"][1][4] == "50.0 %"


def test_kinds_tell_unseen_pairs_apart() -> None:
    made = tables.kinds_table(counted(6) | {"unseen": counted(2) | {"seconds": 16}})
    assert [r[0] for r in made["rows"]] == [
        "card colour",
        "card shape",
        "card colour, unseen pair (16 s)",
        "card shape, unseen pair (16 s)",
    ]
