"""`hico compress`: the same questions under every compressor, one table.

In: the command's options. Out: answers by method, `compress.json`, `compress.md` and `compress.html` in a folder.
Next: hico_jax/evals/compress/methods.py
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from hico_jax import ask, film, generate
from hico_jax.evals import card, journal, paired
from hico_jax.evals.bench import command as bench
from hico_jax.evals.bench import runner, scores, tasks
from hico_jax.evals.bench.report import SHOWN, frames_of, percent
from hico_jax.evals.compress import methods, world
from hico_jax.models.hico import HiCo
from hico_jax.report import page, progress


def main(args: argparse.Namespace) -> int:
    """Ask what has not been asked, method by method, and print the table.

    Raises:
      ValueError: unknown method or benchmark, missing files, or a folder with other settings.
    """
    out = pathlib.Path(args.out)
    model, tokenizer_folder = ask.load_model(args.model)
    found = chosen(methods.methods(model, args.tokens_per_frame, args.schedule), args.methods)
    compared = pairs_of(args.pairs, found)
    benchmark, items, source = questions(args, out)
    sampling = ask.whole_clips(bench.sampling_of(args.max_frames or benchmark.max_frames), model)
    settings = {
        "benchmark": benchmark.name, "source": source, "questions": len(items), "seed": args.seed,
        **card.model(model, args.model), **card.sampling(sampling), "decoding": "greedy",
        "tokens_compared": args.tokens_per_frame or "the model's own",
        "video_level": args.schedule or methods.schedule_of(model),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    if args.fresh:  # before the claim: a kill must not leave them to new settings
        for stale in out.glob("*/answers.*.jsonl"):
            stale.unlink()
    journal.claim(out, settings, fresh=args.fresh)
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = []
    for method in found:
        print(f"{method.name}: {method.title}", flush=True)
        rows.append(measured(model, method, tokenizer, sampling, benchmark, items, out / method.name))
    tell(rows, items, benchmark, settings, out, differences(compared, found, out))
    return 0


def chosen(found: Sequence[methods.Method], names: str) -> list[methods.Method]:
    """Methods by name; "all" is all.

    Raises:
      ValueError: an unknown name.
    """
    if names == "all":
        return list(found)
    known = {m.name: m for m in found}
    wrong = [n for n in names.split(",") if n not in known]
    if wrong:
        raise ValueError(f"there is no method {wrong[0]!r}; known are {', '.join(known)}")
    return [known[n] for n in names.split(",")]


def pairs_of(text: str | None, found: Sequence[methods.Method]) -> list[tuple[str, str]]:
    """`A:B,C:D` as pairs of names. Without it, every method against the first, and drops against the uniform one.

    Raises:
      ValueError: a name that is not among the methods.
    """
    names = [m.name for m in found]
    if text is None:
        drops = [n for n in ("drop-attention", "drop-paper") if {n, "drop-uniform"} <= set(names)]
        return [(n, names[0]) for n in names[1:]] + [(n, "drop-uniform") for n in drops if names[0] != "drop-uniform"]
    made = []
    for part in text.split(","):
        first, colon, second = part.partition(":")
        if not colon or not {first, second} <= set(names):
            raise ValueError(f"--pairs has {part!r}; write A:B of the methods that are measured, {', '.join(names)}")
        made.append((first, second))
    return made


def differences(
    compared: Sequence[tuple[str, str]], found: Sequence[methods.Method], out: pathlib.Path
) -> list[dict[str, Any]]:
    """What one method scores more than another on the same questions, with 95 % intervals that use the pairing."""
    titles = {m.name: m.title for m in found}
    lines = {name: journal.read(out / name) for name in {n for pair in compared for n in pair}}
    return [
        {"first": a, "second": b, "title": f"{titles[a]} − {titles[b]}", "by": paired.by(lines[a], lines[b])}
        for a, b in compared if lines[a] and lines[b]
    ]  # fmt: skip


def questions(args: argparse.Namespace, out: pathlib.Path) -> tuple[tasks.Benchmark, list[tasks.Item], str]:
    """A benchmark's questions, or the made-up world's."""
    if args.benchmark is None:
        found = world.items(out / "films", args.films, args.seconds, 20_000 + args.seed, args.chains)
        chains = f", {args.chains} with chains of hints" if args.chains else ""
        return world.BENCHMARK, found, f"{args.films} films of each recipe, long ones of {args.seconds} s{chains}"
    if args.annotations is None:
        raise ValueError("--benchmark needs --annotations, the official annotation file or its folder")
    benchmark = bench.named(args.benchmark)
    subtitles = None if args.subtitles is None else pathlib.Path(args.subtitles)
    sources = tasks.Sources(
        pathlib.Path(args.annotations), pathlib.Path(args.videos or args.annotations), subtitles
    )  # fmt: skip
    found = tasks.read(benchmark, sources, args.limit)
    bench.check_videos(found)
    return benchmark, found, args.annotations


def measured(
    model: HiCo,
    method: methods.Method,
    tokenizer: Tokenizer,
    sampling: Any,
    benchmark: tasks.Benchmark,
    items: Sequence[tasks.Item],
    folder: pathlib.Path,
) -> dict[str, Any]:
    """One line of the table: what it scores, and what it takes."""
    row: dict[str, Any] = {"name": method.name, "title": method.title, "control": method.control}
    try:
        made = methods.apply(model, method)
    except ValueError as error:
        return row | {"failed": str(error)}
    viewer = film.Viewer(made, tokenizer, sampling=sampling)
    with progress.bar(method.name) as tick:
        runner.run(benchmark, items, runner.ModelAnswerer(viewer, shown=method.shown), folder, tick=tick)
    lines = runner.finished(folder, items) or []
    summary = scores.summarize(benchmark, lines)
    timed = [line for line in lines if "answer_s" in line]
    first, mean = methods.tokens_by_layer(method, model.config.llm.num_layers)
    longest = max((line["prompt_tokens"] for line in timed), default=0)
    return row | {
        "tokens_per_frame": first, "tokens_by_layer": mean, "score": summary["strict"]["score"],
        "reference": summary["reference"]["score"], "by": summary["by"].get("task", {}), "counts": summary["counts"],
        # A median: the first question of each shape compiles.
        "encode_s_per_frame": _median([x["encode_s"] / x["frames"] for x in timed]),
        "answer_s": _median([x["answer_s"] for x in timed]),
        "long_answer_s": _median([x["answer_s"] for x in timed if x["prompt_tokens"] > 0.9 * longest]),
        "prefill_mib": None if method.shown == "nothing" else prefill_mib(viewer, lines),
    }  # fmt: skip


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def prefill_mib(viewer: film.Viewer, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Memory that the compiler plans for the longest prefill and its cache, weights not counted."""
    timed = [line for line in lines if "prompt_tokens" in line]
    if not timed:
        return None
    line = max(timed, key=lambda x: x["prompt_tokens"])
    seen = viewer.watch(line["video"])
    batch, visual = viewer.prompt([viewer.row(seen, line["prompt"])], [seen])
    stream = jax.eval_shape(generate.spliced, viewer.model, batch, visual)
    compiled = (
        jax.jit(generate.prefill, static_argnames=("schedule", "room"))
        .lower(viewer.model.llm, stream, batch.drop, schedule=viewer.model.config.drop, room=16).compile()
    )  # fmt: skip
    memory = compiled.memory_analysis()
    if memory is None:  # this backend does not tell
        return None
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people; `names` are the kinds of task."""
    columns = ["method", "tokens a frame", "mean over layers", "score", *names, "encode, ms a frame", "answer, s",
               "longest answer, s", "prefill, MiB"]  # fmt: skip
    shown = []
    for row in rows:
        if "failed" in row:
            shown.append([row["title"], row["failed"], *[""] * (len(columns) - 2)])
            continue
        by = [row["by"].get(name, {}).get("strict") for name in names]
        shown.append([
            row["title"], f"{row['tokens_per_frame']:g}", f"{row['tokens_by_layer']:.3g}", percent(row["score"]),
            *(percent(b) for b in by),
            _number(row["encode_s_per_frame"], 1000), _number(row["answer_s"]), _number(row["long_answer_s"]),
            _number(row["prefill_mib"]),
        ])  # fmt: skip
    return columns, shown


def _number(value: float | None, scale: float = 1) -> str:
    return "–" if value is None else f"{scale * value:.3g}"


def paired_table(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Differences for people, in points; a star where the interval excludes zero."""
    columns = ["difference, same questions", "all", "better", "worse", *names]
    shown = []
    for row in found:
        by = row["by"]
        cells = [paired.starred(by[name]) if name in by else "–" for name in ("all", *names)]
        shown.append([row["title"], cells[0], str(by["all"]["better"]), str(by["all"]["worse"]), *cells[1:]])
    return columns, shown


