"""Many requests at once, some of which hang up: no wrong answer, none stuck, memory flat; against one at a time.

    python benchmarks/serve_soak.py --model runs/demo/model --requests 1000 --json soak.json

The server runs in this process on a free port; the published `openai` client asks it. Films of several lengths,
questions of several lengths, some streamed, some without a film; one in five is cancelled at a random moment. What the
others say must be what `Model.ask` says. Memory is the process's resident set after each tenth of the requests.

In: the command line. Out: a table, and JSON. Exit code 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
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
import openai  # noqa: E402
import uvicorn  # noqa: E402

from data_pipeline import video  # noqa: E402
from hico_jax import api  # noqa: E402
from hico_jax.generate import GenerationConfig  # noqa: E402
from hico_jax.serve import app, command, media  # noqa: E402
from hico_jax.serve.decoder import Limits  # noqa: E402
from hico_jax.serve.engine import Engine  # noqa: E402
from hico_jax.serve.timed import Timed  # noqa: E402

QUESTIONS = (
    "What colour is the card?",
    "What shape is on the card?",
    "Is there a red card?",
    "Which card comes first?",
)
TOKENS = 12
CANCELLED = 0.2


def rss_mib() -> float:
    """Memory of this process now."""
    text = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


class Load:
    """The server, its films, and what the right answers are."""

    def __init__(self, folder: str, work: pathlib.Path, lengths: list[int]) -> None:
        self.model = api.load(folder)
        longest = max(lengths) // 4 * self.model.geometry.tokens_per_clip + 512
        self.engine = Engine(self.model.hico, self.model.tokenizer, buckets=((8, 512), (4, longest)), queue=64)
        limits, allowance = Limits(), media.Allowance()
        self.store = media.Store(work / "uploads", self.model, self.engine.call, limits=limits, allowance=allowance)
        options = app.Options(name="soak", request_s=120.0)
        config = uvicorn.Config(
            app.Server(self.model, self.engine, self.store, options).app(), port=0, log_level="error", http=Timed,
            ws="none", lifespan="off",
        )  # fmt: skip
        command.warm(self.engine, self.model)
        self.engine.start()
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        rng = np.random.default_rng(0)
        client = openai.OpenAI(base_url=self.url, api_key="none")
        self.ids: list[str | None] = [None]
        self.right: dict[tuple[int, int], str] = {}
        settings = GenerationConfig(max_new_tokens=TOKENS, eos=self.model.tokenizer.eos_ids)
        for i, length in enumerate([0, *lengths]):
            seen = None
            if length:
                colours = rng.integers(0, 256, (length, 4, 4, 3), dtype=np.uint8)
                path = video.write_video(work / f"{i}.mp4", colours.repeat(16, 1).repeat(16, 2), 1.0)
                self.ids.append(client.files.create(file=path, purpose="vision").id)
                seen = self.model.watch(path)
            answers = self.model.viewer.ask_many([seen] * len(QUESTIONS), list(QUESTIONS), config=settings)
            self.right |= {(i, q): answer.text for q, answer in enumerate(answers)}

    def messages(self, film: int, question: int) -> list[Any]:
        """What is sent for a pair."""
        text = QUESTIONS[question]
        if self.ids[film] is None:
            return [{"role": "user", "content": text}]
        part = {"type": "video_url", "video_url": {"url": self.ids[film]}}
        return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        self.store.close()


async def one(client: openai.AsyncOpenAI, load: Load, pair: tuple[int, int], stream: bool, patience: float) -> str:
    """What a request came to: right, wrong, cancelled, or an error's name."""

    async def ask() -> str:
        if not stream:
            reply = await client.chat.completions.create(model="soak", messages=load.messages(*pair), max_tokens=TOKENS)
            return reply.choices[0].message.content or ""
        text = ""
        events = await client.chat.completions.create(
            model="soak", messages=load.messages(*pair), max_tokens=TOKENS, stream=True
        )
        async for event in events:
            text += event.choices[0].delta.content or ""
        return text

    try:
        said = await asyncio.wait_for(ask(), patience)
    except TimeoutError:
        return "cancelled" if patience < 100 else "stuck"
    except openai.APIError as error:
        return type(error).__name__
    return "right" if said == load.right[pair] else "wrong"


async def run(load: Load, count: int, at_once: int, cancelled: float, seed: int) -> dict[str, Any]:
    """So many requests, `at_once` at a time."""
    rng = np.random.default_rng(seed)
    client = openai.AsyncOpenAI(base_url=load.url, api_key="none", max_retries=0, timeout=200)
    gate, outcomes, times, memory = asyncio.Semaphore(at_once), [], [], []

    async def go(pair: tuple[int, int], stream: bool, patience: float) -> None:
        async with gate:
            began = time.perf_counter()
            outcome = await one(client, load, pair, stream, patience)
            outcomes.append(outcome)
            if outcome in ("right", "wrong"):
                times.append(time.perf_counter() - began)
            if len(outcomes) % max(1, count // 10) == 0:
                memory.append(round(rss_mib(), 1))

    jobs = []
    for _ in range(count):
        pair = (int(rng.integers(len(load.ids))), int(rng.integers(len(QUESTIONS))))
        patience = float(rng.uniform(0, 0.5)) if rng.random() < cancelled else 150.0
        jobs.append(go(pair, bool(rng.random() < 0.5), patience))
    began, process = time.perf_counter(), time.process_time()
    await asyncio.gather(*jobs)
    seconds = time.perf_counter() - began
    await client.close()
    done = sorted(times)
    at = lambda share: round(done[min(len(done) - 1, int(share * len(done)))], 3)
    return {
        "requests": count, "at_once": at_once, "seconds": round(seconds, 2),
        "cpu_s": round(time.process_time() - process, 2), "requests_per_s": round(count / seconds, 2),
        "p50_s": at(0.5), "p95_s": at(0.95), "max_s": round(done[-1], 3),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))}, "rss_mib": memory,
    }  # fmt: skip


def main() -> int:
    """Print both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model", help="(%(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--sequential", type=int, default=100, help="one at a time, for comparison (%(default)s)")
    parser.add_argument("--at-once", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--frames", default="8,32,128,512", help="lengths of the films (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        load = Load(args.model, pathlib.Path(work), [int(n) for n in args.frames.split(",")])
        asyncio.run(run(load, 2 * args.at_once, args.at_once, 0.0, 99))  # everything is compiled after it
        out = {
            "sequential": asyncio.run(run(load, args.sequential, 1, 0.0, 1)),
            "together": asyncio.run(run(load, args.requests, args.at_once, CANCELLED, 2)),
        }
        for _ in range(200):
            if load.engine.idle:
                break
            time.sleep(0.05)
        out["stuck in the engine"] = 0 if load.engine.idle else 1
        out["busy lanes"] = sum(lane.busy for pool in load.engine.pools for lane in pool.lanes)
        out["engine"] = {**load.engine.counts.requests, "reused_tokens": load.engine.counts.reused_tokens}
        load.close()
    print(json.dumps(out, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    allowed = {"right", "cancelled"}
    bad = [name for way in ("sequential", "together") for name in out[way]["outcomes"] if name not in allowed]
    return 1 if bad or out["stuck in the engine"] or out["busy lanes"] else 0


if __name__ == "__main__":
    sys.exit(main())
