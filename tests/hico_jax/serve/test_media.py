"""What is sent is kept and encoded once, and goes when its owner takes it away; over HTTP: `test_app.py`."""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hico_jax.api import Model
from hico_jax.serve.decoder import Limits
from hico_jax.serve.media import Allowance, Store


@pytest.fixture
def store(make_model: Callable[..., Model], tmp_path: pathlib.Path) -> Iterator[Store]:
    def run(work: Callable[[], Any]) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(work())
        return future

    made = Store(tmp_path / "work", make_model(), run, limits=Limits(seconds=60.0), allowance=Allowance())
    yield made
    made.close()


def test_a_film_taken_away_while_it_is_read_is_not_kept(
    store: Store, films: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    item = store.put(films[1].read_bytes() + b"gone", "", "a.mp4")
    film = store._film
    monkeypatch.setattr(store, "_film", lambda *args: (film(*args), store.remove(item))[0])
    assert store.see(item).uid
    assert not [key for key in store.encoded if key[0] == item.id]
    assert not store.under_way


def test_the_same_bytes_twice_at_once_are_kept_once(
    store: Store, films: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, data = store.keep, films[1].read_bytes() + b"twice"
    other: list[Any] = []

    def slow(part: pathlib.Path, owner: str, name: str) -> Any:
        monkeypatch.setattr(store, "keep", keep)
        other.append(store.put(data, owner, name))  # it comes between
        return keep(part, owner, name)

    monkeypatch.setattr(store, "keep", slow)
    kept = len(store.items)
    assert store.put(data, "", "a") is other[0]
    assert len(store.items) == kept + 1
    assert len(list(store.folder.iterdir())) == len(store.items)
