"""`hico niah`: needles in a haystack of frames, on your film and pictures or on the made-up world.

In: the command's options. Out: `trials.0.jsonl`, `summary.json`, heat-maps (PNG), `report.html` and `report.md`.
Next: hico_jax/evals/niah/needles.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipeline.image import resize
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.world import films
from hico_jax import ask
from hico_jax.batch import DropSchedule
from hico_jax.evals import card, journal, paired
from hico_jax.evals.bench import report as bench
from hico_jax.evals.bench.report import SHOWN, percent
from hico_jax.evals.niah import grid as trials
from hico_jax.evals.niah import haystack, needles, probe
from hico_jax.models.hico import HiCo
from hico_jax.parallel import sharding
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.report import page, progress, raster

CONTROLS = (
    "Controls: *no needle* asks about the film alone, *blank needle* puts a grey picture in the needle's place, "
    "*shuffled* mixes the frames of film and needle, *dropped* drops every visual token after the second layer, "
    "*blind* shows no film. They meet each needle at one depth, which goes round with the needles."
)
WAYS = (
    "*Followed*: the share of hints followed before the first one missed. *Whole way*: no hint missed. "
    "*Last card*: its colour and shape are right. *Letter*: the option given after that is the right one."
)
WORLD_SEED = 70_000  # of cards; films of the demo's tests have other seeds


def main(args: argparse.Namespace) -> int:
    """Try what has not been tried, and report.

    Raises:
      ValueError: missing files, a film that is too short, or a folder with trials made with other settings.
    """
    model, tokenizer_folder = ask.load_model(args.model)
    if args.drop is not None:
        model = ask.with_drop(model, DropSchedule(*args.drop))
    if args.devices == 1:
        return _main(args, model, tokenizer_folder)
    if args.devices > jax.device_count():
        raise ValueError(f"--devices is {args.devices} but this machine has {jax.device_count()}")
    mesh = make_mesh(MeshConfig(fsdp=1, sequence=args.devices), jax.devices()[: args.devices])
    with jax.set_mesh(mesh):
        return _main(args, jax.device_put(model, sharding.shardings(model, mesh)), tokenizer_folder)


def _main(args: argparse.Namespace, model: HiCo, tokenizer_folder: pathlib.Path) -> int:
    geometry = model.config.geometry()
    frames = tuple(sorted({f // geometry.frames_per_clip * geometry.frames_per_clip for f in args.frames}))
    if not frames[0]:
        raise ValueError(f"--frames {min(args.frames)} is less than one clip of {geometry.frames_per_clip} frames")
    chains = args.hops > 1
    hidden = hide(args, geometry.image_px)
    insertions = haystack.INSERTIONS if args.insertion == "both" else (args.insertion,)
    grid = trials.Grid(frames, tuple(args.depths), insertions, chains, controls_of(args.controls), args.seed)
    prompt = args.prompt or ("paper" if args.needles else "chat")
    out = pathlib.Path(args.out)
    settings = settings_of(args, model, grid, hidden, prompt)
    journal.claim(out, settings, fresh=args.fresh, name="trials")
    path = pathlib.Path(args.haystack) if args.haystack else world_haystack(out, frames[-1], args.seed)
    chosen = haystack.indices(path, frames[-1], repeat=args.repeat)
    print(f"encoding {frames[-1]} frames of {path} once ...", flush=True)
    hay = haystack.encode(model, path, chosen, grid.kept(hidden, geometry.frames_per_clip))
    asker = probe.Probe(model, load_tokenizer(tokenizer_folder), prompt, think=args.think)
    with progress.bar("questions") as tick:
        lines = trials.run(asker, hay, hidden, grid, out, tick=tick)
    told = settings | {"distinct_frames": hay.distinct, "devices": args.devices}
    names = [needle.id for needle in hidden]
    tell(lines, grid, told, out, examples(lines, hidden, path), trials.differences(lines, grid, names))
    return 0


def controls_of(text: str) -> tuple[str, ...]:
    """Controls by the first word of their names; "all" is all. The film without a needle is always asked about.

    Raises:
      ValueError: an unknown name.
    """
    known = {name.split()[0]: name for name in trials.CONTROLS}
    names = list(known) if text == "all" else ["no", *text.split(",")] if text else ["no"]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no control {name!r}; known are {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def hide(args: argparse.Namespace, px: int) -> list[needles.Needle]:
    """The needles that the options name, asked to think where they say so.

    Raises:
      ValueError: thinking about one card.
    """
    found = _hide(args, px)
    if not args.think:
        return found
    if args.hops == 1:
        raise ValueError("--think is for chains: give --hops 2 or more, or leave it out")
    return [dataclasses.replace(n, asked=tuple(needles.thoughtful(a) for a in n.asked)) for n in found]


def _hide(args: argparse.Namespace, px: int) -> list[needles.Needle]:
    if args.needles:
        path = pathlib.Path(args.needles)
        images = pathlib.Path(args.images) if args.images else path.parent
        return needles.read(path, images, px, args.hops > 1)[: args.count]
    if args.hops > 1:
        return needles.world_chains(args.count, args.hops, px, WORLD_SEED + args.seed, decoys=args.decoys)
    return needles.world(args.count, px, WORLD_SEED + args.seed, letters=args.letters)


def world_haystack(out: pathlib.Path, seconds: int, seed: int) -> pathlib.Path:
    """A film of the made-up world without a card, kept in the folder."""
    path = out / f"haystack_{seconds}s_{seed}.mp4"
    if not path.is_file():
        films.haystack(path, num_seconds=seconds, seed=seed, split="val")
    return path


def settings_of(
    args: argparse.Namespace, model: HiCo, grid: trials.Grid, hidden: Sequence[needles.Needle], prompt: str
) -> dict[str, Any]:
    """The protocol card."""
    found = {
        "test": "multi-hop" if grid.chains else "single-hop", **card.model(model, args.model),
        "haystack": args.haystack or "made-up world", "needles": args.needles or "made-up world",
        "number_of_needles": len(hidden), "frames": grid.frames, "frames_per_second": 1,
        "depths": grid.places, "insertions": grid.insertions, "controls": grid.controls,
        "pictures": [len(n.pictures) for n in hidden],
        "decoys": args.decoys, "think": args.think,
        "frames_per_picture": model.config.geometry().frames_per_clip, "prompt": prompt, "decoding": "greedy",
        "repeated_haystack": args.repeat, "seed": args.seed,
    }  # fmt: skip
    return json.loads(json.dumps(found))


def examples(
    lines: Sequence[dict[str, Any]], hidden: Sequence[needles.Needle], path: pathlib.Path
) -> list[page.AnyBlock]:
    """The film, and some needles with what was asked and what was said at one depth of each length."""
    blocks: list[page.AnyBlock] = [
        {"kind": "image", "src": bench.frames_of(str(path)), "alt": "frames of the film", "caption": "The haystack."}
    ]
    for needle in hidden[:: max(1, len(hidden) // SHOWN)][:SHOWN]:
        mine = {(x["asked"], x["insertion"], x["frames"]): x for x in lines if x["needle"] == needle.id}
        said = [f"{i}, {f:,} frames: {x['answer']!r}" for (_, i, f), x in mine.items()]
        asked = "; ".join(f"{a.question} ({a.answer})" for a in needle.asked)
        shown = np.stack([resize(p, 96, 96) for p in needle.pictures])
        blocks.append({
            "kind": "image", "src": bench.picture(shown, [needle.id, *[""] * (len(shown) - 1)]), "half": True,
            "alt": f"what is hidden: {needle.id}", "caption": f"{asked}\n\n{'; '.join(said)}",
        })  # fmt: skip
    return blocks


def tell(
    lines: Sequence[dict[str, Any]],
    grid: trials.Grid,
    settings: dict[str, Any],
    out: pathlib.Path,
    shown: Sequence[page.AnyBlock] = (),
    compared: Mapping[str, Mapping[str, paired.Difference]] | None = None,
) -> None:
    """Write summary, pictures and reports, and print the totals."""
    environment = card.environment() | {"command": card.command(), "peak memory, MiB": card.peak_memory_mib()}
    totals = trials.totals(lines, grid)
    tables = {f"{i}, {s}": trials.table(lines, grid, i, s) for i in grid.insertions for s in trials.SCORINGS}
    cells = {f"{i}, {s}": trials.scores(lines, grid, i, s) for i in grid.insertions for s in trials.SCORINGS}
    summary: dict[str, Any] = {"card": settings, "environment": environment, "totals": totals, "tables": tables}
    summary["cells"] = cells
    summary["control"] = trials.control(lines, grid)
    summary["differences"] = compared or {}
    if grid.chains:
        summary["joint"] = trials.joint(lines, grid)
        summary["ways"] = trials.ways(lines, grid)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    rows, columns = [_depth(d) for d in grid.places], [f"{f:,}" for f in grid.frames]
    names = {"x_label": "frames", "y_label": "" if grid.chains else "depth"}
    for title, values in tables.items():
        file = out / f"heatmap_{title.replace(', ', '_')}.png"
        raster.heatmap_png(file, values, title=f"{settings['test']}, {title}", rows=rows, columns=columns, **names)
    blocks: list[page.AnyBlock] = [
        {"kind": "heatmap", "title": title, "values": values, "rows": rows, "columns": columns, "half": True, **names}
        for title, values in tables.items()
    ]  # type: ignore[typeddict-item]
    sections: list[page.Section] = [
        {
            "title": "Heat-maps", "blocks": blocks,
            "text": "At *pixel* level the picture stands among the frames before the tower sees them; at *feature* "
            "level its tokens are put between those of two frames, as in the paper. *Forced*: the right answer's "
            "tokens are the likeliest (the paper's score); *generated*: the model says it.",
        },
        {
            "title": "Totals", "text": CONTROLS,
            "blocks": [_totals(totals), _control(summary["control"]), *_differences(compared or {}, grid)],
        },
    ]  # fmt: skip
    if grid.chains:
        sections.append({"title": "Captions, questions, both", "blocks": [_joint(summary["joint"])]})
        if summary["ways"]:
            sections.append({"title": "The way", "text": WAYS, "blocks": [_ways(summary["ways"])]})
    sections.append({"title": "Questions and frames", "blocks": shown})
    sections.append({"title": "Answers", "blocks": [{
        "kind": "table", "columns": ["trial", "expected", "said", "forced", "log-probability"],
        "rows": [
            [x["id"], x["expected"], x["answer"], x["forced"], x["log_prob"]]
            for x in lines[:: max(1, len(lines) // 40)]
        ],
    }]})  # fmt: skip
    sections.append({"title": "Protocol", "blocks": [
        {"kind": "keyvalues", "items": [[k, str(v)] for k, v in part.items()], "half": True}
        for part in (settings, environment)
    ]})  # fmt: skip
    report: page.Report = {
        "title": f"Needle in a haystack, {settings['test']}: {settings['model']}",
        "lead": f"{len(lines)} questions; {settings['haystack']} as the haystack, encoded once.",
        "facts": [{"value": percent(t["forced"]), "label": f"{i}, teacher-forced"} for i, t in totals.items()],
        "sections": sections,
        "footer": f"`{environment['command']}`",
    }
    path = page.write(report, out / "report.html")
    (out / "report.md").write_text(markdown(cells, totals, rows, columns, settings, compared or {}), encoding="utf-8")
    for insertion, scores in totals.items():
        said = ", ".join(f"{s} {percent(v)}" for s, v in scores.items())
        print(f"  {insertion:9} {said}, {scores['forced']['number']} questions")
    for insertion, found in summary.get("ways", {}).items():
        for row in found:
            said = ", ".join(f"{name} {percent(row[name])}" for name in ("followed", "whole", "named", "letter"))
            print(f"  {insertion:9} {row['frames']:,} frames: {said}")
    print(path)


def markdown(
    cells: dict[str, Any],
    totals: dict[str, Any],
    rows: list[str],
    columns: list[str],
    settings: dict[str, Any],
    compared: Mapping[str, Mapping[str, paired.Difference]],
) -> str:
    """The tables for a paper, with the protocol below."""
    lines = []
    for title, values in cells.items():
        lines += [f"| {title} | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
        lines += [
            f"| {name} | {' | '.join(percent(cell) for cell in row)} |" for name, row in zip(rows, values, strict=True)
        ]
        insertion, scoring = title.split(", ")
        control = percent(totals[trials.CONTROL][scoring])
        lines += ["", f"All: {percent(totals[insertion][scoring])}; without a needle: {control}.", ""]
    if compared:
        lines += ["| control | share, forced | needle − control, points, forced | generated |", "|---|--:|--:|--:|"]
        lines += [
            f"| {name} | {percent(totals[name]['forced'])} | " + " | ".join(map(paired.starred, by.values())) + " |"
            for name, by in compared.items()
        ]
        lines += ["", paired.NOTE, ""]
    return "\n".join(lines + [f"- {k}: {v}" for k, v in settings.items()]) + "\n"


def _depth(depth: float | None) -> str:
    return "chain" if depth is None else f"{100 * depth:.0f} %"


def _totals(totals: dict[str, Any]) -> page.Table:
    rows = [[i, str(t["forced"]["number"]), percent(t["forced"]), percent(t["generated"])] for i, t in totals.items()]
    return {"kind": "table", "columns": ["insertion", "questions", "teacher-forced", "generated"], "rows": rows}


def _control(control: list[dict[str, Any]]) -> page.Table:
    names = [name for name in control[0] if name != "frames"]
    rows = [[f"{row['frames']:,}", *(percent(row[n]) for n in names)] for row in control]
    return {"kind": "table", "columns": ["frames", *names], "rows": rows, "caption": "teacher-forced, by length"}


def _differences(compared: Mapping[str, Mapping[str, paired.Difference]], grid: trials.Grid) -> list[page.Table]:
    rows = [[name, *map(paired.starred, by.values())] for name, by in compared.items()]
    columns = ["control", *(f"needle in the {grid.level}s − control, {s}" for s in trials.SCORINGS)]
    return [{"kind": "table", "columns": columns, "rows": rows, "caption": paired.NOTE}] if rows else []


def _ways(ways: dict[str, Any]) -> page.Table:
    columns = ["followed", "whole", "named", "letter"]
    rows = [
        [f"{insertion}, {row['frames']:,} frames", *(percent(row[c]) for c in columns)]
        for insertion, found in ways.items() for row in found
    ]  # fmt: skip
    return {"kind": "table", "columns": ["", "followed", "whole way", "last card", "letter"], "rows": rows}


def _joint(joint: dict[str, Any]) -> page.Table:
    rows: list[list[Any]] = []
    for insertion, found in joint.items():
        for row in found:
            for scoring in trials.SCORINGS:
                s = row[scoring]
                rows.append([
                    f"{insertion}, {row['frames']:,} frames, {scoring}", percent(s["caption"]), percent(s["question"]),
                    percent(s["mean"]), percent(s["both"]), s["only_caption"], s["only_question"],
                ])  # fmt: skip
    columns = ["", "caption", "question", "mean", "both", "only caption", "only question"]
    return {"kind": "table", "columns": columns, "rows": rows}
