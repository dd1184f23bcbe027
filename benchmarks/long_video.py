"""Real inference of a released size by number of frames, compression on and off: time of each step, memory.

    python benchmarks/long_video.py [--model umt_qwen2_7b] [--frames 64,256,1000,4000,10000] [--json FILE]

Random weights: time and memory do not depend on them. Each line runs in a process of its own, so that peak memory is
its own. `hico bench --model WEIGHTS` makes the same table for weights on disk. No network; films go to a new folder.
Beside JAX, Flax and NumPy it needs av, pillow and tokenizers; nothing else of requirements.txt.

In: the command line. Out: a Markdown table, and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
WAYS = ("off", "clip level", "clip and video level")


def line(name: str, film: str, frames: int, way: str) -> dict[str, Any]:
    """Time one film in this process."""
    sys.path.insert(0, str(ROOT))
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from data_pipeline.tokenizer import train_bpe
    from data_pipeline.world.texts import corpus
    from hico_jax import registry
    from hico_jax.batch import DropSchedule
    from hico_jax.evals import card
    from hico_jax.evals.compress import bench, latency, methods
    from hico_jax.options import parse_drop

    config = dataclasses.replace(registry.model_config(name), max_length=methods.ROOM)

    @jax.jit
    def build() -> Any:
        state = nnx.state(config.build(rngs=nnx.Rngs(params=0)))
        return jax.tree.map(lambda a: a.astype(jnp.dtype(config.dtype)), state)

    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(params=0))))
    model = nnx.merge(graph, build())
    wanted = "none" if way == "off" else "merge"
    (method,) = (m for m in methods.methods(model) if m.name == wanted)
    if "video" in way:
        drop = DropSchedule(*parse_drop(bench.default_drop(config.llm.num_layers)))
        method = dataclasses.replace(method, drop=drop)
    model = methods.apply(model, method)
    found = latency.measure(model, train_bpe(corpus(), 512), film, frames)
    device = jax.devices()[0].device_kind
    return {"model": name, "frames": frames, "way": way, "device": device, **found, "peak_mib": card.peak_memory_mib()}


def main() -> None:
    """All lines, each in a new process; a line that fails says so and the next is tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="umt_qwen2_7b")
    parser.add_argument("--frames", default="64,256,1000,4000,10000")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--max-tokens", type=int, default=210_000, help="longer rows are left out")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds of one line")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--line", nargs=3, metavar=("FILM", "FRAMES", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.line:
        film, frames, way = args.line
        print(json.dumps(line(args.model, film, int(frames), way)))
        return
    sys.path.insert(0, str(ROOT))
    from data_pipeline.world import films
    from hico_jax import registry
    from hico_jax.evals.compress import bench

    config = registry.model_config(args.model)
    patches = (config.vision.image_px // config.vision.patch_px) ** 2
    lines = []
    print(f"| {' | '.join(bench.COLUMNS)} |\n|{'---|' * len(bench.COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for frames in map(int, args.frames.split(",")):
            film = f"{folder}/{frames}.mp4"
            films.haystack(film, num_seconds=frames, seed=0, split="val")
            for way in args.ways.split(","):
                tokens = frames * (patches if way == "off" else config.compressor.tokens_per_frame)
                one: dict[str, Any] = {"frames": frames, "way": way, "visual_tokens": tokens}
                if tokens > args.max_tokens:
                    one["skipped"] = f"{tokens:,} tokens are more than --max-tokens {args.max_tokens:,}"
                else:
                    one |= _run(args.model, film, frames, way, args.timeout)
                lines.append(one)
                print(f"| {' | '.join(bench.table([one])[0])} |", flush=True)
                if args.json:  # after every line: the next may take the machine down
                    args.json.write_text(json.dumps(lines, indent=1) + "\n")


def _run(model: str, film: str, frames: int, way: str, timeout: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", model, "--line", film, str(frames), way]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:g} s"}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
