"""`hico bench`: real inference by number of frames, with the compression on and off.

Every line is one film read from an mp4 and answered about in a process of its own, so that peak memory is its own.

In: the command's options. Out: `bench.jsonl`, `bench.md` and `bench.html` in a folder.
Next: hico_jax/evals/compress/latency.py
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from data_pipeline.world import films
from hico_jax.evals import card, journal
from hico_jax.evals.compress import methods
from hico_jax.report import page

STEPS = ("read", "vision", "merge", "project", "prefill", "decode")
WAYS = {"off": "none", "clip level": "merge", "clip and video level": "merge"}


def main(args: argparse.Namespace) -> int:
    """Time what has not been timed, and print the table.

    Raises:
      ValueError: a folder with other settings, or a film that is too short.
    """
    from hico_jax import ask  # as in latency.py

    model, _ = ask.load_model(args.model)
    geometry, patches = model.config.geometry(), methods.patches_per_frame(model)
    frames = sorted({f // geometry.frames_per_clip * geometry.frames_per_clip for f in args.frames} - {0})
    drop = args.drop_text or default_drop(model.config.llm.num_layers)
    out = pathlib.Path(args.out)
    settings = json.loads(json.dumps(card.model(model, args.model) | {"video_level": drop, "film": args.film or ""}))
    settings |= {"quantize": args.quantize} if args.quantize else {}
    journal.claim(out, settings, fresh=args.fresh, name="bench")
    del model
    with journal.Appending(out / "bench.0.jsonl") as file:
        done = {line["id"]: line for line in journal.read(out, "bench")}
        for count in frames:
            film = args.film or _film(out, count)
            for way, method in WAYS.items():
                name = f"{count}/{way}"
                per_frame = patches if method == "none" else geometry.tokens_per_clip // geometry.frames_per_clip
                tokens = count * per_frame
                if name in done and not (done[name].get("skipped") and tokens <= args.max_tokens):
                    continue
                line: dict[str, Any] = {"id": name, "frames": count, "way": way, "visual_tokens": tokens}
                if tokens > args.max_tokens:
                    line["skipped"] = f"{tokens:,} tokens are more than --max-tokens {args.max_tokens:,}"
                else:
                    print(f"{count:,} frames, compression {way} ...", flush=True)
                    line |= _run(
                        args.model,
                        film,
                        count,
                        method,
                        drop if "video" in way else "",
                        args.timeout,
                        args.quantize or "",
                    )
                done[name] = line
                if "skipped" not in line:
                    journal.add(file, line)
    lines = [done[f"{f}/{w}"] for f in frames for w in WAYS]
    tell(lines, settings, out)
    return 0


def default_drop(layers: int) -> str:
    """A quarter of the tokens left after two thirds of the layers, as the paper's two-stage schedule in shape."""
    after, ratios = methods.usual_schedule(layers)
    return f"uniform0_attention:{','.join(map(str, after))}:{','.join(f'{r:g}' for r in ratios)}"


def _film(out: pathlib.Path, seconds: int) -> str:
    path = out / f"film_{seconds}s.mp4"
    if not path.is_file():
        films.haystack(path, num_seconds=seconds, seed=0, split="val")
    return str(path)


def _run(model: str, film: str, frames: int, method: str, drop: str, timeout: float, kind: str = "") -> dict[str, Any]:
    command = [sys.executable, "-m", "hico_jax.evals.compress.latency", model, film, str(frames), method, drop, kind]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout or None, env=environment, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {done.returncode}: {last[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


COLUMNS = ("frames", "compression", "visual tokens", *(f"{s}, s" for s in STEPS), "total, s", "prefill + cache, MiB",
           "peak, MiB")  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows for people."""
    rows = []
    for line in lines:
        head = [f"{line['frames']:,}", line["way"], f"{line['visual_tokens']:,}"]
        if missing := line.get("skipped") or line.get("failed"):
            rows.append([*head, missing, *[""] * (len(COLUMNS) - 4)])
            continue
        peak = line["peak_mib"].get("device", line["peak_mib"]["host"])
        rows.append([
            *head, *(f"{line[s]:.3g}" for s in STEPS), f"{sum(line[s] for s in STEPS):.3g}",
            f"{line['prefill_mib']:.0f}", f"{peak:.0f}",
        ])  # fmt: skip
    return rows


def tell(lines: Sequence[dict[str, Any]], settings: dict[str, Any], out: pathlib.Path) -> None:
    """The table on the terminal, in Markdown and as a page with the curves."""
    rows, environment = table(lines), card.environment() | {"command": card.command()}
    text = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *(f"| {' | '.join(r)} |" for r in rows), ""]
    text += [f"- {k}: {v}" for k, v in (settings | environment).items()]
    (out / "bench.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    blocks: list[page.AnyBlock] = [{"kind": "table", "columns": list(COLUMNS), "rows": rows}]
    timed = [line for line in lines if "prefill" in line]
    for title, value in (("seconds to the answer", lambda x: sum(x[s] for s in STEPS)),
                         ("MiB of prefill and cache", lambda x: x["prefill_mib"])):  # fmt: skip
        series: list[page.Line] = [
            {"label": way, "x": [x["frames"] for x in timed if x["way"] == way],
             "y": [value(x) for x in timed if x["way"] == way]}
            for way in WAYS if any(x["way"] == way for x in timed)
        ]  # fmt: skip
        if series:
            blocks.append({"kind": "lines", "title": title, "series": series, "x_label": "frames", "y_label": title,
                           "log_x": True, "log_y": True, "half": True})  # fmt: skip
    report: page.Report = {
        "title": f"Inference by length: {settings['model']}",
        "lead": "From the mp4 to sixteen new tokens, compiled before it was timed. Peak memory is the device's where "
        "it tells, else the process's.",
        "sections": [
            {"title": "Time and memory", "blocks": blocks},
            {"title": "Protocol", "blocks": [
                {"kind": "keyvalues", "items": [[k, str(v)] for k, v in part.items()], "half": True}
                for part in (settings, environment)
            ]},
        ],
    }  # fmt: skip
    print("\n".join(text[: len(rows) + 2]))
    print(page.write(report, out / "bench.html"))
