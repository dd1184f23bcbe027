"""Scores to a page, a Markdown table for papers, and lines on the terminal.

In: a summary (`scores.py`), the answers and the card. Out: `report.html`, `report.md`.
"""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline import video
from data_pipeline.world.sheet import contact_sheet
from hico_jax.evals.bench.matchers import QUIRKS
from hico_jax.evals.bench.scores import RULES, Score
from hico_jax.evals.bench.tasks import Benchmark
from hico_jax.report import page

SHOWN, FRAMES = 6, 6  # questions with pictures, pictures of each


def percent(score: Score | None) -> str:
    """A share with its interval.

    Example:
      >>> percent({"share": 0.5, "low": 0.25, "high": 0.75, "number": 8})
      '50.0 % (25.0–75.0)'
    """
    if score is None or score["share"] is None:
        return "–"
    return f"{100 * score['share']:.1f} % ({100 * score['low']:.1f}–{100 * score['high']:.1f})"


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """[name, number, reference, strict] of the totals: the main score, then macro or recalls."""
    names = ["score", *(k for k in summary["reference"] if k not in ("score", "name"))]
    shown = {"score": summary["reference"]["name"], "macro": "macro average over tasks"}
    if summary["reference"]["name"] == "accuracy":
        shown["score"] = "accuracy (micro)"
    return [
        [shown.get(n, n), str(summary["strict"][n]["number"]), *(percent(summary[r][n]) for r in RULES)] for n in names
    ]


def markdown(benchmark: Benchmark, summary: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """The table that goes into a paper, with the protocol below it."""
    lines = [
        f"| {benchmark.title} | questions | reference matcher | strict matcher |", "| --- | --: | --: | --: |",
        *(f"| {' | '.join(row)} |" for row in rows(summary)),
    ]  # fmt: skip
    for key, values in summary["by"].items():
        if len(values) > 1:
            lines += [
                f"| {key}: {value} | {found['strict']['number']} | {' | '.join(percent(found[r]) for r in RULES)} |"
                for value, found in values.items()
            ]
    lines += ["", "95 % intervals in brackets. " + counts_text(summary), ""]
    lines += [f"- {name}: {value}" for name, value in card.items()]
    return "\n".join(lines) + "\n"


def counts_text(summary: Mapping[str, Any]) -> str:
    """How the questions went, in a sentence."""
    return "Questions: " + ", ".join(f"{n} {name}" for name, n in summary["counts"].items() if n) + "."


def write(
    benchmark: Benchmark,
    summary: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    card: Mapping[str, Any],
    environment: Mapping[str, Any],
    folder: pathlib.Path,
) -> pathlib.Path:
    """`report.html` and `report.md` in the folder."""
    (folder / "report.md").write_text(markdown(benchmark, summary, card), encoding="utf-8")
    return page.write(build(benchmark, summary, lines, card, environment), folder / "report.html")


def build(
    benchmark: Benchmark,
    summary: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    card: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> page.Report:
    """The page."""
    columns = ["", "questions", "reference matcher", "strict matcher"]
    main: list[page.AnyBlock] = [{"kind": "table", "columns": columns, "rows": rows(summary), "source": "summary.json"}]
    broken: list[page.AnyBlock] = [
        {
            "kind": "table", "caption": f"by {key}", "columns": columns,
            "rows": [[v, str(f["strict"]["number"]), *(percent(f[r]) for r in RULES)] for v, f in values.items()],
        }
        for key, values in summary["by"].items() if len(values) > 1
    ]  # fmt: skip
    strange = [line for line in lines if line["status"] != "answered" or line["note"]]
    sections: list[page.Section] = [
        {
            "title": "Score", "blocks": main,
            "text": f"{counts_text(summary)}\n\nReference quirks kept in the first column: {QUIRKS[benchmark.quirks]}. "
            "The strict column takes the option an answer names, and nothing where it names none or two; every "
            "question counts. Brackets hold 95 % intervals.",
        },
        *([{"title": "Breakdown", "blocks": broken}] if broken else []),  # type: ignore[list-item]
        {"title": "Questions and frames", "blocks": _examples(lines)},
    ]  # fmt: skip
    if strange:
        blocks: list[page.AnyBlock] = [{
            "kind": "table", "columns": ["question", "what happened", "note"],
            "rows": [[line["id"], line["status"], line["note"] or "the answer was empty"] for line in strange[:200]],
        }]  # fmt: skip
        text = f"{len(strange)} questions. None was left out: those without an answer count as wrong."
        sections.append({"title": "Out of the ordinary", "tone": "caution", "text": text, "blocks": blocks})
    sections.append({
        "title": "Protocol",
        "blocks": [
            {"kind": "keyvalues", "items": [[k, str(v)] for k, v in card.items()], "half": True, "caption": "card"},
            {"kind": "keyvalues", "items": [[k, str(v)] for k, v in environment.items()], "half": True,
             "caption": "environment"},
        ],
    })  # fmt: skip
    main_score = summary["strict"]["score"]
    return {
        "title": f"{benchmark.title}: {card['model']}",
        "lead": f"{summary['number']} questions, scored twice: as the reference's harness scores them, and strictly.",
        "facts": [
            {"value": percent(summary["reference"]["score"]), "label": f"{summary['reference']['name']}, reference"},
            {"value": percent(main_score), "label": f"{summary['strict']['name']}, strict"},
        ],
        "sections": sections,
        "footer": f"`{environment.get('command', '')}`",
    }


def _examples(lines: Sequence[Mapping[str, Any]]) -> list[page.AnyBlock]:
    """Some questions with frames of their videos: spread over the benchmark, right and wrong alike."""
    answered = [line for line in lines if line["status"] == "answered"]
    step = max(1, len(answered) // SHOWN)
    blocks: list[page.AnyBlock] = []
    for line in answered[::step][:SHOWN]:
        verdict = ", ".join(f"{r}: {line[r]['parsed']} ({line[r]['score']:.2g})" for r in RULES)
        caption = f"{line['prompt'][-700:]}\n\nAnswer: {line['answer']!r}; expected {line['expected']}; {verdict}"
        picture = frames_of(line["video"])
        if picture:
            alt = f"frames of the video of {line['id']}"
            blocks.append({"kind": "image", "src": picture, "alt": alt, "caption": caption})
        else:
            blocks.append({"kind": "code", "text": caption})
    return blocks or [{"kind": "text", "text": "No question was answered."}]


def frames_of(path: str) -> str:
    """A few frames of a video as a data URI; empty where it cannot be read."""
    try:
        info = video.open_video(path)
        indices = np.unique(np.linspace(0, info.num_frames - 1, FRAMES).astype(int))
        frames = np.concatenate(list(video.iter_frames(path, indices, (96, 96))))
    except video.VideoError:
        return ""
    return picture(frames, [f"{i / info.fps:.1f} s" for i in indices])


def picture(frames: np.ndarray, labels: Sequence[str]) -> str:
    """Frames side by side as a data URI."""
    buffer = io.BytesIO()
    contact_sheet(frames, labels, columns=FRAMES).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
