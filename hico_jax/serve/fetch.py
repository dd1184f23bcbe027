"""Addresses on an allow-list, read without being led anywhere else.

Every name is resolved once, every address it has must be public, and the connection goes to that very address; the same
again for every redirect. Off unless the server is started with a list of hosts.
In: an https or http URL. Out: bytes.
Next: hico_jax/serve/media.py
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import urljoin, urlsplit

from hico_jax.serve.decoder import MediaError

REDIRECTS, SECONDS = 3, 60.0


def fetch(url: str, *, hosts: Sequence[str], most: int, seconds: float = SECONDS) -> bytes:
    """The file at an address.

    Raises:
      MediaError: an address that is not allowed, not public, too slow, too large, or answers anything but the file.
    """
    deadline = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        answer = _one(url, hosts, most, deadline)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise MediaError(f"this address leads on more than {REDIRECTS} times")


def _one(url: str, hosts: Sequence[str], most: int, deadline: float) -> bytes | str:
    """The body, or where a redirect leads."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise MediaError("this is no address") from None
    if parts.scheme not in ("http", "https") or parts.username or parts.password:
        raise MediaError("only plain http and https addresses are read")
    if not any(host == h or (h.startswith(".") and host.endswith(h)) for h in hosts):
        raise MediaError(f"the host {host[:100]!r} is not on this server's list (--allow-host)")
    port = port or (443 if parts.scheme == "https" else 80)
    address = public_address(host, port)
    connection = _Pinned(host, port, address, parts.scheme == "https", max(0.1, deadline - time.monotonic()))
    late = threading.Timer(max(0.1, deadline - time.monotonic()), connection.give_up)  # a timeout of the socket begins
    late.daemon = True  # anew with every byte that drips in
    late.start()
    try:
        path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        connection.request("GET", path, headers={"user-agent": "hico_jax", "accept-encoding": "identity"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return answer.getheader("location") or ""
        if answer.status != 200:
            raise MediaError(f"the address answered {answer.status}")
        parts_read, total = [], 0
        while piece := answer.read(1 << 16):
            total += len(piece)
            if total > most:
                raise MediaError(f"the file at this address has more than {most} bytes")
            parts_read.append(piece)
        if time.monotonic() > deadline:  # it ended because we gave up
            raise MediaError("the address took too long")
        return b"".join(parts_read)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        if time.monotonic() > deadline:
            raise MediaError("the address took too long") from None
        raise MediaError(f"the address could not be read ({type(error).__name__})") from None
    finally:
        late.cancel()
        connection.close()


def public_address(host: str, port: int) -> str:
    """An address of a host, all of whose addresses are public.

    Raises:
      MediaError: it has none, or one that is not.
    """
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError:
        raise MediaError(f"the host {host[:100]!r} is not known") from None
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(address, "ipv4_mapped", None) or address
        if not inner.is_global or inner.is_multicast:
            raise MediaError("this address is not a public one")
    return found[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to one numeric address, under the host's name."""

    def __init__(self, host: str, port: int, address: str, secure: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self._address, self._secure = address, secure
        self._wire: socket.socket | None = None  # `sock` is gone once the answer's end is told by closing

    def give_up(self) -> None:
        """Wake up whoever reads from it, from another thread."""
        with contextlib.suppress(OSError):  # closed already
            if self._wire is not None:
                self._wire.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        self._wire = self.sock
