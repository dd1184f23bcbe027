"""The page of a demo: what was seen, in the order a reader asks about it. Every number comes from the results.

In: results of the steps. Out: `report.html`, and a few closing lines on the terminal.
"""

from __future__ import annotations

import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hico_jax import __version__
from hico_jax.demo import measure, tables
from hico_jax.demo.plan import Plan
from hico_jax.report import page

Results = Mapping[str, Any]


def write(out: pathlib.Path, plan: Plan, results: Results, seconds: Mapping[str, float]) -> dict[str, str]:
    """Write `report.html` and return where it is."""
    sections = [
        asked(results["ask"]),
        curves(results["train"], out),
        heatmap(results["needle"]),
        compression(results["compression"]),
        controls(results["controls"]),
        resume(results["train"]),
        exported(results["export"]),
        times(seconds, results),
        limits(plan),
    ]
    grid, film = results["needle"]["total"], results["ask"]
    report: page.Report = {
        "title": "A small model watches long films",
        "lead": (
            "This page was made by `hico demo --train` on this machine, from nothing: videos were drawn and encoded as "
            "H.264, a model of about a million parameters went through the four training stages of VideoChat-Flash, "
            "and was then asked about films it never saw. Every number below was computed in this run."
        ),
        "facts": [
            {"value": tables.percent(grid["share"]), "label": f"of {grid['asked']} needle questions right"},
            {"value": f"{film['frames']:,}", "label": "frames in the longest question's film"},
            {
                "value": f"{film['patches'] // film['trials'][0]['visual_tokens']}x",
                "label": "fewer tokens than patches",
            },
            {"value": clock(sum(seconds.values())), "label": "from nothing to this page"},
        ],
        "sections": sections,
        "footer": (
            f"hico_jax {__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
            f"{platform.machine()}. "
            "The JSON file named under a figure holds its numbers."
        ),
    }
    page.write(report, out / "report.html")
    return {"report": str(out / "report.html")}


def tell(out: pathlib.Path, results: Results, seconds: float) -> None:
    """The last lines: what came out, and what to do next."""
    grid, question = results["needle"]["total"], results["ask"]["trials"][0]
    print(
        f"\nneedle: {grid['right']}/{grid['asked']} right ({tables.percent(grid['share'])}; 95 % interval "
        f"{tables.percent(grid['low'])} to "
        f"{tables.percent(grid['high'])}); {clock(seconds)} in all\n"
        f"open {out / 'report.html'}\n"
        f'or ask the film yourself:  hico ask {out / "film.mp4"} "{question["question"]}" --model {out / "model"} '
        f"--max-frames {results['ask']['frames']}",
        flush=True,
    )


def asked(found: Results) -> page.Section:
    """The long film, its questions, and the tokens kept along it."""
    kept, start = found["kept"], found["card_s"][0]
    rows = [[t["question"], tone(t["answer"], t["correct"]), t["expected"]] for t in found["trials"]]
    even = kept["kept"] / kept["of"]
    share = np.array(kept["share"])
    card = [i for i in range(len(share)) if i * 4 < found["card_s"][1] and (i + 1) * 4 > start]
    strip: page.Strip = {
        "kind": "strip",
        "title": f"Tokens kept along the film ({kept['schedule']})",
        "seconds": found["film_s"],
        "rows": [{"label": "kept", "values": kept["share"]}],
        "marks": [(start, "card")],
        "source": "results/ask.json",
        "caption": (
            f"Asked: {kept['question']} Of {kept['of']:,} visual tokens {kept['kept']:,} are left after the "
            f"drop "
            f"({tables.percent(even)}); of the card's clips {tables.percent(float(share[card].mean()))} are kept."
        ),
    }
    return {
        "title": f"A film of {found['frames']:,} frames",
        "text": (
            f"One card, a {found['card']}, shows for {found['card_s'][1] - start:g} of {found['film_s']:,.0f} "
            f"seconds. No frame of it was seen "
            f"in training. Watching took {found['read_s'] + found['encode_s']:.1f} s."
        ),
        "blocks": [
            {
                "kind": "image",
                "src": "film.png",
                "alt": "Frames along the film; the card is framed in red.",
                "caption": "Frames along the film; the card is framed in red.",
            },
            {
                "kind": "table",
                "columns": ["question", "answer", "right answer"],
                "rows": rows,
                "source": "results/ask.json",
            },
            strip,
        ],
    }


