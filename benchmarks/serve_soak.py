"""Many requests at once, some broken, some hung up: no wrong answer, none lost or stuck, memory and descriptors flat.

    python benchmarks/serve_soak.py --requests 1000 --json soak.json        (a tiny random model; minutes on two cores)
    python benchmarks/serve_soak.py --model nano --frames 8,16,32,64                             (the one that ships)

The server runs in this process on a free port; the published `openai` client and bare sockets ask it. Films of several
lengths, as uploads and as data URLs, pictures, text alone; questions of several lengths; some streamed; one in five
hangs up at a random moment, some in the middle of a body; one in ten brings a broken file or a request that makes no
sense. What the others say must be what `Model.ask` says, token for token. One at a time is measured in the same run.

In: the command line. Out: a table, and JSON. Exit code 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import openai  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.serve_rig import Rig, descriptors, films, rss_mib, tiny  # noqa: E402
from hico_jax import api  # noqa: E402
from hico_jax.evals import needle  # noqa: E402
from hico_jax.generate import GenerationConfig  # noqa: E402

QUESTIONS = (
    "What colour is the card?",
    "What shape is on the card?",
    "When is the card shown, and where does it stand when the film ends?",
    "In which part of the film is the card?",
    "Is there a red card?",
    "How many cards are there?",
    "Describe the film.",
    "Which?",
)
TOKENS = 12
HUNG_UP, BROKEN = 0.2, 0.1
GOOD = {"right", "hung up", "refused as it should be"}


class Load:
    """The server, what is sent to it, and what the right answers are."""

    def __init__(self, folder: str, work: pathlib.Path, lengths: list[int], each: int) -> None:
        model = api.load(folder) if folder else tiny()
        longest = max(lengths) // model.geometry.frames_per_clip * model.geometry.tokens_per_clip + 512
        self.rig = Rig(model, work / "uploads", buckets=((8, 512), (4, longest)), name="soak", request_s=120.0)
        rng, client = np.random.default_rng(0), openai.OpenAI(base_url=self.rig.url, api_key="none")
        self.shown: list[dict[str, Any] | None] = [None]
        seen: list[Any] = [None]
        for i, length in enumerate(length for length in lengths for _ in range(each)):
            path = pathlib.Path(needle.hide(work, length, float(rng.uniform()), i).film.path)
            url = client.files.create(file=path, purpose="vision").id
            if length == lengths[0]:  # the shortest come as a data URL each time
                url = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
            self.shown.append({"type": "video_url", "video_url": {"url": url}})
            seen.append(model.watch(path))
        picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        picture.save(work / "a.png")
        url = f"data:image/png;base64,{base64.b64encode((work / 'a.png').read_bytes()).decode()}"
        self.shown.append({"type": "image_url", "image_url": {"url": url}})
        seen.append(model.look([picture]))
        settings = GenerationConfig(max_new_tokens=TOKENS, eos=model.tokenizer.eos_ids)
        spell = lambda ids: tuple(model.tokenizer.decode([i], skip_special=False) for i in ids)
        self.right: dict[tuple[int, int], tuple[str, tuple[str, ...]]] = {}
        for i, one in enumerate(seen):
            for q, question in enumerate(QUESTIONS):
                turn = {"role": "user", "content": question, "seen": () if one is None else (one,)}
                reply = model._reply([turn], settings)
                self.right[i, q] = (reply.text, spell(reply.ids))
        self.broken = films(work)
        client.close()

    def messages(self, shown: int, question: int) -> list[Any]:
        """What is sent for a pair."""
        text = QUESTIONS[question]
        part = self.shown[shown]
        return [{"role": "user", "content": text if part is None else [part, {"type": "text", "text": text}]}]

    def nonsense(self, rng: np.random.Generator) -> dict[str, Any]:
        """A request that must be refused: a file that is cut or no film at all, or fields that make no sense."""
        wrong = [{"temperature": "hot"}, {"n": 3}, {"max_tokens": -1}, {"messages": []}, {"model": "other"}]
        good = {"model": "soak", "messages": self.messages(0, 0), "max_tokens": TOKENS}
        if rng.random() < 0.5:
            return {**good, **wrong[int(rng.integers(len(wrong)))]}
        name = ("mp4", "gif", "png", "jpeg")[int(rng.integers(4))]
        data = self.broken[name][: int(rng.integers(1, 40))] if rng.random() < 0.5 else rng.bytes(5000)
        kind = "video_url" if name in ("mp4", "gif") else "image_url"
        part = {"type": kind, kind: {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}
        return {**good, "messages": [{"role": "user", "content": [part]}]}


async def asked(
    client: openai.AsyncOpenAI, load: Load, pair: tuple[int, int], stream: bool
) -> tuple[str, tuple[str, ...]]:
    """The whole answer, and its tokens."""
    body: dict[str, Any] = {
        "model": "soak", "messages": load.messages(*pair), "max_tokens": TOKENS, "logprobs": True,
    }  # fmt: skip
    if not stream:
        choice = (await client.chat.completions.create(**body)).choices[0]
        return choice.message.content or "", tuple(one.token for one in choice.logprobs.content)
    text, tokens = "", []
    async for event in await client.chat.completions.create(**body, stream=True):
        text += event.choices[0].delta.content or ""
        tokens += [one.token for one in event.choices[0].logprobs.content] if event.choices[0].logprobs else []
    return text, tuple(tokens)


async def refused(load: Load, body: dict[str, Any]) -> str:
    """What a request that makes no sense gets."""
    status, told = await post(load.rig.port, json.dumps(body).encode())
    shaped = status in (400, 404) and set(json.loads(told)["error"]) == {"message", "type", "param", "code"}
    return "refused as it should be" if shaped else f"nonsense was answered {status}"


async def post(port: int, data: bytes, cut: float = 1.0) -> tuple[int, bytes]:
    """Status and body; with `cut` the connection ends after that share of the request, unanswered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    whole = f"{head}content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data
    try:
        writer.write(whole[: int(cut * len(whole))])
        await writer.drain()
        if cut < 1:
            return 0, b""
        answer = await asyncio.wait_for(reader.read(), 130)
        status, _, told = answer.partition(b"\r\n\r\n")
        return int(status.split()[1]), told
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def one(client: openai.AsyncOpenAI, load: Load, rng: np.random.Generator, hostile: bool) -> str:
    """What a request came to."""
    pair = (int(rng.integers(len(load.shown))), int(rng.integers(len(QUESTIONS))))
    stream, way, moment = bool(rng.random() < 0.5), rng.random(), float(rng.uniform(0, 0.5))
    if hostile and way < BROKEN:
        return await refused(load, load.nonsense(rng))
    if hostile and way < BROKEN + HUNG_UP / 4:  # in the middle of the request
        body = {"model": "soak", "messages": load.messages(*pair), "max_tokens": TOKENS}
        await post(load.rig.port, json.dumps(body).encode(), 2 * moment)
        return "hung up"
    hangs_up = hostile and way < BROKEN + HUNG_UP
    try:
        said = await asyncio.wait_for(asked(client, load, pair, stream), moment if hangs_up else 150)
    except TimeoutError:
        return "hung up" if hangs_up else "stuck"
    return "right" if said == load.right[pair] else "wrong"