def tell(
    rows: list[dict[str, Any]],
    items: list[tasks.Item],
    benchmark: tasks.Benchmark,
    settings: dict[str, Any],
    out: pathlib.Path,
    compared: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The tables on the terminal, in Markdown and as a page."""
    names = sorted({item.groups["task"] for item in items})
    columns, shown = table(rows, names)
    environment = card.environment() | {"command": card.command()}
    note = "The same weights under every compressor; a model trained with another one may do better with it. "
    if benchmark is world.BENCHMARK:
        note += f"Guessing scores {100 * world.chance(items):.0f} %."
    lines = _markdown(columns, shown)
    pairs, differ = paired_table(compared, names if len(names) > 1 else ())
    if differ:
        lines += ["", *_markdown(pairs, differ)]
    (out / "compress.json").write_text(
        json.dumps({"card": settings, "environment": environment, "rows": rows, "differences": compared}, indent=1)
        + "\n"
    )
    card_lines = [f"- {k}: {v}" for k, v in (settings | environment).items()]
    text = [*lines, "", f"95 % intervals in brackets. {note}{paired.NOTE if differ else ''}", "", *card_lines]
    (out / "compress.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    report: page.Report = {
        "title": f"Compressors on {benchmark.title}: {settings['model']}",
        "lead": f"{settings['questions']} questions, {settings['source']}. {note}",
        "sections": [
            {"title": "Table", "blocks": [
                {"kind": "table", "columns": columns, "rows": shown, "source": "compress.json",
                 "caption": "Score with its 95 % interval, then by kind of task. Prefill: what the compiler plans for "
                 "the longest row, weights not counted. Answers: median seconds."}]},
            *([{"title": "Differences", "text": paired.NOTE, "blocks": [
                {"kind": "table", "columns": pairs, "rows": differ, "source": "compress.json"}]}] if differ else []),
            {"title": "Questions and frames", "blocks": examples(rows, items, out)},
            {"title": "Protocol", "blocks": [
                {"kind": "keyvalues", "items": [[k, str(v)] for k, v in part.items()], "half": True}
                for part in (settings, environment)
            ]},
        ],
    }  # fmt: skip
    print("\n".join(lines))
    print(page.write(report, out / "compress.html"))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def examples(rows: Sequence[Mapping[str, Any]], items: Sequence[tasks.Item], out: pathlib.Path) -> list[page.AnyBlock]:
    """Frames of some questions' videos, with what the model said under every method."""
    said = {row["title"]: {x["id"]: x["answer"] for x in journal.read(out / row["name"])} for row in rows}
    blocks: list[page.AnyBlock] = []
    for item in items[:: max(1, len(items) // SHOWN)][:SHOWN]:
        answers = "; ".join(f"{title}: {found[item.id]!r}" for title, found in said.items() if item.id in found)
        caption = f"{item.prompt[-700:]}\n\nExpected {item.expected}. {answers}"
        if source := frames_of(item.video):
            blocks.append({"kind": "image", "src": source, "alt": f"frames of {item.id}", "caption": caption})
        else:
            blocks.append({"kind": "code", "text": caption})
    return blocks
