"""Train through the four stages with the same command a user types, and pull the plug once.

In: the world's folder. Out: a workdir for each stage; what each took, and the proof that the resumed run repeats
the killed one's losses exactly.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import configs
from hico_jax import checkpoint, metrics
from hico_jax.demo.plan import Plan, Stage

COMPARED = ("loss", "grad_norm", "accuracy")  # what must be equal, to the last bit, after a resume


def train(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """All stages, each from the one before; while one runs, the programs of those after it are compiled."""
    found: dict[str, Any] = {"stages": []}
    parents = [None, *(out / stage.name for stage in plan.stages)]
    commands = [line(stage, out, parent, seed) for stage, parent in zip(plan.stages, parents, strict=False)]
    with compiled_ahead(commands[2:]):  # the second would come too late
        for stage, command in zip(plan.stages, commands, strict=True):
            began = time.monotonic()
            workdir = out / stage.name
            if stage.kill_at is not None and not (out / "killed.jsonl").exists():
                kill(command, workdir, stage.kill_at, out / "killed.jsonl")
            finish(command)
            written = steps_of(workdir)
            found["stages"].append(
                {
                    "name": stage.name,
                    "steps": stage.steps,
                    "seconds": time.monotonic() - began,
                    "compile_s": sum(entry["compile_s"] for entry in written),
                    "loss": [entry["loss"] for entry in written],
                    "accuracy": [entry["accuracy"] for entry in written],
                    "command": shown(command),
                }
            )
            if stage.kill_at is not None:
                found["resume"] = compare(out / "killed.jsonl", workdir) | {"stage": stage.name}
    return found


@contextlib.contextmanager
def compiled_ahead(commands: Sequence[list[str]]) -> Iterator[None]:
    """Compile the steps of these commands one after the other, with what the processors have to spare.

    A stage finds its program in the compilation cache; where it comes too early it compiles for itself.
    """
    polite = ["nice", "-n", "19"] if shutil.which("nice") else []
    running: list[subprocess.Popen[bytes]] = []
    stop = threading.Event()

    def work() -> None:
        for command in commands:
            if stop.is_set():
                return
            line = [*polite, *command, "--compile_only"]
            running[:] = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
            running[0].wait()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        for process in running:
            process.kill()
        worker.join()


def line(stage: Stage, out: pathlib.Path, parent: pathlib.Path | None, seed: int) -> list[str]:
    """The command of a stage."""
    folder = pathlib.Path(configs.__file__).parent
    world = out / "world"
    given = {
        "workdir": out / stage.name,
        "data.annotations": world / stage.annotations,
        "data.tokenizer": world,
        "train.steps": stage.steps,
        "train.seed": seed,
        "data.seed": seed,
    }
    if parent is not None:
        given["init.parent"] = parent
    flags = [f"--config.{key}={value}" for key, value in given.items()] + [f"--config.{t}" for t in stage.tune]
    return [sys.executable, "-m", "hico_jax", "train", f"--config={folder / stage.config}.py:nano", *flags]


def shown(command: list[str]) -> str:
    """The command as a user would type it."""
    return " ".join(["hico", *command[3:]]).replace(str(pathlib.Path(configs.__file__).parent), "configs")


def finish(command: list[str]) -> None:
    """Run a stage to its end.

    Raises:
      RuntimeError: it failed; it has said why.
    """
    code = subprocess.run(command, check=False).returncode
    if code:
        raise RuntimeError(f"training ended with exit code {code}: {shown(command)}")


def kill(command: list[str], workdir: pathlib.Path, step: int, keep: pathlib.Path) -> None:
    """Start a stage, send SIGKILL once `step` is written, and keep what it had written.

    Raises:
      RuntimeError: it ended by itself before.
    """
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            saved = checkpoint.latest_step(str(workdir))
            written = steps_of(workdir)
            if written and written[-1]["step"] >= step and saved is not None and saved < written[-1]["step"]:
                process.send_signal(signal.SIGKILL)
                process.wait()
                part = keep.with_suffix(".tmp")
                part.write_text("".join(json.dumps(entry) + "\n" for entry in steps_of(workdir)))
                part.replace(keep)
                print(
                    f"\033[?25h\npulled the plug after step {written[-1]['step']} (SIGKILL); the same command again:",
                    flush=True,
                )
                return
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.kill()
    raise RuntimeError(f"training ended with exit code {process.returncode} before step {step}: {shown(command)}")


def compare(killed: pathlib.Path, workdir: pathlib.Path) -> dict[str, Any]:
    """Steps that ran twice, before the kill and after the resume, and whether every number of theirs is the same."""
    before = {e["step"]: e for e in map(json.loads, killed.read_text().splitlines())}
    after = {e["step"]: e for e in steps_of(workdir)}
    resumed_at = resumed_step(workdir)
    twice = [s for s in sorted(before) if s > resumed_at]
    same = [all(before[s][k] == after[s][k] for k in COMPARED) for s in twice]
    return {
        "killed_after": max(before),
        "resumed_from": resumed_at,
        "steps_run_twice": len(twice),
        "identical": bool(twice) and all(same),
        "losses": [[s, before[s]["loss"], after[s]["loss"]] for s in twice],
    }


def steps_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The steps a run has written; evaluations have lines of their own in the same file."""
    return [entry for entry in metrics.read(str(workdir)) if "loss" in entry]


def resumed_step(workdir: pathlib.Path) -> int:
    """The step the last process of a run went on from; 0 when it began anew."""
    origin = json.loads((workdir / "env.json").read_text())["origin"]
    return int(origin.rsplit(" ", 1)[1]) if origin.startswith("resumed at step ") else 0
