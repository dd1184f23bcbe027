"""The server: OpenAI's chat completions, uploads, health, figures, and the page.

In: an engine, a store of media and options. Out: an ASGI application (Starlette).
Next: hico_jax/serve/protocol.py
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import html
import importlib.resources
import ipaddress
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from data_pipeline.layout import RowTooLongError
from hico_jax import __version__
from hico_jax.api import Model
from hico_jax.film import Film
from hico_jax.serve import bodies, protocol
from hico_jax.serve.decoder import MediaError
from hico_jax.serve.engine import BusyError, Ended, Engine, Spoke, Started
from hico_jax.serve.engine import Request as Ask
from hico_jax.serve.media import Item, Store, data_url
from hico_jax.serve.meters import Meters
from hico_jax.serve.pool import NoRoomError
from hico_jax.serve.prompts import Media, Prompt, prompt
from hico_jax.serve.protocol import ApiError, Chat, Part
from hico_jax.serve.rates import Rates, neighbourhood
from hico_jax.serve.replies import Reply, Stream

T = TypeVar("T")
LETTERS = 16  # of a token on average, at most: longer texts are refused before they are counted
OPEN = ("/", "/health", "/v1/health")  # no key is asked for
FREE = (*OPEN, "/metrics")  # and not counted against the rate
GRACE_S = 0.2  # after the deadline, for the engine to end a request itself
WATCHING = 32  # requests whose media are read or encoded at a time, those that wait for it included


@dataclasses.dataclass(frozen=True)
class Options:
    """What the server allows."""

    name: str = "hico"  # of the model
    api_keys: tuple[str, ...] = ()  # each with uploads and lanes of its own; none: nobody is asked
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")  # by which names it may be called; empty: any
    json_bytes: int = 64 << 20
    body_s: float = 30.0  # between two pieces of a body
    send_s: float = 30.0  # that a reader may stand still
    request_s: float = 300.0  # from arrival to the last token
    max_new_tokens: int = 1024
    max_media: int = 8
    rate: int = 0  # requests a minute of one key, or of one address where there are no keys; 0: any number
    fetch: Callable[[str], bytes] | None = None  # reads allowed addresses; None: no address is read


class Server:
    """The routes, and what they share."""

    def __init__(self, model: Model, engine: Engine, store: Store, options: Options) -> None:
        self.model, self.engine, self.store, self.options = model, engine, store, options
        self.meters, self.rates = Meters(engine), Rates(options.rate)
        self.watching = anyio.CapacityLimiter(WATCHING)  # apart from the threads that read bodies: those stay free
        self.page = (importlib.resources.files("hico_jax.serve") / "page.html").read_text("utf-8")
        self.began = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self.index),
            Route("/health", self.health),
            Route("/v1/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files, methods=["GET"]),
            Route("/v1/files/{id}", self.file, methods=["GET"]),
            Route("/v1/files/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{id}/timeline", self.timeline),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        for route in routes:
            route.endpoint = self._guarded(route.endpoint)
            route.app = _asgi(route.endpoint)
        handlers: Any = {HTTPException: _http_error, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _guarded(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Every route: who asks, by which name, from which page; and every mistake in one shape."""

        @functools.wraps(endpoint)
        async def run(request: Request) -> Response:
            try:
                self._admit(request)
                return await endpoint(request)
            except ApiError as error:
                await bodies.drain(request)
                return _error(error)
            except ClientDisconnect:
                return Response(status_code=499)

        return run

    def _admit(self, request: Request) -> None:
        options, host = self.options, request.headers.get("host", "")
        if options.hosts and _hostname(host) not in {h.strip("[]").lower() for h in options.hosts}:
            raise ApiError(403, "this server is not called by that name; start it with --host-name to allow it")
        origin = request.headers.get("origin")
        if origin and request.method != "GET" and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "a page of another origin may not use this server")
        who = neighbourhood(request.client.host if request.client else "")
        if options.api_keys and request.url.path not in OPEN:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = [hmac.compare_digest(given.encode(), key.encode()) for key in options.api_keys]
            if scheme.lower() != "bearer" or not any(right):
                self._count(who)  # so keys cannot be guessed at speed
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            who = f"key {right.index(True)}"
        if request.url.path not in FREE:
            self._count(who)

    def _count(self, who: str) -> None:
        if seconds := self.rates.wait(who):
            text = f"more than {self.options.rate} requests a minute; try again in {seconds:.1f} s"
            raise ApiError(429, text, code="rate_limit_exceeded", retry_s=seconds)

    def owner(self, request: Request) -> str:
        """Whose media and lanes a request may use."""
        return request.headers.get("authorization", "") if self.options.api_keys else ""

    # --- small routes -----------------------------------------------------------------------------------------------

    async def index(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        text = self.page.replace("{{nonce}}", nonce).replace("{{model}}", html.escape(self.options.name))
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return HTMLResponse(text, headers=headers)

    async def health(self, request: Request) -> Response:
        alive = self.engine.thread is not None and self.engine.thread.is_alive()
        told = {"status": "ok" if alive else "stopped", "model": self.options.name, "version": __version__}
        return JSONResponse(told, status_code=200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        body, kind = self.meters.render()
        return Response(body, media_type=kind)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.options.name:
            raise self._no_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.options.name, "object": "model", "created": self.began, "owned_by": "hico_jax"}

    def _no_model(self, name: str) -> ApiError:
        return ApiError(
            404,
            f"the model {name[:80]!r} is not served here; this is {self.options.name!r}",
            param="model",
            code="model_not_found",
        )

    # --- files -------------------------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        options = self.options
        part, name = await bodies.upload(request, self.store.begin(), self.store.allowance.file_bytes, options.body_s)
        try:
            item = await anyio.to_thread.run_sync(lambda: self.store.keep(part, self.owner(request), name))
        except MediaError as error:
            raise ApiError(400, str(error), param="file") from None
        return JSONResponse(_describe(item))

    async def files(self, request: Request) -> Response:
        owner = self.owner(request)
        mine = [_describe(i) for i in list(self.store.items.values()) if i.owner == owner]
        return JSONResponse({"object": "list", "data": mine, "has_more": False})

    def _item(self, request: Request, id: str) -> Item:
        try:
            return self.store.find(id, self.owner(request))
        except KeyError:
            raise ApiError(404, "there is no such file; upload it again", param="file_id") from None

    async def file(self, request: Request) -> Response:
        return JSONResponse(_describe(self._item(request, request.path_params["id"])))

    async def delete(self, request: Request) -> Response:
        item = self._item(request, request.path_params["id"])
        self.store.remove(item)
        return JSONResponse({"id": item.id, "object": "file", "deleted": True})

    async def timeline(self, request: Request) -> Response:
        """Which frames of an uploaded video are seen; reads and encodes it if nobody has yet."""
        item = self._item(request, request.path_params["id"])
        seen = await self._in_time(self._see(item, Part("file", item.id), True), self.options.request_s)
        if not isinstance(seen, Film):
            return JSONResponse({"object": "timeline", "frames": 1, "times": [0.0], "duration_s": 0.0})
        return JSONResponse({"object": "timeline", **_timeline(seen, self.model.geometry.frames_per_clip)})

    # --- chat --------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the content type must be application/json")
        deadline = time.monotonic() + self.options.request_s
        body = await bodies.read_json(request, self.options.json_bytes, self.options.body_s)
        chat = protocol.parse(
            body, eos=self.model.tokenizer.eos_ids, max_new_tokens=self.options.max_new_tokens,
            max_media=self.options.max_media,
        )  # fmt: skip
        if chat.model not in ("", self.options.name):
            raise self._no_model(chat.model)
        turns = await self._in_time(self._turns(request, chat), max(0.0, deadline - time.monotonic()))
        try:
            ready = anyio.to_thread.run_sync(lambda: self._ready(turns, self.owner(request)), abandon_on_cancel=True)
            asked, media = await self._in_time(ready, max(0.0, deadline - time.monotonic()))
            ask = Ask(
                asked, chat.settings, chat.stop, top=chat.top_log_probs > 0, look=chat.attention, deadline=deadline
            )
            events, ticket = self._submit(ask)
        except RowTooLongError as error:
            most = self.model.geometry.max_length
            text = f"the conversation is {error.excess} tokens longer than the {most} that the model takes"
            raise ApiError(400, text, param="messages", code="context_length_exceeded") from None
        except NoRoomError as error:
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None
        except BusyError as error:
            raise ApiError(429, str(error), code="busy") from None
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        films = [m for m in media if isinstance(m, Film)]
        reply = Reply(self.options.name, chat, ask.prompt, films, self.model, self.meters)
        if chat.stream:
            return Stream(reply.stream(events, ticket), self.options.send_s, ticket.cancel)
        return await self._whole(request, reply, events, ticket)

    def _ready(self, turns: list[dict[str, Any]], owner: str) -> tuple[Prompt, Sequence[Media]]:
        """The prompt of a talk. It may compile something, so it runs in a thread: nobody else waits for it."""
        row, media = self.model.row(turns)
        return prompt(row, media, self.model.geometry, owner), media

    def _submit(self, ask: Ask) -> tuple[AsyncIterator[Any], Any]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def listen(event: Started | Spoke | Ended) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
                loop.call_soon_threadsafe(queue.put_nowait, event)

        ticket = self.engine.submit(ask, listen)

        async def events() -> AsyncIterator[Any]:
            event = None
            while not isinstance(event, Ended):
                left = None if ask.deadline is None else max(0.0, ask.deadline + GRACE_S - time.monotonic())
                try:
                    async with asyncio.timeout(left):  # `wait_for` would make a task of every token
                        event = await queue.get()
                except TimeoutError:  # the device is busy with one long program, so the engine cannot say it
                    ticket.cancel()
                    event = Ended("deadline", num_tokens=len(ticket.speech.ids), seconds=self.options.request_s)
                yield event

        return events(), ticket

    async def _whole(self, request: Request, reply: Reply, events: AsyncIterator[Any], ticket: Any) -> Response:
        """The answer in one piece; who hangs up ends it."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.2)
            ticket.cancel()

        watcher = asyncio.create_task(watch())
        try:
            return JSONResponse(await reply.whole(events))
        finally:
            watcher.cancel()
            ticket.cancel()

    async def _in_time(self, work: Awaitable[T], seconds: float) -> T:
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            raise ApiError(504, f"the media were not read and made ready within {self.options.request_s:g} s") from None

    async def _turns(self, request: Request, chat: Chat) -> list[dict[str, Any]]:
        """Messages with what they show, on the device."""
        letters, most = sum(len(turn.text) for turn in chat.turns), LETTERS * self.model.geometry.max_length
        if letters > most:
            raise ApiError(
                400, f"the messages have {letters} letters; at most {most} are taken", param="messages",
                code="context_length_exceeded",
            )  # fmt: skip
        turns: list[dict[str, Any]] = []
        for turn in chat.turns:
            pictures = 0
            items = []
            for part in turn.parts:
                item = await self._fetch(request, part)
                if part.kind == "image_url" and item.kind != "image":
                    raise ApiError(400, "an image_url names no picture", param="messages")
                pictures += item.kind == "image"
                items.append((item, part))
            seen = [await self._see(item, part, pictures < 2) for item, part in items]
            turns.append({"role": turn.role, "content": turn.text, "seen": tuple(seen)})
        return turns

    async def _fetch(self, request: Request, part: Part) -> Item:
        owner, url = self.owner(request), part.url
        if url.startswith("file-"):
            return self._item(request, url)
        scheme = url.partition(":")[0].lower()
        try:
            if scheme == "data":
                limit = self.store.allowance.file_bytes
                work = lambda: self.store.put(data_url(url, limit), owner, "data")
            elif scheme in ("http", "https"):
                fetch = self.options.fetch
                if fetch is None:
                    raise ApiError(
                        400, "addresses are not read by this server; upload the file, send a data URL, or start it "
                        "with --allow-host", param="messages",
                    )  # fmt: skip
                work = lambda: self.store.put(fetch(url), owner, url.rsplit("/", 1)[-1][:100])
            else:
                raise ApiError(400, "a URL must begin with data:, https:, or be the id of an upload", param="messages")
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self.watching)
        except MediaError as error:
            raise ApiError(400, str(error), param="messages") from None

    async def _see(self, item: Item, part: Part, single: bool) -> Media:
        try:
            work = lambda: self.store.see(
                item, start=part.start, end=part.end, single=single, patience_s=self.options.request_s
            )
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self.watching)
        except MediaError as error:
            raise ApiError(
                400, f"{item.name}: {error}" if item.name != "data" else str(error), param="messages"
            ) from None


def local(host: str) -> bool:
    """Whether an address to listen on is this machine's alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _hostname(host: str) -> str:
    """The name in a `Host` header, without its port; empty where it makes no sense."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _asgi(endpoint: Callable[[Request], Any]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return app


def _describe(item: Item) -> dict[str, Any]:
    return {
        "id": item.id, "object": "file", "bytes": item.size, "created_at": item.created, "filename": item.name,
        "purpose": "vision", "status": "processed", "kind": item.kind,
    }  # fmt: skip


def _timeline(seen: Film, frames_per_clip: int) -> dict[str, Any]:
    times = [round(float(i) / seen.fps, 3) for i in seen.indices]
    return {
        "frames": seen.num_frames, "times": times, "fps": seen.fps, "duration_s": seen.duration_s,
        "frames_per_clip": frames_per_clip, "read_s": round(seen.read_s, 3), "encode_s": round(seen.encode_s, 3),
    }  # fmt: skip


def _error(error: ApiError) -> Response:
    headers = {"retry-after": str(max(1, math.ceil(error.retry_s)))} if error.status == 429 else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Any) -> Response:
    known = {404: "there is no such address here", 405: "this address does not take that method"}
    return _error(ApiError(error.status_code, known.get(error.status_code, str(error.detail))))


async def _broken(request: Request, error: Exception) -> Response:
    return _error(ApiError(500, "something is broken here; the server's log says what"))
