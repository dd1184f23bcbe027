"""`hico eval`: one benchmark, one model, two scores.

In: the command's options. Out: `answers.*.jsonl`, `summary.json`, `report.html` and `report.md` in a folder.
Next: hico_jax/evals/bench/tasks.py
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import pathlib
from typing import Any

from data_pipeline.frames import Sampling
from data_pipeline.tokenizer import load_tokenizer
from hico_jax import ask, film, weights
from hico_jax.batch import DropSchedule
from hico_jax.evals import card, journal
from hico_jax.evals.bench import annotations, report, runner, scores, tasks
from hico_jax.models.hico import HiCo
from hico_jax.report import progress


def main(args: argparse.Namespace) -> int:
    """Ask what has not been asked, and report once all is.

    Raises:
      ValueError: unknown benchmark, missing files, or a folder with answers made with other settings.
    """
    benchmark = named(args.name)
    sources = tasks.Sources(
        pathlib.Path(args.annotations),
        pathlib.Path(args.videos or args.annotations),
        None if args.subtitles is None else pathlib.Path(args.subtitles),
    )
    items = tasks.read(benchmark, sources, args.limit)
    check_videos(items)
    loaded, tokenizer_folder = ask.load_model(args.model)
    if args.drop is not None:
        loaded = ask.with_drop(loaded, DropSchedule(*args.drop))
    sampling = ask.whole_clips(sampling_of(args.max_frames or benchmark.max_frames), loaded)
    penalty = args.repetition_penalty if args.repetition_penalty is not None else shipped_penalty(args.model)
    settings = settings_of(benchmark, sources, loaded, args.model, sampling, penalty, len(items))
    out = pathlib.Path(args.out or f"runs/eval/{benchmark.name}")
    journal.claim(out, settings, fresh=args.fresh)
    viewer = film.Viewer(loaded, load_tokenizer(tokenizer_folder), sampling=sampling)
    answerer = runner.ModelAnswerer(viewer, repetition_penalty=penalty)
    with progress.bar("questions") as tick:
        runner.run(benchmark, items, answerer, out, shard=args.shard, tick=tick)
    lines = runner.finished(out, items)
    if lines is None:
        missing = len(items) - len(journal.read(out))
        print(f"{out}: this share is done; {missing} questions are left to the other shares")
        return 0
    tell(benchmark, lines, settings, out)
    return 0


def named(name: str) -> tasks.Benchmark:
    """A benchmark by name.

    Raises:
      ValueError: unknown; the nearest is named.
    """
    if name not in tasks.BENCHMARKS:
        near = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), tasks.BENCHMARKS, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(tasks.BENCHMARKS)}"
        raise ValueError(f"there is no benchmark {name!r}; {hint}")
    return tasks.BENCHMARKS[name]


def sampling_of(max_frames: int) -> Sampling:
    """The released model's sampling. A limit below its least number of frames holds here; there it does not."""
    return dataclasses.replace(film.INFERENCE, max_frames=max_frames, min_frames=min(64, max_frames))


def shipped_penalty(folder: str | os.PathLike[str]) -> float:
    """The repetition penalty of a model's `generation_config.json`, which applies in the reference; 1 without one."""
    path = weights.find(folder) / "generation_config.json"
    try:
        return float(json.loads(path.read_text()).get("repetition_penalty", 1.0)) if path.is_file() else 1.0
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not readable ({error})") from error


def check_videos(items: list[tasks.Item]) -> None:
    """Stop before the first question when no video at all is there.

    Raises:
      ValueError: the first one is named.
    """
    asked = [item for item in items if not item.fault]
    if not any(os.path.exists(item.video) for item in asked):
        raise ValueError(f"none of the videos is there; {asked[0].video} was looked for first (see --videos)")


def settings_of(
    benchmark: tasks.Benchmark,
    sources: tasks.Sources,
    loaded: HiCo,
    folder: str,
    sampling: Sampling,
    penalty: float,
    number: int,
) -> dict[str, Any]:
    """The protocol card; answers with another one are not mixed in."""
    files = annotations.locate(sources.annotations, benchmark.files)
    found = {
        "benchmark": benchmark.name, "questions": number, **card.model(loaded, folder), **card.sampling(sampling),
        "annotations": card.digest(files), "max_new_tokens": benchmark.max_new_tokens, "decoding": "greedy",
        "repetition_penalty": penalty, "prompt": "as the reference's harness, byte for byte", "seed": 0,
    }  # fmt: skip
    return json.loads(json.dumps(found))  # as it will be read back


def tell(benchmark: tasks.Benchmark, lines: list[dict[str, Any]], settings: dict[str, Any], out: pathlib.Path) -> None:
    """Write summary and reports, and print the totals."""
    summary = scores.summarize(benchmark, lines)
    environment = card.environment() | {"command": card.command()}
    whole = {"card": settings, "environment": environment, **summary}
    part = out / "summary.tmp"
    part.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    part.replace(out / "summary.json")
    path = report.write(benchmark, summary, lines, settings, environment, out)
    print(f"{benchmark.title}: {len(lines)} questions")
    for name, _, reference, strict in report.rows(summary):
        print(f"  {name:26} reference {reference:24} strict {strict}")
    print(f"  {report.counts_text(summary)}\n{path}")
