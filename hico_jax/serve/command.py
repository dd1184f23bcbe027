"""`hico serve`: a model behind OpenAI's protocol, with a page to ask it on.

In: the command's options. Out: a server that runs until it is told to stop.
Next: hico_jax/serve/app.py
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from typing import Any

from hico_jax import api, ask
from hico_jax.api import Model
from hico_jax.serve.decoder import Decoder, Limits, MediaError
from hico_jax.serve.engine import Engine
from hico_jax.serve.pool import PIECE
from hico_jax.serve.warming import Warming

RATE = 600  # requests a minute of one key where others can reach the server
MISSING = "`hico serve` needs more packages: pip install -e '.[serve]' in a checkout, or starlette, uvicorn and so on"


def main(args: argparse.Namespace) -> int:
    """Load, compile, listen.

    Raises:
      ValueError: no weights, options that do not fit together, or packages that are not installed.
    """
    try:
        import uvicorn

        from hico_jax.serve import app, fetch, media
        from hico_jax.serve.timed import protocol
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; {MISSING}") from error
    keys = tuple(k for k in os.environ.get("HICO_API_KEYS", os.environ.get("HICO_API_KEY", "")).split(",") if k)
    if not app.local(args.host) and not keys:
        raise ValueError(
            f"--host {args.host} can be reached by others, so a key is needed: set HICO_API_KEY, or listen on 127.0.0.1"
        )
    folder = args.model or ask.DEFAULT_MODEL
    if args.model is None and not pathlib.Path(folder).is_dir():
        raise ValueError(
            f"no model was named and there is none in {folder}; give one with --model (`--model nano` ships), "
            f"or run `hico demo --train`"
        )
    began, listening = time.perf_counter(), bound(args.host, args.port)
    model = api.load(folder, args.dtype, quantize=args.quantize)
    if args.drop is not None:
        from hico_jax.batch import DropSchedule

        model = Model(ask.with_drop(model.hico, DropSchedule(*args.drop)), model.folder, eos=model.eos)
    engine = Engine(
        model.hico, model.tokenizer, buckets=args.lanes or lanes(model), piece=args.piece or PIECE, queue=args.queue
    )
    work = tempfile.TemporaryDirectory(prefix="hico_serve_", dir=args.work)
    limits = Limits(
        duration_s=args.max_seconds, source_frames=args.max_source_frames, seconds=args.read_seconds,
    )  # fmt: skip
    allowance = media.Allowance(file_bytes=args.max_upload)
    store = media.Store(
        work.name, model, engine.call, limits=limits, allowance=allowance, max_frames=args.max_frames
    )  # fmt: skip
    allowed = tuple(args.allow_host)
    fetching = functools.partial(fetch.fetch, hosts=allowed, most=args.max_upload) if allowed else None
    options = app.Options(
        name=args.name or pathlib.Path(folder).name, api_keys=keys, max_new_tokens=args.max_new_tokens,
        request_s=args.request_seconds, hosts=names(args.host, args.host_name),
        rate=args.rate if args.rate is not None else 0 if app.local(args.host) else RATE, fetch=fetching,
    )  # fmt: skip
    server = app.Server(model, engine, store, options)
    print(confinement(store.decoder), file=sys.stderr, flush=True)
    warming = Warming(engine, model)
    config = uvicorn.Config(
        server.app(), log_level="warning", http=protocol(), ws="none", lifespan="off",
        limit_concurrency=args.connections, timeout_keep_alive=10, server_header=False,
        timeout_graceful_shutdown=10,
    )  # fmt: skip
    try:
        if not args.no_warm:
            print("compiling (--no-warm leaves it to the first requests) ...", file=sys.stderr, flush=True)
            warming.begin()
        if args.warm_all:
            warming.finish()
        engine.start()
        if not args.no_warm and not args.warm_all:
            warming.go_on()
        running = uvicorn.Server(config)
        more = f"; {warming.left} more programs are compiled meanwhile" if warming.thread is not None else ""
        told = (running, time.perf_counter() - began, more)
        threading.Thread(target=_announce, args=told, daemon=True).start()
        asyncio.run(running.serve(sockets=[listening]))
    finally:
        listening.close()
        warming.close()
        engine.close()
        store.close()
        work.cleanup()
    return 0


def confinement(decoder: Decoder) -> str:
    """One line about what the processes that read people's files can reach."""
    try:
        held = decoder.confinement()
    except MediaError:
        held = ()
    if held:
        return f"people's files are read without a network ({', '.join(held)})"
    return (
        "warning: this system does not keep the processes that read people's files off the network; "
        "run the server where it cannot reach what strangers may not"
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, not listening yet: a port that is taken is told before anything is loaded.

    Raises:
      ValueError: it cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except OSError as error:
        text = f"could not listen on {host}:{port} ({error.strerror}); is another program there? choose --port"
        raise ValueError(text) from error
    return found


def _announce(server: Any, seconds: float, more: str = "") -> None:
    """Say the address once it answers; with port 0 only then is it known."""
    while not server.started:
        time.sleep(0.02)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    print(
        f"ready after {seconds:.1f} s: http://{f'[{host}]' if ':' in host else host}:{port}/{more}",
        file=sys.stderr,
        flush=True,
    )


def names(host: str, extra: list[str]) -> tuple[str, ...]:
    """By which names the server may be called: a page that renames itself to our address may not."""
    if host in ("0.0.0.0", "::"):
        return tuple(extra)  # with a key; any name unless some are given
    return ("127.0.0.1", "localhost", "[::1]", host, *extra)


def lanes(model: Model) -> tuple[tuple[int, int], ...]:
    """Lanes of a few sizes up to the model's longest row."""
    longest = model.geometry.max_length
    sizes = [(8, 2048), (4, 8192)]
    return (*((n, size) for n, size in sizes if size < longest), (1 if longest > 65536 else 2, longest))
