"""A second question on an open film: time to its first token beside the first question's.

    python benchmarks/second_question.py --model umt_qwen2_7b --frames 10000 --json second.json    # on a GPU
    python benchmarks/second_question.py --weights nano --drop attention --repeats 1               # on a CPU

Random weights (unless a folder is named) and random visual tokens: time depends on neither. What runs is what
`hico serve` and `Session` run: a lane, the prompt in pieces, then another prompt that begins alike; with and without
video-level compression. Everything is compiled before the first question. On a busy machine read the CPU's seconds.

In: the command line. Out: a Markdown table, and JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.speed.models import build  # noqa: E402
from hico_jax import api, registry  # noqa: E402
from hico_jax.batch import DropSchedule  # noqa: E402
from hico_jax.generate import GenerationConfig  # noqa: E402
from hico_jax.serve import prompts  # noqa: E402
from hico_jax.serve.pool import Pool, Ready  # noqa: E402
from hico_jax.serve.warming import Programs  # noqa: E402

TEXT, QUESTION = 16, 48  # tokens before the film and behind it


def schedules(num_layers: int) -> dict[str, DropSchedule]:
    """No drop; even drop to 3/4, then guided to 1/4; guided to 1/4 alone, early."""
    early, late = max(1, num_layers // 7), max(2, num_layers * 9 // 14)
    return {
        "none": DropSchedule(),
        "uniform0_attention": DropSchedule("uniform0_attention", (early, late), (1.0, 0.75, 0.25)),
        "attention": DropSchedule("attention", (early,), (1.0, 0.25)),
    }


class Bare:
    """As much of a model as the lanes need."""

    def __init__(self, config: Any, llm: Any) -> None:
        self.config, self.llm = config, llm


def question(visual: Any, count: int, seed: int, drop: DropSchedule, vocab: int) -> prompts.Prompt:
    """The same film and the same beginning, and a question of its own."""
    rng = np.random.default_rng(seed)
    length = TEXT + count + QUESTION
    slots = np.full(length, -1, np.int32)
    slots[TEXT : TEXT + count] = np.arange(count)
    tokens = np.zeros(length, np.int32)
    tokens[:TEXT] = 1 + np.arange(TEXT)
    tokens[TEXT + count :] = rng.integers(1, vocab, QUESTION)
    names = np.where(slots >= 0, -(2**32) - slots.astype(np.int64) - 1, tokens)
    survives, kept = prompts.drop_of(slots, drop)
    return prompts.Prompt(tokens, slots, names, visual, survives, kept)


def first_token(pool: Pool, prompt: prompts.Prompt, config: GenerationConfig) -> tuple[float, float, int]:
    """Seconds until it is there, those of the CPU, and tokens that did not run again."""
    began, process = time.perf_counter(), time.process_time()
    lane, reused = pool.best(prompt)
    assert lane is not None
    *_, ready = pool.fill(lane, prompt)
    assert isinstance(ready, Ready)
    pool.first(lane, ready, config)
    pool.leave(lane)
    return time.perf_counter() - began, time.process_time() - process, reused


def measure(name: str, weights: str, frames: int, piece: int, kind: str, repeats: int) -> dict[str, Any]:
    """One row: compile, then a film that is new and questions about it."""
    hico = api.load(weights).hico if weights else None
    config = hico.config if hico is not None else registry.model_config(name)
    drop = schedules(config.llm.num_layers)[kind]
    geometry = config.geometry()
    count = frames // geometry.frames_per_clip * geometry.tokens_per_clip
    config = dataclasses.replace(config, drop=drop, max_length=count + 4096)
    dtype = jnp.dtype(config.dtype)
    llm = hico.llm if hico is not None else build(config.llm, dtype)
    visual = jax.random.normal(jax.random.key(0), (1, count, config.llm.embed_dim), dtype) * jnp.asarray(0.02, dtype)
    pool = Pool(Bare(config, llm), count=1, capacity=count + 1024, piece=piece, text_room=1024)  # type: ignore[arg-type]
    settings = GenerationConfig(max_new_tokens=32, eos=())
    ask = lambda seed, count=count: question(visual, count, seed, drop, config.llm.vocab_size)
    began = time.perf_counter()
    needed = Programs(pool)
    for compiled in (*needed.prefill(), *needed.far(), *needed.steps(1)):
        compiled()
    first_token(pool, ask(0, min(count, 4 * piece)), settings)  # a short film in a long lane: the small things around
    compile_s = time.perf_counter() - began
    firsts, seconds = [], []
    for i in range(repeats):
        pool.lanes[0].held = None  # forget the film
        firsts.append(first_token(pool, ask(2 + 2 * i), settings)[:2])
        *took, reused = first_token(pool, ask(3 + 2 * i), settings)
        assert reused == TEXT + count, reused
        seconds.append(took)
    lane, last, began = pool.lanes[0], 1, 0.0
    for step in range(32):
        began = time.perf_counter() if step == 1 else began  # the first may compile
        last = int(pool.step([lane], [last], [settings], [step]).ids[0])
    token_s = (time.perf_counter() - began) / 31
    stats = jax.local_devices()[0].memory_stats() or {}
    (first_s, first_cpu_s), (second_s, second_cpu_s) = min(firsts), min(seconds)
    return {
        "model": weights or name, "frames": frames, "visual_tokens": count, "drop": kind, "piece": pool.piece,
        "first_s": first_s, "second_s": second_s, "ratio": second_s / first_s, "first_cpu_s": first_cpu_s,
        "second_cpu_s": second_cpu_s, "token_s": token_s, "compile_s": compile_s, "lane_gib": pool.num_bytes / 2**30,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30, "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }  # fmt: skip


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a name of `hico models` (%(default)s)")
    parser.add_argument("--weights", default="", metavar="FOLDER", help="instead of random ones; nano ships")
    parser.add_argument("--frames", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--piece", type=int, default=0, help="tokens at a time (2048 on an accelerator, 256 on a CPU)")
    parser.add_argument("--drop", default="none,uniform0_attention", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    piece = args.piece or (256 if jax.default_backend() == "cpu" else 2048)
    names = ("model", "frames", "visual tokens", "drop", "first question, s", "second, s", "second / first", "CPU s")
    print(f"| {' | '.join(names)} | ms a token | lane GiB |")
    print("|---|--:|--:|---|--:|--:|--:|---|--:|--:|")
    rows = []
    for kind in args.drop.split(","):
        row = measure(args.model, args.weights, args.frames, piece, kind, args.repeats)
        rows.append(row)
        print(
            f"| {row['model']} | {row['frames']:,} | {row['visual_tokens']:,} | {kind} | {row['first_s']:.3f} | "
            f"{row['second_s']:.3f} | {row['ratio']:.2%} | {row['first_cpu_s']:.2f} and {row['second_cpu_s']:.2f} | "
            f"{1000 * row['token_s']:.1f} | {row['lane_gib']:.2f} |",
            flush=True,
        )
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
