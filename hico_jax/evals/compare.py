"""`hico compare`: two evaluations question by question, with an interval that uses the pairing.

In: two folders of `hico eval`, `hico niah` or one method of `hico compress`. Out: a table on the terminal, and JSON.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hico_jax.evals import journal, paired

Line = Mapping[str, Any]
# By the name of the files: the scores of a line, in the order of the columns.
SCORES = {"answers": ("strict", "reference"), "trials": ("forced", "generated")}


def main(args: argparse.Namespace) -> int:
    """Print what the first scores more than the second.

    Raises:
      ValueError: a folder without answers, other questions, or questions with other answers.
    """
    folders = pathlib.Path(args.first), pathlib.Path(args.second)
    name = kind(folders)
    first, second = (journal.read(folder, name) for folder in folders)
    found = compared(first, second, SCORES[name])
    differs = settings(folders)
    print(f"{args.first} − {args.second}: {found['all'][SCORES[name][0]]['number']} questions that both answered")
    for setting, (a, b) in differs.items():
        print(f"  {setting}: {a!r}, {b!r}")
    if alone := len(first) + len(second) - 2 * found["all"][SCORES[name][0]]["number"]:
        print(f"  {alone} questions that only one of them answered are left out")
    print("\n".join(table(found, SCORES[name])))
    print(paired.NOTE)
    if args.json:
        told = {"first": args.first, "second": args.second, "settings": differs, "differences": found}
        pathlib.Path(args.json).write_text(json.dumps(told, indent=1) + "\n")
    return 0


def kind(folders: Sequence[pathlib.Path]) -> str:
    """What both folders hold: "answers" or "trials".

    Raises:
      ValueError: neither, or one of each.
    """
    found = [next((n for n in SCORES if list(folder.glob(f"{n}.*.jsonl"))), "") for folder in folders]
    for folder, name in zip(folders, found, strict=True):
        if not name:
            raise ValueError(
                f"{folder} holds no answers.*.jsonl and no trials.*.jsonl; give the folder of an evaluation"
            )
    if found[0] != found[1]:
        raise ValueError(f"{folders[0]} holds {found[0]} but {folders[1]} holds {found[1]}; give two of the same kind")
    return found[0]


def compared(
    first: Iterable[Line], second: Iterable[Line], scores: Sequence[str]
) -> dict[str, dict[str, paired.Difference]]:
    """Differences by group ("all", then tasks or cells) and score.

    Raises:
      ValueError: no question in common, or one whose expected answer is another.
    """
    others = {line["id"]: line for line in second}
    pairs = [(line, others[line["id"]]) for line in first if line["id"] in others]
    if not pairs:
        raise ValueError("they have no question in common; both must ask the same")
    for a, b in pairs:
        if a["expected"] != b["expected"]:
            raise ValueError(
                f"question {a['id']} expects {a['expected']!r} in one and {b['expected']!r} in the other; they asked "
                "about other films or needles"
            )
    groups = {"all": pairs}
    for pair in pairs:
        groups.setdefault(_group(pair[0]), []).append(pair)
    return {
        name: {
            s: paired.difference([_score(a, s) for a, _ in found], [_score(b, s) for _, b in found],
                                 [a.get("video") or a.get("needle") for a, _ in found])
            for s in scores
        }
        for name, found in groups.items()
    }  # fmt: skip


def _group(line: Line) -> str:
    if "groups" in line:
        return str(line["groups"].get("task", "other"))
    return f"{line['insertion']}, {line['frames']:,} frames" + (f", {line['asked']}" if line["depth"] is None else "")


def _score(line: Line, name: str) -> float:
    return float(line[name]["score"] if isinstance(line[name], Mapping) else line[name])


def settings(folders: Sequence[pathlib.Path]) -> dict[str, tuple[Any, Any]]:
    """Settings of the two that differ; a method of `hico compress` has those of the folder above it."""
    read = []
    for folder in folders:
        path = next((p for p in (folder / journal.SETTINGS, folder.parent / journal.SETTINGS) if p.is_file()), None)
        read.append({} if path is None else json.loads(path.read_text()))
    return {k: (read[0].get(k), read[1].get(k)) for k in {**read[0], **read[1]} if read[0].get(k) != read[1].get(k)}


def table(found: Mapping[str, Mapping[str, paired.Difference]], scores: Sequence[str]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| | questions | {' | '.join(f'{s}, points | better | worse' for s in scores)} |"]
    lines.append("|---|--:|" + "--:|--:|--:|" * len(scores))
    for name, by in found.items():
        cells = [f"{paired.starred(by[s])} | {by[s]['better']} | {by[s]['worse']}" for s in scores]
        lines.append(f"| {name} | {by[scores[0]]['number']} | {' | '.join(cells)} |")
    return lines
