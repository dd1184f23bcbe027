"""One run on changing machines: 8, then 4, then 2 devices; 1, then 2, then 4 processes. Same data, same losses.

    python benchmarks/elastic.py                  # about ten minutes of CPU time
    python benchmarks/elastic.py --plans 1x2,2x1  # lives of PROCESSESxDEVICES (each), one after the other

The control trains on one device without a stop. Every other run goes on, life after life, from the checkpoint that the
life before left on other devices or another number of processes. The order of samples must be the control's at every
step (a check sum of the ids of each global batch), losses within 1e-5 of its own. Data are packed, from a
mixture with weights. Every life is the user's own command.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLANS = ("1x8,1x4,1x2", "1x1,2x1,4x1")
TOLERANCE = 1e-5


def main(argv: list[str] | None = None) -> int:
    """Plans from the command line; 1 if data or losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="*", default=PLANS, help="lives of a run, such as 1x8,1x4,1x2")
    parser.add_argument("--steps", type=int, default=3, help="of each life")
    parser.add_argument("--model", default="tiny", help="tiny or nano")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = trial(pathlib.Path(folder), list(args.plans), args.steps, args.model)
    print(json.dumps(found, indent=2))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return int(not all(run["same"] for run in found["runs"]))


def trial(folder: pathlib.Path, plans: list[str], steps: int, model: str) -> dict[str, Any]:
    """The control and every plan."""
    data = make_data(folder)
    longest = max(len(plan.split(",")) for plan in plans)
    began = time.monotonic()
    life(folder / "control", data, "1x1", steps * longest, model)
    control = lines(folder / "control")
    runs = []
    for number, plan in enumerate(plans):
        workdir = folder / f"run{number}"
        for i, machine in enumerate(plan.split(","), 1):
            life(workdir, data, machine, steps * i, model)
        runs.append({"plan": plan} | compare(control, lines(workdir)))
        print(f"{plan}: {runs[-1]}", file=sys.stderr, flush=True)
    return {
        "model": model, "steps of a life": steps, "steps": len(control), "tolerance": TOLERANCE, "runs": runs,
        "control": [{k: line[k] for k in ("step", "order", "loss")} for line in control],
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def compare(control: list[dict[str, Any]], run: list[dict[str, Any]]) -> dict[str, Any]:
    """How far a run is from the control, over the steps it has."""
    control = control[: len(run)]
    order = bool(run) and [line["order"] for line in run] == [line["order"] for line in control]
    worst = {
        name: max((abs(a[name] / b[name] - 1) for a, b in zip(run, control, strict=True)), default=1.0)
        for name in ("loss", "grad_norm")
    }
    ok = order and worst["loss"] <= TOLERANCE
    return {"steps": len(run), "same order": order, **{f"worst {k}": float(f"{v:.2g}") for k, v in worst.items()},
            "same": ok}  # fmt: skip


def life(workdir: pathlib.Path, data: pathlib.Path, machine: str, steps: int, model: str) -> None:
    """Train up to a step on PROCESSESxDEVICES."""
    processes, devices = map(int, machine.split("x"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "hico_jax", "train",
        f"--config={ROOT}/configs/debug_tiny.py:{model}", f"--config.workdir={workdir}",
        f"--config.data.annotations={data}/mixture.yaml", f"--config.data.tokenizer={data}",
        f"--config.train.steps={steps}", f"--config.checkpoint.every={steps}", "--config.train.num_samples=0",
        "--config.optim.schedule=constant", "--config.optim.warmup_steps=2",  # so that steps to come change nothing
        "--config.data.batch_size=8", "--config.data.min_frames=4", "--config.data.max_frames=4",
        "--config.data.pack=160", "--config.data.length_buckets=(160,)", f"--config.data.index_file={data}/index.npz",
        "--config.data.read_threads=2", "--config.data.prefetch_rows=8", f"--config.train.distributed={processes > 1}",
    ]  # fmt: skip
    shared = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(data.parent / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }  # fmt: skip
    workdir.mkdir(exist_ok=True)
    started = []
    for rank in range(processes):
        told = {"HICO_COORDINATOR": f"localhost:{port}", "HICO_PROCESS": str(rank), "HICO_PROCESSES": str(processes)}
        with (workdir / f"log{rank}").open("a") as log:
            started.append(
                subprocess.Popen(command, env=shared | told if processes > 1 else shared, stdout=log, stderr=log)
            )
    for rank, process in enumerate(started):
        if process.wait():
            raise SystemExit(f"{machine}, process {rank}: {(workdir / f'log{rank}').read_text()[-3000:]}")


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What a run wrote about its steps."""
    found = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def make_data(folder: pathlib.Path) -> pathlib.Path:
    """A small world, as a mixture of films, pictures and text with weights."""
    data = folder / "world"
    command = [sys.executable, "-m", "hico_jax", "world", "--out", str(data), "--preset", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    entries = [
        {"json_path": "stage3_short.json", "data_root": "videos", "weight": 1.5},
        {"json_path": "stage2_images.json", "data_root": "images", "weight": 0.5},
        {"json_path": "text.jsonl", "weight": 2},
    ]
    (data / "mixture.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    return data


if __name__ == "__main__":
    sys.exit(main())
