"""Questions by kind of task."""

from __future__ import annotations

import pathlib

import pytest

from hico_jax.evals.compress import world


def test_every_kind_of_task_is_asked(tmp_path: pathlib.Path) -> None:
    found = world.items(tmp_path, 2, 8, 5, chains=2)
    assert {item.groups["task"] for item in found} == set(world.TASKS)
    assert {item.groups["kind"] for item in found if item.groups["task"] == "multi-hop"} == {
        "chain_colour", "chain_shape"
    }  # fmt: skip
    assert len({item.id for item in found}) == len(found)
    assert all(pathlib.Path(item.video).is_file() for item in found)
    assert all(item.expected in item.options for item in found)
    assert world.items(tmp_path, 2, 8, 5) == [i for i in found if i.groups["task"] != "multi-hop"]
    assert [i.expected for i in world.items(tmp_path / "other", 2, 8, 6)] != [i.expected for i in found]
    assert 0.1 < world.chance(found) < 0.5


@pytest.mark.parametrize(("said", "right"), [("red", 1), ("Red.", 1), ("blue", 0), ("", 0), ("red card", 0)])
def test_an_answer_is_a_word(said: str, right: int, tmp_path: pathlib.Path) -> None:
    item = world.Item(id="x", source="", groups={}, expected="red")
    assert world._judge(item, said).score == right
    assert world.BENCHMARK.own is world._judge
