from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.order import epoch_order, steps_per_epoch

RNG = np.random.default_rng(0)
MIXED = np.where(RNG.random(203) < 0.6, 1, -1) * RNG.integers(1, 200, 203)


@pytest.mark.parametrize("group", [True, False])
def test_an_epoch_is_a_permutation_of_whole_batches(group):
    order = epoch_order(MIXED, 8, 1, 0, group=group)
    assert len(order) == 8 * steps_per_epoch(MIXED, 8, group=group)
    assert len(set(order.tolist())) == len(order)
    assert len(MIXED) - len(order) < (16 if group else 8)


def test_order_follows_seed_and_epoch():
    first = epoch_order(MIXED, 8, 1, 0, group=True)
    assert (first == epoch_order(MIXED, 8, 1, 0, group=True)).all()
    assert (first != epoch_order(MIXED, 8, 1, 1, group=True)).any()
    assert (first != epoch_order(MIXED, 8, 2, 0, group=True)).any()
    seen = {int(i) for e in range(20) for i in epoch_order(MIXED, 8, 1, e, group=True)}
    assert seen == set(range(203))  # what one epoch leaves over comes in another


def test_a_grouped_batch_is_of_one_kind_and_of_similar_lengths():
    def spread(group):
        batches = MIXED[epoch_order(MIXED, 8, 1, 0, group=group)].reshape(-1, 8)
        return batches, np.mean([np.abs(b).max() - np.abs(b).mean() for b in batches])

    batches, close = spread(True)
    assert all((b > 0).all() or (b < 0).all() for b in batches)
    assert {bool(b[0] > 0) for b in batches} == {True, False}
    mixed, wide = spread(False)
    assert close < wide / 4
    assert any((b > 0).any() and (b < 0).any() for b in mixed)
    assert (np.diff([np.abs(b).mean() for b in batches]) > 0).any()  # not sorted over the epoch


def test_a_set_smaller_than_a_batch_fills_one():
    order = epoch_order([5, 6, 7], 8, 0, 0, group=True)
    assert len(order) == 8
    assert set(order.tolist()) == {0, 1, 2}
    assert steps_per_epoch([5, 6, 7], 8, group=True) == 1
