"""Throw broken requests and broken media at the server: nothing may crash, hang, answer 500 or leave a file.

    python benchmarks/serve_fuzz.py --requests 10000 --bodies 10000 --media 10000 --json fuzz.json

The server runs in this process on a free port, with a tiny random model and small limits. Requests are mutations of
good ones, of their structure and of their bytes; bodies are mutations of films and pictures, sent as uploads or as data
URLs of whole requests; media are read as the server reads uploads, without a server, in every container, many in one
confined process (one in fifty in a process of its own, too). After every tenth of requests and bodies a good request
must still get the answer that it got before.

In: the command line. Out: a table of what came back, and JSON. Exit code 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import http.client
import json
import logging
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.serve_readers import Readers  # noqa: E402
from benchmarks.serve_rig import Rig, descriptors, films, mutated, rss_mib, tiny  # noqa: E402
from data_pipeline.frames import Sampling  # noqa: E402
from hico_jax.api import Model  # noqa: E402
from hico_jax.serve.decoder import Decoder, Limits, MediaError  # noqa: E402

PICTURES, SOURCES = ("png", "jpeg"), ("mp4", "gif", "jpeg", "png", "matroska", "avi", "mpegts")
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 2}
ODD = (
    None, True, False, 0, -1, 1e308, 2**70, "", "\u0000", "\ud83d\ude00" * 50, [], {}, [[]], {"a": {}}, "x" * 5000,
    "<image>", "file:///etc/passwd", "../../etc/passwd", "data:video/mp4;base64,AAAA", "http://127.0.0.1/", "file-0",
)  # fmt: skip


def bend(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with something in it replaced, taken away or doubled."""
    if rng.random() < 0.15:
        return ODD[int(rng.integers(len(ODD)))]
    if isinstance(value, dict) and value:
        key = list(value)[int(rng.integers(len(value)))]
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: bend(value[key], rng)}
    if isinstance(value, list) and value:
        at = int(rng.integers(len(value)))
        return [*value[:at], bend(value[at], rng), *value[at + (0 if rng.random() < 0.1 else 1) :]]
    return ODD[int(rng.integers(len(ODD)))]


def request(films: dict[str, bytes], rng: np.random.Generator) -> tuple[str, bytes, str]:
    """Path, body and content type of a broken chat request: its structure is bent, or its bytes, or both."""
    name = SOURCES[int(rng.integers(len(SOURCES)))]
    kind = "image_url" if name in PICTURES else "video_url"
    url = f"data:video/mp4;base64,{base64.b64encode(films[name]).decode()}"
    good: Any = {
        "model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "logprobs": True,
        "top_logprobs": 2, "stream": bool(rng.random() < 0.2), "hico": {"attention": True},
        "messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "?"}]}],
    }  # fmt: skip
    if rng.random() < 0.5:
        good["messages"][0]["content"] = "Hello?"
    way = rng.random()
    if way < 0.8:
        for _ in range(int(rng.integers(1, 4))):
            good = bend(copy.deepcopy(good), rng)
    data = json.dumps(good).encode()
    return "/v1/chat/completions", mutated(data, rng) if way > 0.6 else data, "application/json"


