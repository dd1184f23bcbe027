"""Broken requests and broken files never crash the server, hang it, or leave anything; nor does a soak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import serve_fuzz, serve_soak
from hico_jax.api import Model
from hico_jax.serve import protocol

LANES = ((4, 256),)  # as in test_app.py: nothing more is compiled


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 10_000])
@pytest.mark.parametrize("make", [serve_fuzz.request, serve_fuzz.body], ids=lambda f: f.__name__)
def test_broken_input_breaks_nothing(make: Callable[..., Any], count: int, make_model: Callable[..., Model]) -> None:
    found = serve_fuzz.fuzz_server(make, count, seed=7, model=make_model(), buckets=LANES)
    assert found["first"] == []
    assert found["sent"] == count
    assert {"200", "400"} <= set(found["statuses"])  # some were still good


def test_a_broken_server_is_noticed(make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in our own code is a 500 with no traceback in it, and the harness says so."""
    parse = protocol.parse

    def sometimes(body: Any, **options: Any) -> Any:
        return parse(body, **options) if "temperature" not in body else 1 // 0

    monkeypatch.setattr(protocol, "parse", sometimes)
    found = serve_fuzz.fuzz_server(serve_fuzz.request, 12, seed=7, model=make_model(), buckets=LANES)
    assert found["statuses"]["500"] > 0
    assert any(told.get("status") == 500 for told in found["first"])
    assert any("ZeroDivisionError" in told.get("logged", "") for told in found["first"])


@pytest.mark.slow
def test_broken_media_break_no_reader() -> None:
    found = serve_fuzz.fuzz_media(10_000, seed=7)
    assert found["first"] == []
    assert found["sent"] == 10_000


@pytest.mark.slow
def test_a_soak_loses_nothing() -> None:
    """Answers, refusals and clients that hang up, a thousand of them: memory and descriptors stay where they were."""
    found, broken = serve_soak.soak("", 1000, 0, 16, [8, 16, 32, 64])
    assert broken == []
    assert sum(found["hostile"]["outcomes"].values()) == 1000
