"""The roll call before a run of several processes."""

from __future__ import annotations

import socket
import threading

import jax
import pytest
from jax._src import distributed

from hico_jax.parallel import hosts


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def test_all_come() -> None:
    port, names, failed = free_port(), ["a", "b", "c"], []

    def call(i: int) -> None:
        try:
            hosts.roll_call("localhost", port, i, names, 20.0)
        except ValueError as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in (2, 0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failed == []


def test_who_is_missing_is_named() -> None:
    port, names = free_port(), ["a", "b", "c", "d"]
    said = []

    def call() -> None:
        try:
            hosts.roll_call("localhost", port, 2, names, 5.0)
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    with pytest.raises(ValueError, match=r"2 of 4 processes did not start within 2 s: b, d; look at their logs"):
        hosts.roll_call("localhost", port, 0, names, 2.0)
    thread.join()
    assert said
    assert "a " in said[0]


def test_nobody_answers() -> None:
    with pytest.raises(ValueError, match=r"a at localhost:.* did not answer b in 0 s"):
        hosts.roll_call("localhost", free_port(), 1, ["a", "b"], 0.3)


def test_settings_that_do_not_fit() -> None:
    env = {"HICO_COORDINATOR": "localhost", "HICO_PROCESS": "0", "HICO_PROCESSES": "2"}
    with pytest.raises(ValueError, match=r"must be host:port"):
        hosts.join(1.0, env)


class Store:
    """The store of `jax.distributed`, as far as it is used."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.held, "a key is set once"
        self.held[key] = value

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        if key not in self.held:
            raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return self.held[key]

    def key_value_delete(self, key: str) -> None:
        del self.held[key]


def test_processes_hear_what_each_says_and_keep_two_rounds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    jax.devices()  # before there is a store that a backend would use
    monkeypatch.setattr(distributed.global_state, "client", store)
    agree = hosts.Agreement((0, 3))  # this is process 0
    for number in range(4):
        store.held[f"hico/agree/0-3/{number}/3"] = f"theirs {number}"
        assert agree(f"mine {number}") == [f"mine {number}", f"theirs {number}"]
    assert [key for key in store.held if key.endswith("/0")] == ["hico/agree/0-3/3/0"]
    with pytest.raises(ValueError, match=r"process 3 did not say within 3600 s what it read .*look at its log"):
        agree("alone")
