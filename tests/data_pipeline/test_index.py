from __future__ import annotations

import collections

import numpy as np
import pytest

from data_pipeline.index import Index, first_fit

RNG = np.random.default_rng(0)
LENGTHS = np.where(RNG.random(203) < 0.6, 1, -1) * RNG.integers(1, 200, 203)
TOKENS = np.abs(LENGTHS) + 3


def samples(index, epoch):
    return index.epoch(epoch).items.tolist()


@pytest.mark.parametrize("pack", [0, 256])
@pytest.mark.parametrize("group", [True, False])
def test_the_plan_does_not_depend_on_how_it_is_asked(pack, group):
    make = lambda: Index(LENGTHS, 4, 1, group=group, tokens=TOKENS, pack=pack)
    forth, back = make(), make()
    steps = forth.steps(3)
    there = [forth.row(s, p) for s in range(steps) for p in range(4)]
    again = [back.row(s, p) for s in reversed(range(steps)) for p in reversed(range(4))]
    assert there == again[::-1]
    assert forth.digest() == back.digest()
    assert forth.order_digest(5) == back.order_digest(5)
    assert Index(LENGTHS, 4, 2, group=group, tokens=TOKENS, pack=pack).order_digest(5) != forth.order_digest(5)
    assert [forth.locate(forth.steps(e)) for e in range(3)] == [(e, 0) for e in range(3)]


def test_packs_hold_every_sample_once_and_fit():
    index = Index(LENGTHS, 4, 1, group=True, tokens=TOKENS, pack=256)
    epoch = index.epoch(0)
    rows = [epoch.items[a:b] for a, b in zip(epoch.starts, epoch.starts[1:], strict=False)]
    assert len(rows) % 4 == 0
    assert all(TOKENS[r].sum() <= 256 for r in rows)
    assert all(len(set(np.sign(LENGTHS[r]))) == 1 for r in rows)
    counts = collections.Counter(samples(index, 0))
    assert set(counts.values()) == {1}
    assert len(counts) > 150  # a few rows fill no batch
    assert TOKENS[epoch.items].sum() / (len(rows) * 256) > 0.95
    assert {i for e in range(8) for i in samples(index, e)} == set(range(203))


def test_a_sample_longer_than_a_pack_has_its_row_alone():
    assert first_fit([0, 1, 2], np.array([300, 50, 40]), 100) == [[0], [1, 2]]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (0.34, 0.0001)])
def test_weights_say_how_often_a_sample_is_seen(weights):
    datasets = np.arange(203) % 2
    index = Index(np.abs(LENGTHS), 1, 0, group=False, datasets=datasets, weights=weights)
    seen = collections.Counter(i for e in range(20) for i in samples(index, e))
    for number, weight in enumerate(weights):
        mine = [seen[i] for i in np.flatnonzero(datasets == number)]
        per_epoch = max(1, round(weight * len(mine)))
        assert sum(mine) == 20 * per_epoch
        assert max(mine) - min(mine) <= 1  # none is preferred
    assert index.steps(1) == len(samples(index, 0))


def test_packing_without_lengths_is_refused():
    with pytest.raises(ValueError, match="length of every sample"):
        Index(LENGTHS, 4, 1, group=True, pack=256)
