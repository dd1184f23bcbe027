"""How rows are dealt to devices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hico_jax import registry
from hico_jax.batch import Batch, DropPlan
from hico_jax.parallel import zigzag


@pytest.mark.parametrize("ring", [1, 2, 3, 8])
def test_every_token_is_dealt_once_and_work_is_equal(ring: int) -> None:
    places = zigzag.order(48, ring)
    assert sorted(places) == list(range(48))
    work = (places + 1).reshape(ring, -1).sum(1)  # keys that each device's queries see
    assert (work == work[0]).all()


def test_a_length_that_cannot_be_dealt() -> None:
    with pytest.raises(ValueError, match=r"multiple of 8, for example 16"):
        zigzag.order(12, 4)


def batch() -> Batch:
    made = Batch.fake(registry.model_config("tiny").geometry(), rows=2, clips=2, text=11)
    length = made.shape[1]
    plan = DropPlan(
        survives=np.full((2, length), 3, np.int8), keep=np.ones((2, 1, 2), np.int32),
        labelled=made.weights > 0, lengths=(13, 9),
    )  # fmt: skip
    return dataclasses.replace(made, drop=plan)


def test_tokens_and_all_that_belongs_to_them_move_together() -> None:
    before = batch()
    length = before.shape[1]
    dealt = zigzag.deal(before, 4)
    places = zigzag.order(dealt.shape[1], 4)
    back = np.argsort(places)
    for name in zigzag.OF_TOKENS:
        restored = getattr(dealt, name)[:, back]
        np.testing.assert_array_equal(restored[:, :length], getattr(before, name))
        assert (restored[:, length:] == zigzag.FILL.get(name, 0)).all()
    assert dealt.drop.lengths == (16, 16)
    assert (dealt.drop.survives[:, back][:, length:] == 127).all()
    assert dealt.clips is before.clips
    assert dealt.ring == 4


def test_nothing_is_dealt_twice() -> None:
    dealt = zigzag.deal(batch(), 4)
    assert zigzag.deal(dealt, 4) is dealt
    with pytest.raises(ValueError, match=r"dealt to 4 devices but mesh\.sequence is 2"):
        zigzag.deal(dealt, 2)
    plain = batch()
    assert zigzag.deal(plain, 1) is plain
