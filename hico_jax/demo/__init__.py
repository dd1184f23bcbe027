"""`hico demo`: the shipped model answers about a film at once; with `--train` one learns from nothing.

`--train` (and `--quick`, which trains on less) needs no weights and no accelerator. Everything is computed in the run:
the videos are made, the registry's toy `nano` goes through the four stages from nothing (killed once on the way), is
asked about films it never saw, and `report.html` shows what was seen. The same command again goes on where the last
one stopped.

In: a folder and a size. Out: `report.html`, the model, and a JSON file behind every number.
Next: hico_jax/demo/plan.py
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from hico_jax import weights
from hico_jax.demo import plan

MARK = "demo.json"  # what the folder holds; also what makes it safe to delete


def main(args: argparse.Namespace) -> int:
    """Run the demo, or what is left of it. Without weights to show, the demo is the training.

    Raises:
      ValueError: the folder holds something else, or another demo.
    """
    if not (args.train or args.quick):
        if weights.shipped("nano"):
            return show(args)
        print("hico demo: this copy of the source lacks the weights of nano, so a model is trained instead", flush=True)
    out = pathlib.Path(args.out or "runs/demo")
    chosen = plan.QUICK if args.quick else plan.FULL
    settings = {"size": chosen.name, "seed": args.seed}
    prepare(out, settings, fresh=args.fresh)
    _environment(out)
    from hico_jax.demo import measure, story, training  # they import JAX, which reads the environment

    print(f"hico demo: {chosen.promise}; everything goes to {out}", flush=True)
    run = Run(out, args.seed, total=8)
    run.step("world", f"making {chosen.preset} videos (H.264)", lambda: measure.make_world(out, chosen, args.seed))
    run.step(
        "train", "training nano from nothing, four stages, killed once", lambda: training.train(out, chosen, args.seed)
    )
    run.step(
        "ask",
        f"asking about a film of {chosen.film_s} s it never saw",
        lambda: measure.ask_film(out, chosen, args.seed),
    )
    run.step(
        "needle",
        f"a card at every depth of films up to {chosen.lengths[-1]} s",
        lambda: measure.needle_grid(out, chosen, args.seed),
    )
    run.step("compression", "what compression buys and costs", lambda: measure.compression(out, chosen, args.seed))
    run.step("controls", "negative controls", lambda: measure.controls(out, chosen, args.seed))
    run.step(
        "export",
        "export to safetensors, reload, same answers",
        lambda: measure.export_and_reload(out, chosen, args.seed),
    )
    run.step("report", "writing the report", lambda: story.write(out, chosen, run.results, run.seconds), keep=False)
    story.tell(out, run.results, sum(run.seconds.values()))
    return 0


def show(args: argparse.Namespace) -> int:
    """An answer from the shipped model; needs a folder of its own.

    A film of another seed takes the place of the last one; what was compiled, and whatever else lies there, stays.

    Raises:
      ValueError: the folder holds something else.
    """
    began = time.monotonic()
    out = pathlib.Path(args.out or "runs/nano")
    settings = {"size": "shipped", "seed": args.seed}
    if held(out).get("size") == "shipped" and not args.fresh:
        (out / MARK).write_text(json.dumps(settings) + "\n")
    else:
        prepare(out, settings, fresh=held(out).get("size") == "shipped")  # --fresh never deletes a training demo here
    _environment(out)
    from hico_jax.demo import shipped  # it imports JAX, which reads the environment

    shipped.first_answer(out, args.seed, began)
    return 0


def _environment(out: pathlib.Path) -> None:
    """One folder of compiled programs serves this process, the training processes, and the next run."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").resolve()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")  # compiles a quarter faster, runs the same
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA greets every process


def prepare(out: pathlib.Path, settings: dict[str, Any], *, fresh: bool) -> None:
    """Make the folder, or check that it is this demo's own.

    Raises:
      ValueError: it holds other files, or a demo with other settings.
    """
    mark = out / MARK
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not mark.is_file():
        raise ValueError(f"{out} holds other files; choose another folder with --out")
    if mark.is_file() and fresh:
        shutil.rmtree(out)
    if mark.is_file() and held(out) != settings:
        raise ValueError(
            f"{out} holds a demo with other settings ({mark.read_text().strip()}); add --fresh to start over, or "
            "choose another folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(settings) + "\n")


def held(out: pathlib.Path) -> dict[str, Any]:
    """The settings of the demo that a folder holds; empty without one, or where they cannot be read."""
    try:
        found = json.loads((out / MARK).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Run:
    """The steps of one demo: each result is kept as JSON, and a step that has one is not run again."""

    def __init__(self, out: pathlib.Path, seed: int, total: int) -> None:
        self.out, self.seed, self.total = out, seed, total
        self.results: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def step(self, name: str, title: str, work: Callable[[], Any], *, keep: bool = True) -> None:
        """Run a step unless its result is there."""
        path = self.out / "results" / f"{name}.json"
        number = len(self.seconds) + 1
        if keep and path.is_file():
            saved = json.loads(path.read_text())
            self.results[name], self.seconds[name] = saved["result"], saved["seconds"]
            print(f"{number}/{self.total} {title}: done before", flush=True)
            return
        print(f"{number}/{self.total} {title} ...", flush=True)
        began = time.monotonic()
        result = work()
        seconds = time.monotonic() - began
        self.results[name], self.seconds[name] = result, seconds
        if keep:
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".tmp")
            part.write_text(json.dumps({"seconds": seconds, "result": result}, indent=1) + "\n")
            part.replace(path)
        print(f"{number}/{self.total} {title}: {seconds:.0f} s", flush=True)
