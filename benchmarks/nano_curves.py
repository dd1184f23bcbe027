"""Curves of a run of `launch/nano.sh`: one small CSV a stage and one picture of loss and accuracy.

    .venv/bin/python benchmarks/nano_curves.py runs/hico_nano docs/nano

In: RUN/*/metrics.jsonl. Out: OUT/STAGE.csv, OUT/loss.svg, OUT/accuracy.svg, and a line a stage on the terminal.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from hico_jax.report import charts

STAGES = ("told", "stage1", "stage2", "stage3", "stage3_middle", "stage3_long", "stage4", "stage4_long")
COLUMNS = ("step", "loss", "accuracy", "lr", "grad_norm", "tokens_per_s", "step_s")
ROWS = 200  # at most so many in a file; each is the mean of its steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a run, write its curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="the folder that launch/nano.sh wrote")
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="where the curves go")
    args = parser.parse_args(arguments)
    found = {path.parent.name: read(path) for path in args.run.glob("*/metrics.jsonl")}
    found = {name: found[name] for name in sorted(found, key=_place) if found[name]}
    if not found:
        parser.error(f"{args.run} holds no */metrics.jsonl; give the folder that launch/nano.sh wrote")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        with open(args.out / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([_short(row.get(key)) for key in COLUMNS] for row in thinned(rows, ROWS))
        last = rows[-1]
        print(f"{name:14} {last['step']:5} steps  loss {last['loss']:.4f}  accuracy {last['accuracy']:.4f}")
    for what, log in (("loss", True), ("accuracy", False)):
        svg = draw(found, what, log=log)
        (args.out / f"{what}.svg").write_text(charts.standalone(svg))
    return 0


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The steps of a stage in order; of a step that was trained twice, the later line. A torn line is left out."""
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the run was stopped while it wrote
            continue
        if "loss" in row:
            steps[row["step"]] = row
    return [steps[step] for step in sorted(steps)]


def thinned(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows: means over runs of equally many steps, under the last step of each."""
    size = -(-len(rows) // limit)
    out = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        keys = [key for key in COLUMNS if all(isinstance(row.get(key), int | float) for row in part)]
        out.append({key: sum(row[key] for row in part) / len(part) for key in keys} | {"step": part[-1]["step"]})
    return out


def draw(found: dict[str, list[dict[str, Any]]], what: str, *, log: bool) -> str:
    """All stages one after another, with a mark where each begins."""
    series, marks, at = [], [], 0
    for i, (name, rows) in enumerate(found.items()):
        small = thinned(rows, ROWS)
        x = [at + row["step"] for row in small]
        series.append(charts.Series(name, x, [row[what] for row in small], colour=i))
        marks.append((float(at), ""))
        at += rows[-1]["step"]
    return charts.line_chart(
        series, title=f"{what} of each stage", x_label="steps, all stages", y_label=what, log_y=log, marks=marks[1:],
        percent=what == "accuracy", width=860, height=360,
    )  # fmt: skip


def _place(name: str) -> tuple[int, str]:
    return (STAGES.index(name) if name in STAGES else len(STAGES), name)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    raise SystemExit(main())
