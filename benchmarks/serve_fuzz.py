"""Throw broken requests and broken videos at the server: nothing may crash, hang, answer 500 or leave a file.

    python benchmarks/serve_fuzz.py --requests 10000 --videos 10000 --json fuzz.json

The server runs in this process on a free port, with a tiny random model and limits of two seconds; requests are
mutations of good ones (of their structure and of their bytes), videos are mutations of films and of a picture, read as
the server reads uploads.

In: the command line. Out: a table of what came back, and JSON. Exit code 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import base64
import collections
import copy
import http.client
import io
import json
import pathlib
import sys
import tempfile
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import uvicorn  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.speed.models import build  # noqa: E402
from data_pipeline import video  # noqa: E402
from data_pipeline.frames import Sampling  # noqa: E402
from data_pipeline.tokenizer import train_bpe  # noqa: E402
from data_pipeline.world.texts import corpus  # noqa: E402
from hico_jax import registry  # noqa: E402
from hico_jax.api import Model  # noqa: E402
from hico_jax.film import Viewer  # noqa: E402
from hico_jax.serve import app, media  # noqa: E402
from hico_jax.serve.decoder import Decoder, Limits, MediaError  # noqa: E402
from hico_jax.serve.engine import Engine  # noqa: E402
from hico_jax.serve.timed import Timed  # noqa: E402

CONTAINERS = ("mp4", "mkv", "avi", "mpegts", "gif", "png")
ODD = (
    None, True, False, 0, -1, 1e308, 2**70, "", "\u0000", "\ud83d\ude00" * 50, [], {}, [[]], {"a": {}}, "x" * 5000,
    "<image>", "file:///etc/passwd", "../../etc/passwd", "data:video/mp4;base64,AAAA", "http://127.0.0.1/", "file-0",
)  # fmt: skip


def tiny() -> Model:
    """A random model that answers in milliseconds."""
    words = train_bpe(corpus(), 400)
    config = registry.model_config("nano")
    hico = build(config, np.float32)
    model = Model(hico)
    viewer = Viewer(hico, words, sampling=Sampling("dynamic_fps1", 8, 16, 4), clips_per_step=2)
    model.__dict__ |= {"tokenizer": words, "viewer": viewer}
    return model


def films(folder: pathlib.Path) -> dict[str, bytes]:
    """The same second of colours in every container."""
    import av

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    made = {"mp4": video.write_video(folder / "a.mp4", frames, 4.0).read_bytes()}
    for name, codec in (("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")):
        data = io.BytesIO()
        with av.open(data, "w", format=name) as out:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
        made[name] = data.getvalue()
    pictures = [Image.fromarray(f) for f in frames]
    for name in ("gif", "png"):
        data = io.BytesIO()
        more = {"save_all": True, "append_images": pictures[1:]} if name == "gif" else {}
        pictures[0].save(data, format=name, **more)
        made[name] = data.getvalue()
    return made


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, cut, doubled, moved or put in."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(out))) if len(out) else 0
        kind, size = int(rng.integers(6)), int(rng.integers(1, 64))
        if kind == 0:
            out[at : at + size] = rng.bytes(len(out[at : at + size]))
        elif kind == 1 and out:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del out[at : at + size * 8]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**24])).to_bytes(4, "big")
        elif rng.random() < 0.2:
            del out[at:]
    return bytes(out)


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


def body(films: dict[str, bytes], rng: np.random.Generator) -> tuple[str, bytes, str]:
    """Path, body and content type of a broken request."""
    name = list(films)[int(rng.integers(len(films)))]
    kind = "image_url" if name == "png" else "video_url"
    text = {"type": "text", "text": "What?"}
    url = f"data:video/mp4;base64,{base64.b64encode(films[name]).decode()}"
    good = {
        "model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "logprobs": True,
        "top_logprobs": 2, "stream": bool(rng.random() < 0.2), "hico": {"attention": True},
        "messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}, text]}],
    }  # fmt: skip
    if rng.random() < 0.5:
        good["messages"][0]["content"] = "Hello?"
    way = rng.random()
    if way < 0.1:
        head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="../../a"\r\n\r\n'
        return "/v1/files", mutated(head + films[name] + b"\r\n--b--\r\n", rng), "multipart/form-data; boundary=b"
    for _ in range(int(rng.integers(1, 4))):
        good = bend(copy.deepcopy(good), rng)
    data = json.dumps(good).encode()
    return "/v1/chat/completions", mutated(data, rng) if way < 0.4 else data, "application/json"


def fuzz_requests(count: int, seed: int, deadline: float) -> dict[str, Any]:
    """Statuses, the slowest answer, and every broken promise."""
    with tempfile.TemporaryDirectory() as top:
        work, rng = pathlib.Path(top) / "work", np.random.default_rng(seed)
        model = tiny()
        engine = Engine(model.hico, model.tokenizer, buckets=((4, 512),), piece=128, queue=64).start()
        limits = Limits(seconds=2.0)
        store = media.Store(work, model, engine.call, limits=limits, allowance=media.Allowance(file_bytes=1 << 20))
        options = app.Options(name="tiny", json_bytes=1 << 20, body_s=1.0, request_s=20.0, max_new_tokens=64)
        config = uvicorn.Config(
            app.Server(model, engine, store, options).app(), port=0, log_level="critical", http=Timed, ws="none",
            lifespan="off",
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        sources = films(pathlib.Path(top))
        before = {p for p in pathlib.Path(top).rglob("*") if work not in p.parents}
        statuses: collections.Counter[str] = collections.Counter()
        broken, slowest = [], 0.0
        done = 0
        for i in range(count):
            if time.monotonic() > deadline:
                break
            done += 1
            path, data, kind = body(sources, rng)
            wire = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            began = time.perf_counter()
            try:
                wire.request("POST", path, body=data, headers={"content-type": kind})
                answer = wire.getresponse()
                told = answer.read()
                statuses[str(answer.status)] += 1
                shaped = answer.status < 400 or set(json.loads(told)["error"]) == {"message", "type", "param", "code"}
                if (
                    (answer.status >= 500 and answer.status != 504)
                    or not shaped
                    or b"Traceback" in told
                    or top.encode() in told
                ):
                    broken.append({"i": i, "status": answer.status, "said": told[:300].decode("utf-8", "replace")})
            except Exception as error:  # whatever it is, it is a broken promise
                broken.append({"i": i, "error": f"{type(error).__name__}: {error}"})
            finally:
                wire.close()
            slowest = max(slowest, time.perf_counter() - began)
        after = {p for p in pathlib.Path(top).rglob("*") if work not in p.parents}
        broken += [{"left": str(p)} for p in after - before]
        parts = len(list(work.glob("*.part")))
        broken += [{"parts left": parts}] if parts else []
        for _ in range(100):
            if engine.idle:
                break
            time.sleep(0.1)
        broken += [] if engine.idle else [{"stuck": len(engine.speaking) + len(engine.filling) + len(engine.waiting)}]
        server.should_exit = True
        thread.join(20)
        engine.close()
        store.close()
    return {"requests": done, "statuses": dict(statuses), "slowest_s": round(slowest, 3), "broken": broken[:20]}


def fuzz_videos(count: int, seed: int, deadline: float) -> dict[str, Any]:
    """What reading broken files came to."""
    rng, found = np.random.default_rng(seed), collections.Counter()
    limits, broken, slowest = Limits(seconds=5.0, memory_bytes=1 << 30), [], 0.0
    sampling = Sampling("dynamic_fps1", 8, 16, 4)
    decoder = Decoder()
    with tempfile.TemporaryDirectory() as top:
        sources = films(pathlib.Path(top))
        before = set(pathlib.Path(top).rglob("*"))
        done = 0
        for i in range(count):
            if time.monotonic() > deadline:
                break
            done += 1
            name = list(sources)[i % len(sources)]
            path = pathlib.Path(top) / "mutant"
            path.write_bytes(mutated(sources[name], rng))
            began = time.perf_counter()
            try:
                if name == "png":
                    list(decoder.read(str(path), limits=limits, picture=True))
                else:
                    list(decoder.read(str(path), limits=limits, px=32, sampling=sampling, chunk=8))
                found["read"] += 1
            except MediaError as error:
                text = str(error)
                found["broke or out of bounds" if "broke the reader" in text else "refused with a sentence"] += 1
                if top in text or not text:
                    broken.append({"i": i, "said": text})
            except Exception as error:
                broken.append({"i": i, "error": f"{type(error).__name__}: {error}"})
            slowest = max(slowest, time.perf_counter() - began)
            if time.perf_counter() - began > limits.seconds + 6:
                broken.append({"i": i, "seconds": slowest})
            path.unlink()
        broken += [{"left": str(p)} for p in set(pathlib.Path(top).rglob("*")) - before]
    decoder.close()
    return {"videos": done, "found": dict(found), "slowest_s": round(slowest, 3), "broken": broken[:20]}


def main() -> int:
    """Print what came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--videos", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="of each at most; says how many were run")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    out = {}
    for name, run, count in (("videos", fuzz_videos, args.videos), ("requests", fuzz_requests, args.requests)):
        if count:
            out[name] = run(count, args.seed, time.monotonic() + args.seconds)
            print(json.dumps(out[name]), flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    return 1 if any(part["broken"] for part in out.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
