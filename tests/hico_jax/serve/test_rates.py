"""Buckets fill evenly, are each person's own, and are few."""

from __future__ import annotations

import pytest

from hico_jax.serve.rates import Rates, neighbourhood


def test_a_bucket_empties_and_fills_evenly() -> None:
    now = [0.0]
    rates = Rates(120, clock=lambda: now[0])  # two a second, twelve at once
    assert [rates.wait("a") for _ in range(12)] == [0.0] * 12
    assert rates.wait("a") == pytest.approx(0.5)
    assert rates.wait("b") == 0
    now[0] = 0.5
    assert rates.wait("a") == 0
    assert rates.wait("a") == pytest.approx(0.5)  # to be refused costs nothing
    now[0] = 3600
    assert [rates.wait("a") > 0 for _ in range(13)] == [False] * 12 + [True]


def test_few_are_remembered_and_none_is_no_limit() -> None:
    rates = Rates(1, most=3, clock=lambda: 0.0)
    assert [rates.wait(str(i)) for i in range(100)] == [0.0] * 100
    assert list(rates.left) == ["97", "98", "99"]
    assert rates.wait("99") == pytest.approx(60)
    assert [Rates(0).wait("a") for _ in range(100)] == [0.0] * 100


@pytest.mark.parametrize(
    ("host", "counted"),
    [("10.0.0.7", "10.0.0.7"), ("2001:db8::1", "2001:db8::/64"), ("fe80::1%eth0", "fe80::/64"), ("testclient",) * 2],
)
def test_what_counts_as_one_address(host: str, counted: str) -> None:
    assert neighbourhood(host) == counted