def curves(found: Results, out: pathlib.Path) -> page.Section:
    """The loss of every stage in one line, and the first batch."""
    series, marks, first = [], [], 0
    for number, stage in enumerate(found["stages"]):
        steps = list(range(first + 1, first + len(stage["loss"]) + 1))
        series.append({"label": stage["name"], "x": steps, "y": smooth(stage["loss"]), "colour": number})
        marks.append((first + 1, stage["name"]))
        first += len(stage["loss"])
    rows = [
        [
            s["name"],
            s["steps"],
            round(s["loss"][0], 3),
            round(float(np.mean(s["loss"][-10:])), 3),
            tables.percent(float(np.mean(s["accuracy"][-10:]))),
            f"{s['seconds']:.0f} s",
            f"{s['compile_s']:.0f} s",
        ]
        for s in found["stages"]
    ]
    blocks: list[page.AnyBlock] = [
        {
            "kind": "lines",
            "title": "Training loss, mean of nine steps",
            "series": series,
            "marks": marks,
            "x_label": "step",
            "log_y": True,
            "source": "results/train.json",
        },
        {
            "kind": "table",
            "columns": ["stage", "steps", "first loss", "last loss", "tokens right", "time", "of it compiling"],
            "rows": rows,
        },
    ]
    picture = f"{found['stages'][-2]['name']}/first_batch.png"
    if (out / picture).is_file():
        blocks.append(
            {
                "kind": "image",
                "src": picture,
                "alt": "The first batch with its text.",
                "caption": "The first batch that stage 3 saw, drawn before its first step.",
            }
        )
    return {
        "title": "Four stages",
        "text": (
            "First the projector alone learns to caption, then everything on images and short films, then questions "
            "and answers, "
            "and last the tower at a higher resolution with the language model frozen. Most of training reads films "
            "of four to twelve frames, a part of it up to 256; rotary positions "
            "skip, so that the distances of a long film are not new to it."
        ),
        "blocks": blocks,
    }


def heatmap(found: Results) -> page.Section:
    """The paper's headline figure in miniature."""
    total = found["total"]
    return {
        "title": "A needle in a haystack",
        "text": (
            "Each cell is a set of fresh films, encoded with the card at that depth and read back from mp4. Two "
            "questions each: "
            "which colour, which shape. Guessing scores 12.5 % and 17 %."
        ),
        "blocks": [
            {
                "kind": "heatmap",
                "title": "Answers right",
                "values": found["grid"],
                "rows": [f"{d:.0%}" for d in found["depths"]],
                "columns": [f"{n:,}" for n in found["lengths"]],
                "x_label": "frames of the film",
                "y_label": "depth of the card",
                "low": 0.0,
                "high": 1.0,
                "percent": True,
                "source": "results/needle.json",
                "caption": f"{total['right']} of {total['asked']} right: {tables.percent(total['share'])} "
                f"(95 % interval {tables.percent(total['low'])} to {tables.percent(total['high'])}).",
            },
            tables.kinds_table(found),
            tables.stages_table(found["stages"]),
        ],
    }


def compression(found: Results) -> page.Section:
    """Both halves, on and off."""
    video_s, clip_s = found["seconds"]
    return {
        "title": "What compression buys, and what it costs",
        "text": (
            "Clip-level merging folds every four frames into 16 tokens. Video-level dropping lets visual tokens go "
            "inside the language "
            "model. The last row drops every visual token after two layers: what it still answers, those two layers "
            "had already read."
        ),
        "blocks": [
            {
                "kind": "table",
                "columns": ["merging", "visual tokens", "seconds a question", "right", "95 % interval"],
                "rows": [tables.row(r) for r in found["clip_level"]],
                "caption": f"Films of {clip_s} s. The model was trained with merging on; off is the same weights.",
                "source": "results/compression.json",
            },
            {
                "kind": "table",
                "columns": [
                    "dropping",
                    "visual tokens",
                    "seconds a question",
                    "right",
                    "95 % interval",
                    *tables.kinds(found["video_level"]),
                ],
                "rows": [
                    tables.row(r)
                    + [tables.percent(r["by_kind"][k]["share"]) for k in tables.kinds(found["video_level"])]
                    for r in found["video_level"]
                ],
                "caption": (
                    f"Films of {video_s} s. Nothing was retrained for dropping. Seconds are of the whole answer, "
                    f"median."
                ),
                "source": "results/compression.json",
            },
        ],
    }


