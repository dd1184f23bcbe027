"""The roll call before a run of several processes."""

from __future__ import annotations

import socket
import threading

import pytest

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