async def run(load: Load, count: int, at_once: int, seed: int, *, hostile: bool) -> dict[str, Any]:
    """So many requests, `at_once` at a time."""
    client = openai.AsyncOpenAI(base_url=load.rig.url, api_key="none", max_retries=0, timeout=200)
    gate, outcomes, times, memory = asyncio.Semaphore(at_once), [], [], []

    async def go(i: int) -> None:
        async with gate:
            began = time.perf_counter()
            try:
                outcome = await one(client, load, np.random.default_rng((seed, i)), hostile)
            except Exception as error:  # whatever it is, it is an outcome nobody wanted
                outcome = f"{type(error).__name__}: {error}"[:200]
            outcomes.append(outcome)
            if outcome in ("right", "wrong"):
                times.append(time.perf_counter() - began)
            if len(outcomes) % max(1, count // 10) == 0:
                memory.append((rss_mib(), descriptors()))

    began, process = time.perf_counter(), time.process_time()
    await asyncio.gather(*(go(i) for i in range(count)))
    seconds, process = time.perf_counter() - began, time.process_time() - process
    await client.close()
    done = sorted(times)
    at = lambda share: round(done[min(len(done) - 1, int(share * len(done)))], 3)
    return {
        "requests": count, "at_once": at_once, "seconds": round(seconds, 2),  "cpu_s": round(process, 2),
        "requests_per_s": round(count / seconds, 2), "cpu_s_per_request": round(process / count, 4),
        "p50_s": at(0.5), "p95_s": at(0.95), "max_s": at(1.0),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "lost": count - len(outcomes), "rss_mib_and_descriptors": memory,
    }  # fmt: skip


def soak(
    folder: str, count: int, sequential: int, at_once: int, lengths: list[int], each: int = 3, *, seed: int = 2
) -> tuple[dict[str, Any], list[str]]:
    """What came of it, and which promises were broken."""
    with tempfile.TemporaryDirectory() as work:
        load = Load(folder, pathlib.Path(work), lengths, each)
        asyncio.run(run(load, 4 * at_once, at_once, 99, hostile=True))  # everything is compiled after it
        settled, before = load.rig.settled(), descriptors()
        out: dict[str, Any] = {
            "model": folder or "tiny, random", "different requests": len(load.right),
            "different answers": len(set(load.right.values())),
        }  # fmt: skip
        if sequential:
            out["one at a time"] = asyncio.run(run(load, sequential, 1, 1, hostile=False))
            out["at once"] = asyncio.run(run(load, sequential, at_once, 1, hostile=False))
        out["hostile"] = asyncio.run(run(load, count, at_once, seed, hostile=True))
        settled = load.rig.settled() and settled
        time.sleep(0.5)
        counts, store = load.rig.engine.counts, load.rig.store
        out |= {
            "descriptors before and after": (before, descriptors()),
            "engine": {**counts.requests, "reused_tokens": counts.reused_tokens, "prompt_tokens": counts.prompt_tokens},
            "parts left": len(list(store.folder.glob("*.part"))),
        }
        load.rig.close()
    broken = [] if settled else ["something stayed in the engine, in a lane or at a reader"]
    for way in ("one at a time", "at once", "hostile"):
        told = out.get(way)
        if told is None:
            continue
        broken += [f"{way}: {n} {name}" for name, n in told["outcomes"].items() if name not in GOOD]
        broken += [f"{way}: {told['lost']} lost"] * (told["lost"] > 0)
    memory = [m for m, _ in out["hostile"]["rss_mib_and_descriptors"]]
    if memory[-1] > max(memory[: max(1, len(memory) // 2)]) + 64:
        broken.append(f"memory grew: {memory}")
    if descriptors() > before + 8:
        broken.append(f"descriptors grew from {before} to {descriptors()}")
    broken += [f"{out['parts left']} parts left"] * (out["parts left"] > 0)
    return out, broken


def main() -> int:
    """Print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder, or nano (a tiny random model)")
    parser.add_argument("--requests", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--sequential", type=int, default=100, help="one at a time, for comparison (%(default)s)")
    parser.add_argument("--at-once", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--frames", default="8,16,32,64", help="lengths of the films (%(default)s)")
    parser.add_argument("--films", type=int, default=3, help="of each length (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    lengths = [int(n) for n in args.frames.split(",")]
    out, broken = soak(args.model, args.requests, args.sequential, args.at_once, lengths, args.films)
    print(json.dumps({**out, "broken": broken}, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({**out, "broken": broken}, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
