"""The contract: schedules that make sense, the made-up batch, shapes without arrays."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hico_jax import batch
from hico_jax.batch import Batch, DropPlan, DropSchedule, Geometry

GEOMETRY = Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=6, tokens_per_image=3, max_length=64)


@pytest.mark.parametrize(
    ("kind", "uniform"),
    [("none", 0), ("uniform", 3), ("attention", 0), ("uniform0_attention", 1), ("uniform1_attention", 2)],
)
def test_which_stages_are_even(kind: str, uniform: int) -> None:
    schedule = DropSchedule(kind, (1, 3, 4), (1.0, 0.5, 0.25, 0.125)) if kind != "none" else DropSchedule()
    assert schedule.num_stages == (0 if kind == "none" else 3)
    assert schedule.num_uniform == uniform


def test_what_is_kept_is_counted_in_python_floats() -> None:
    """0.29 * 100 is 28.999...: the reference keeps 28, and so do we."""
    assert DropSchedule("uniform", (1,), (1.0, 0.29)).kept(100) == (28,)
    assert DropSchedule("uniform", (1, 2), (1.0, 0.5, 0.0)).kept(7) == (3, 0)
    assert DropSchedule().kept(100) == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evenly", (1,), (1.0, 0.5)), "drop.kind is 'evenly'; it must be one of none, uniform"),
        (("uniform", (), (1.0,)), "give increasing layer counts"),
        (("uniform", (0,), (1.0, 0.5)), "the first at least 1"),
        (("uniform", (2, 2), (1.0, 0.5, 0.5)), "give increasing layer counts"),
        (("uniform", (2, 1), (1.0, 0.5, 0.5)), "give increasing layer counts"),
        (("uniform", (1,), (1.0,)), "give one more ratio than layers"),
        (("uniform", (1,), (0.9, 0.5)), "the first 1.0"),
        (("uniform", (1, 2), (1.0, 0.5, 0.6)), "must not rise"),
        (("uniform", (1,), (1.0, -0.1)), "lie in"),
    ],
)
def test_schedules_that_make_no_sense(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DropSchedule(*arguments)


def test_a_made_up_batch_keeps_the_contract() -> None:
    made = Batch.fake(GEOMETRY, rows=3, clips=2, images=1, text=10, vocab=32, seed=4)
    assert made.shape == (3, 10 + 2 * 6 + 3)
    assert made.clips.shape == (3, 2, 4, 8, 8, 3)
    assert made.images.shape == (3, 1, 8, 8, 3)
    assert (made.slots[0][made.slots[0] >= 0] == np.arange(15)).all()
    assert (made.tokens[made.slots >= 0] == 0).all()
    assert made.tokens[made.slots < 0].min() > 0
    learnt = made.weights > 0
    assert learnt.sum(1).tolist() == [4, 4, 4]  # half of the text after the visual tokens, less the last
    following = np.roll(made.tokens, -1, axis=1)
    assert (made.targets[learnt] == following[learnt]).all()
    again = Batch.fake(GEOMETRY, rows=3, clips=2, images=1, text=10, vocab=32, seed=4)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True))


def test_a_batch_without_its_arrays() -> None:
    made = Batch.fake(GEOMETRY, clips=0)
    shapes = batch.abstract(made)
    assert shapes.clips.shape == (2, 0, 4, 8, 8, 3)
    for array, shape in zip(jax.tree.leaves(made), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


def test_what_decides_shapes_is_no_array() -> None:
    """`lengths` and `num_queries` must be known when a program is compiled."""
    plan = DropPlan(np.zeros((1, 4), np.int8), np.zeros((1, 1, 2), np.int32), np.zeros((1, 4), bool), (3, 2), 1)
    assert len(jax.tree.leaves(plan)) == 3
    other = plan.replace(lengths=(4, 2))  # type: ignore[attr-defined]
    assert jax.tree.structure(plan) != jax.tree.structure(other)
