"""uvicorn's HTTP protocol with patience for a request's head: who opens a connection and says nothing is shut out.

In: nothing. Out: a protocol class for `uvicorn.Config(http=...)`.
Next: hico_jax/serve/command.py
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0


class Timed(H11Protocol):
    """Closes a connection whose next request has not begun within `HEAD_S` of its first byte, or of connecting."""

    head_s = HEAD_S

    def connection_made(self, transport: Any) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head_timer: Any = self.loop.call_later(self.head_s, self._late)

    def data_received(self, data: bytes) -> None:
        if self.head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self.head_timer = self.loop.call_later(self.head_s, self._late)
        super().data_received(data)
        if self.head_timer is not None and self.cycle is not None and not self.cycle.response_complete:
            self.head_timer.cancel()
            self.head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
        super().connection_lost(exc)

    def _late(self) -> None:
        self.head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def protocol() -> type[Timed]:
    """The class."""
    return Timed
