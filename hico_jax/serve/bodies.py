"""Bodies of requests, read with a limit on their size and on their sender's patience.

In: a request. Out: JSON, or a file written piece by piece.
Next: hico_jax/serve/app.py
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from hico_jax.serve.protocol import ApiError

MOST_VALUES = 1 << 20  # of a JSON body, since each takes many times its bytes; commas within texts count, too
MOST_PARTS, MOST_HEAD = 64, 8192  # of an upload, and bytes of one part's head


async def pieces(request: Request, most: int, patience_s: float) -> AsyncIterator[bytes]:
    """The body, until it is longer than `most` or nothing comes for `patience_s`.

    Raises:
      ApiError: too long, or too slow.
    """
    told = request.headers.get("content-length", "0")
    if told.isdigit() and int(told) > most:
        raise _too_long(most)
    stream, total = request.stream().__aiter__(), 0
    while True:
        try:
            piece = await asyncio.wait_for(stream.__anext__(), patience_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, f"nothing more of the body came for {patience_s:g} s") from None
        total += len(piece)
        if total > most:
            raise _too_long(most)
        yield piece


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most} bytes", code="body_too_long")


async def read_json(request: Request, most: int, patience_s: float) -> Any:
    """The body as JSON.

    Raises:
      ApiError: too long, too slow, or no JSON.
    """
    data = b"".join([piece async for piece in pieces(request, most, patience_s)])
    if data.count(b",") + data.count(b"{") + data.count(b"[") > MOST_VALUES:
        raise ApiError(413, f"the body holds more than {MOST_VALUES} values", code="body_too_long")
    try:
        return await anyio.to_thread.run_sync(lambda: json.loads(data, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class _File:
    """Callbacks of the multipart parser: the part named `file` goes to disk, other parts are let pass."""

    def __init__(self, target: Any) -> None:
        self.target, self.name, self.found, self.header = target, "upload", False, {}
        self.field, self.value, self.mine = b"", b"", False
        self.parts, self.head = 0, 0

    def callbacks(self) -> dict[str, Any]:
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data")
        return {f"on_{name}": getattr(self, f"on_{name}") for name in names}

    def on_part_begin(self) -> None:
        self.header, self.field, self.value, self.head = {}, b"", b"", 0
        self.parts += 1
        if self.parts > MOST_PARTS:
            raise ApiError(400, f"the body has more than {MOST_PARTS} parts")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.field += self._of_head(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += self._of_head(data[start:end])

    def _of_head(self, piece: bytes) -> bytes:
        self.head += len(piece)
        if self.head > MOST_HEAD:
            raise ApiError(400, f"the head of a part is longer than {MOST_HEAD} bytes")
        return piece

    def on_header_end(self) -> None:
        self.header[self.field.lower()] = self.value
        self.field, self.value = b"", b""

    def on_headers_finished(self) -> None:
        _, told = parse_options_header(self.header.get(b"content-disposition", b""))
        self.mine = told.get(b"name") == b"file" and not self.found
        if self.mine:
            self.found = True
            name = told.get(b"filename", b"upload").decode("utf-8", "replace")
            self.name = name.replace("\\", "/").rsplit("/", 1)[-1][:200] or "upload"

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.mine:
            self.target.write(data[start:end])


async def upload(request: Request, path: pathlib.Path, most: int, patience_s: float) -> tuple[pathlib.Path, str]:
    """Write an upload (`multipart/form-data` with a part `file`) to `path`; the path and the sender's name for it.

    Raises:
      ApiError: not such a body, too long, or too slow; nothing is left behind.
    """
    kind, told = parse_options_header(request.headers.get("content-type", "").encode())
    if kind != b"multipart/form-data" or not told.get(b"boundary"):
        raise ApiError(415, "send the file as multipart/form-data, in a part named file")
    try:
        with path.open("xb") as target:
            into = _File(target)
            parser = MultipartParser(told[b"boundary"], into.callbacks())  # type: ignore[arg-type]
            async for piece in pieces(request, most + (1 << 16), patience_s):
                await anyio.to_thread.run_sync(parser.write, piece)
                if target.tell() > most:
                    raise _too_long(most)
            parser.finalize()
        if not into.found:
            raise ApiError(400, "there is no part named file in the body", param="file")
    except MultipartParseError:
        path.unlink(missing_ok=True)
        raise ApiError(400, "the body is not well-formed multipart/form-data") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path, into.name


async def drain(request: Request, most: int = 64 << 20, seconds: float = 2.0) -> None:
    """Let pass what is left of a refused body, within bounds: a client that still writes would not see the answer."""
    deadline, total = time.monotonic() + seconds, 0
    while total < most and not request._stream_consumed:
        try:
            message = await asyncio.wait_for(request.receive(), max(0.0, deadline - time.monotonic()))
        except (TimeoutError, RuntimeError):
            return
        total += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
