"""Only listed hosts, only public addresses, again at every redirect; never a connection elsewhere."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest

from hico_jax.serve import fetch
from hico_jax.serve.decoder import MediaError


def names(monkeypatch: pytest.MonkeyPatch, **known: list[str]) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        if host.replace(".", "_") not in known:
            raise socket.gaierror(host)
        return [(2, 1, 6, "", (address, port)) for address in known[host.replace(".", "_")]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1%eth0",
     "fd00::1", "::ffff:127.0.0.1", "224.0.0.1", "100.64.0.1"],
)  # fmt: skip
def test_private_addresses_are_not_read(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, films_example=["93.184.216.34", address])
    with pytest.raises(MediaError, match="not a public one"):
        fetch.fetch("https://films.example/a.mp4", hosts=("films.example",), most=100)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://evil.example/a", "not on this server's list"),
        ("https://films.example.evil.example/a", "not on this server's list"),
        ("https://films.example@evil.example/a", "only plain http"),
        ("ftp://films.example/a", "only plain http"),
        ("https://films.example:99999/a", "no address"),
        ("https://gone.films.example/a", "not known"),
    ],
)
def test_other_addresses_are_refused(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch)
    with pytest.raises(MediaError, match=message):
        fetch.fetch(url, hosts=("films.example", ".films.example"), most=100)


class Wire:
    """A connection that answers from a table."""

    answers: dict[str, tuple[int, bytes, str]]
    opened: list[str]

    def __init__(self, host: str, port: int, address: str, secure: bool, seconds: float) -> None:
        self.host = host
        Wire.opened.append(address)

    def request(self, method: str, path: str, headers: dict[str, str]) -> None:
        self.status, self.data, self.location = Wire.answers[f"{self.host}{path}"]

    def getresponse(self) -> Wire:
        return self

    def getheader(self, name: str) -> str:
        return self.location

    def read(self, size: int) -> bytes:
        piece, self.data = self.data[:size], self.data[size:]
        return piece

    def close(self) -> None:
        pass

    give_up = close


def test_redirects_are_checked_like_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, a_example=["93.184.216.34"], b_example=["127.0.0.1"])
    monkeypatch.setattr(fetch, "_Pinned", Wire)
    Wire.opened = []
    Wire.answers = {
        "a.example/1": (302, b"", "/2"), "a.example/2": (200, b"film", ""), "a.example/3": (302, b"", "http://b.example/"),
        "a.example/4": (302, b"", "http://c.example/"), "a.example/5": (302, b"", "/5"), "a.example/6": (404, b"", ""),
        "a.example/7": (200, b"x" * 101, ""),
    }  # fmt: skip
    get = lambda path: fetch.fetch(f"https://a.example/{path}", hosts=("a.example", "b.example"), most=100)
    assert get("1") == b"film"
    for path, message in (
        ("3", "not a public one"), ("4", "not on this server's list"), ("5", "leads on more than"),
        ("6", "answered 404"), ("7", "more than 100 bytes"),
    ):  # fmt: skip
        with pytest.raises(MediaError, match=message):
            get(path)
    assert set(Wire.opened) == {"93.184.216.34"}


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b""], ids=["body", "head"])
def test_who_sends_drop_by_drop_is_given_up(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every drop comes in time, so no timeout of a single read ends it."""
    monkeypatch.setattr(fetch, "public_address", lambda host, port: "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            wire, _ = server.accept()
            with wire, contextlib.suppress(OSError):
                wire.recv(1 << 16)
                wire.sendall(head)
                for _ in range(200):
                    wire.sendall(b"x")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(MediaError, match="took too long"):
            fetch.fetch(f"http://a.example:{server.getsockname()[1]}/", hosts=("a.example",), most=1000, seconds=0.4)
        assert time.monotonic() - began < 5
        thread.join(20)
