from __future__ import annotations

import pytest

from data_pipeline import buckets


def test_the_ladder_wastes_little_and_has_few_steps():
    sizes = [buckets.ladder(n, 128) for n in range(1, 32769)]
    assert all(s >= n and s % 128 == 0 for n, s in enumerate(sizes, 1))
    assert max(s / n for n, s in enumerate(sizes, 1) if n > 1024) < 1.25
    assert len(set(sizes)) < 32


def test_a_limit_cuts_the_last_step():
    assert buckets.bucket(900, (), 128, 1000) == 1000
    assert buckets.bucket(0, (), 1) == 0


def test_given_buckets():
    assert [buckets.bucket(n, (64, 256), 1) for n in (1, 64, 65)] == [64, 64, 256]
    with pytest.raises(ValueError, match=r"257 fits none of the buckets \(64, 256\)"):
        buckets.bucket(257, (64, 256), 1)