def controls(found: Results) -> page.Section:
    """The same questions where no answer can be known."""
    named = {
        "film": "the film",
        "blank": "card left out",
        "no film": "no film at all",
        "order": "two cards, which came first",
        "order shuffled": "the same, frames shuffled",
    }
    rows = []
    for name, title in named.items():
        for kind, r in found[name]["by_kind"].items():
            rows.append(
                [
                    title,
                    kind.replace("_", " "),
                    tables.percent(r["share"]),
                    f"{tables.percent(r['low'])} to {tables.percent(r['high'])}",
                    tables.percent(measure.chance(kind)),
                    r["asked"],
                ]
            )
    return {
        "title": "Controls",
        "text": (
            "If answers came from anywhere but the pixels and their order, these would stay high. They should fall to "
            "chance."
        ),
        "blocks": [
            {
                "kind": "table",
                "columns": ["shown", "question", "right", "95 % interval", "chance", "asked"],
                "rows": rows,
                "caption": f"Films of {found['seconds']} s.",
                "source": "results/controls.json",
            },
        ],
    }


def resume(found: Results) -> page.Section:
    """The kill and what came after."""
    r = found["resume"]
    rows = [[step, repr(before), repr(after)] for step, before, after in r["losses"][:5]]
    same = "identical to the last bit" if r["identical"] else "NOT identical"
    return {
        "title": "The plug was pulled",
        "text": (
            f"{r['stage']} was killed with SIGKILL after step {r['killed_after']} and started again with the same "
            f"command. It went on from "
            f"the checkpoint of step {r['resumed_from']}; {r['steps_run_twice']} steps ran twice and their losses, "
            f"gradient norms and accuracies are {same}."
        ),
        "blocks": [
            {
                "kind": "table",
                "columns": ["step", "loss before the kill", "loss after the resume"],
                "rows": rows,
                "source": "killed.jsonl",
            }
        ],
    }


def exported(found: Results) -> page.Section:
    """Out of JAX and back."""
    return {
        "title": "Exported and read back",
        "text": (
            f"The weights were written as safetensors under the PyTorch reference's own names and read back: "
            f"{'every weight is equal' if found['weights_equal'] else 'weights DIFFER'}, and {found['same']} of "
            f"{found['asked']} answers are the same."
        ),
        "blocks": [
            {
                "kind": "keyvalues",
                "items": [
                    ["folder", found["folder"]],
                    ["files", ", ".join(found["files"])],
                    ["size", f"{found['bytes'] / 1e6:.1f} MB"],
                ],
                "source": "results/export.json",
            }
        ],
    }


def times(seconds: Mapping[str, float], results: Results) -> page.Section:
    """Where the minutes went."""
    rows = [[name, f"{s:.0f} s"] for name, s in seconds.items()]
    question = results["ask"]
    rows.append(["of it, the first question to the long film, compiling included", f"{question['first_s']:.1f} s"])
    rows.append(["and the same again, film already watched", f"{question['again_s']:.1f} s"])
    return {"title": "Time", "blocks": [{"kind": "table", "columns": ["step", "time"], "rows": rows}]}


def limits(plan: Plan) -> page.Section:
    """What nobody should conclude."""
    return {
        "title": "What this does not show",
        "tone": "caution",
        "text": (
            "The world is a toy: drawn shapes, two kinds of needle question, a vocabulary of a few hundred words. The "
            "model knows nothing else. "
            "Scores here say that the whole path works, from mp4 bytes to an exported model, not how a released model "
            "scores on a public benchmark. "
            f"With {plan.compare_films} films a row, differences of a few points between ways of dropping are noise; "
            f"the intervals say how much."
        ),
    }


def smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """The mean of up to `width` neighbours."""
    return [float(np.mean(values[max(0, i - width // 2) : i + width // 2 + 1])) for i in range(len(values))]


def tone(text: str, good: bool) -> page.Cell:
    """An answer, coloured by whether it is right."""
    return {"text": text or "(nothing)", "tone": "good" if good else "bad"}


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