def body(films: dict[str, bytes], rng: np.random.Generator) -> tuple[str, bytes, str]:
    """The same of a broken file: as an upload, whose wrapping is broken at times, or in a good request's data URL."""
    name = SOURCES[int(rng.integers(len(SOURCES)))]
    data = mutated(films[name], rng)
    if rng.random() < 0.3:
        head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="../../a"\r\n\r\n'
        whole = head + data + b"\r\n--b--\r\n"
        return "/v1/files", mutated(whole, rng) if rng.random() < 0.3 else whole, "multipart/form-data; boundary=b"
    kind = "image_url" if name in PICTURES else "video_url"
    part = {"type": kind, kind: {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}
    wanted = {**GOOD, "max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}
    return "/v1/chat/completions", json.dumps(wanted).encode(), "application/json"


class Ears(logging.Handler):
    """Everything that was logged as an error: a traceback that no client saw is one, too."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(f"{record.name}: {record.getMessage()} {record.exc_info and record.exc_info[1]!r}")


def send(port: int, path: str, data: bytes, kind: str) -> tuple[int, bytes]:
    """Status and what was said."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
    try:
        wire.request("POST", path, body=data, headers={"content-type": kind})
        answer = wire.getresponse()
        return answer.status, answer.read()
    finally:
        wire.close()


def fuzz_server(
    make: Callable[..., tuple[str, bytes, str]], count: int, *, seed: int = 0, at_once: int = 4, seconds: float = 1e9,
    model: Model | None = None, buckets: tuple[tuple[int, int], ...] = ((4, 512),), only: Sequence[int] = (),
    warm: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Statuses, the slowest answer, and every broken promise. `only` sends those of these numbers alone."""
    ears, model, end = Ears(), model or tiny(), time.monotonic() + seconds
    heard_from = (logging.getLogger(), logging.getLogger("uvicorn"))  # a server's own settings may keep uvicorn's apart
    for logger in heard_from:
        logger.addHandler(ears)
    statuses: collections.Counter[str] = collections.Counter()
    broken: list[dict[str, Any]] = []
    memory, slowest, lock = [], [0.0, -1], threading.Lock()
    with tempfile.TemporaryDirectory() as top:
        work, sources = pathlib.Path(top) / "work", films(pathlib.Path(top))
        rig = Rig(
            model, work, buckets=buckets, piece=64, limits=Limits(seconds=5.0), warm=False, file_bytes=1 << 20,
            name="tiny", json_bytes=1 << 20, body_s=1.0, request_s=60.0, max_new_tokens=64,
        )  # fmt: skip

        def good() -> tuple[int, Any]:
            status, told = send(rig.port, "/v1/chat/completions", json.dumps(GOOD).encode(), "application/json")
            return status, json.loads(told).get("choices")

        def one(i: int) -> None:
            if time.monotonic() > end:
                return
            path, data, kind = make(sources, np.random.default_rng((seed, i)))
            began, problem = time.perf_counter(), None
            try:
                status, told = send(rig.port, path, data, kind)
                shaped = status < 400 or set(json.loads(told)["error"]) == {"message", "type", "param", "code"}
                leaks = b"Traceback" in told or top.encode() in told
                if status >= 500 or leaks or not shaped:
                    problem = {"i": i, "status": status, "said": told[:300].decode("utf-8", "replace")}
            except Exception as error:  # whatever it is, it is a broken promise
                status, problem = 0, {"i": i, "error": f"{type(error).__name__}: {error}"}
            took = time.perf_counter() - began
            with lock:
                statuses[str(status)] += 1
                slowest[:] = max(slowest, [round(took, 3), i])
                broken.extend([problem] if problem else [])

        for i in range(warm):  # what they compile counts against no deadline; what they find does not count
            with contextlib.suppress(Exception):
                send(rig.port, *make(sources, np.random.default_rng((seed + 1, i))))
        want = good()
        numbers = only or range(count)
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            for at in range(0, len(numbers), step := max(1, count // 10)):
                list(pool.map(one, numbers[at : at + step]))
                memory.append((rss_mib(), descriptors()))
                if (found := good()) != want or found[0] != 200:
                    broken.append({"after": at + step, "a good request got": found})
        if not rig.settled():
            broken.append({"stuck": "in the engine, a lane or a reader"})
        broken += [
            {"left outside": str(p)} for p in pathlib.Path(top).rglob("*") if p != work and work not in p.parents
        ]
        broken += [{"part left": p.name} for p in work.glob("*.part")]
        rig.close()
        broken += [{"left behind": p.name} for p in work.rglob("*")]
    for logger in heard_from:
        logger.removeHandler(ears)
    broken += [{"logged": text} for text in dict.fromkeys(ears.heard)]
    return {
        "sent": sum(statuses.values()), "statuses": dict(statuses), "slowest_s_and_which": slowest,
        "rss_mib_and_descriptors": memory, "broken": len(broken), "first": broken[:20],
    }  # fmt: skip


def fuzz_media(count: int, *, seed: int = 0, seconds: float = 1e9, batch: int = 50) -> dict[str, Any]:
    """What reading broken files came to; one of each batch is also read as the server does, a process of its own."""
    found: collections.Counter[str] = collections.Counter()
    limits, broken, slowest, twice = Limits(seconds=30.0, memory_bytes=1 << 30), [], 0.0, 0
    sampling, decoder, end = Sampling("dynamic_fps1", 8, 16, 4), Decoder(), time.monotonic() + seconds
    job = {"px": 32, "sampling": dataclasses.asdict(sampling), "chunk": 8}
    readers = Readers(limits, job)
    with tempfile.TemporaryDirectory() as top:
        sources = films(pathlib.Path(top))
        for at in range(0, count, batch):
            if time.monotonic() > end:
                break
            numbers = range(at, min(count, at + batch))
            paths = [pathlib.Path(top) / f"mutant{i}" for i in numbers]
            pictures = [SOURCES[i % len(SOURCES)] in PICTURES for i in numbers]
            for i, path in zip(numbers, paths, strict=True):
                path.write_bytes(mutated(sources[SOURCES[i % len(SOURCES)]], np.random.default_rng((seed, i))))
            answers = readers.read([(str(p), picture) for p, picture in zip(paths, pictures, strict=True)])
            for i, answer in zip(numbers, answers, strict=True):
                found[answer["found"]] += 1
                slowest = max(slowest, answer["seconds"])
                expected = answer["found"] in ("read", "refused", "ended by a limit")
                silent = answer["found"] == "refused" and not answer["said"]
                if not expected or silent or top in str(answer["said"]):
                    broken.append({"i": i, **answer})
            which = at // batch % len(paths)
            how = {"picture": True} if pictures[which] else {**job, "sampling": sampling}
            try:
                list(decoder.read(str(paths[which]), limits=limits, **how))
                alone = "read"
            except MediaError as error:
                alone = "ended by a limit" if "broke the reader" in str(error) else "refused"
            twice += 1
            if alone != answers[which]["found"]:
                broken.append({"i": at + which, "alone": alone, **answers[which]})
            for path in paths:
                path.unlink()
        broken += [{"left": str(p)} for p in pathlib.Path(top).rglob("*")]
    readers.close()
    decoder.close()
    return {
        "sent": sum(found.values()), "found": dict(found), "slowest_s": round(slowest, 3), "also read alone": twice,
        "broken": len(broken), "first": broken[:20],
    }  # fmt: skip


def main() -> int:
    """Print what came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--bodies", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--media", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="of each at most; says how many were sent")
    parser.add_argument("--at-once", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--only", type=int, nargs="+", default=(), metavar="I", help="requests or bodies of these numbers alone"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    out: dict[str, Any] = {}
    more: dict[str, Any] = {
        "warm": 100,
        "seed": args.seed,
        "at_once": args.at_once,
        "seconds": args.seconds,
        "only": args.only,
    }
    runs: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
        "requests": (args.requests, lambda: fuzz_server(request, args.requests, **more)),
        "bodies": (args.bodies, lambda: fuzz_server(body, args.bodies, **more)),
        "media": (args.media, lambda: fuzz_media(args.media, seed=args.seed, seconds=args.seconds)),
    }
    for name, (count, work) in runs.items():
        if count:
            out[name] = work()
            print(name, json.dumps(out[name]), flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    return 1 if any(part["broken"] for part in out.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
