"""Rows and tables of the demo's page.

In: results of `measure.py`. Out: tables that `report/page.py` draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hico_jax.demo import measure
from hico_jax.report import page

Results = Mapping[str, Any]


def row(r: Results) -> list[page.Value]:
    """A row of the compression tables."""
    t = r["total"]
    return [
        r["name"],
        f"{r['visual_tokens']:,}"
        if r["kept"] is None
        else f"{r['visual_tokens']:,} -> {int(r['visual_tokens'] * r['kept']):,}",
        f"{r['seconds']:.2f}",
        percent(t["share"]),
        f"{percent(t['low'])} to {percent(t['high'])}",
    ]


def kinds(rows: Sequence[Results]) -> list[str]:
    """The kinds of question that were asked."""
    return list(rows[0]["by_kind"])


def kinds_table(found: Results) -> page.Table:
    """Right answers by kind of question, for cards like those of training and for pairs it never showed."""
    rows = []
    for where, result in (("", found), (f", unseen pair ({found['unseen']['seconds']} s)", found["unseen"])):
        for kind, r in result["by_kind"].items():
            between = f"{percent(r['low'])} to {percent(r['high'])}"
            rows.append(
                [
                    kind.replace("_", " ") + where,
                    r["asked"],
                    percent(r["share"]),
                    between,
                    percent(measure.chance(kind)),
                ]
            )
    return {
        "kind": "table",
        "columns": ["question", "asked", "right", "95 % interval", "chance"],
        "rows": rows,
        "caption": "An unseen pair is a colour and a shape that training showed often, but never together.",
    }


def stages_table(found: Results) -> page.Table:
    """The model that answers beside that of the last stage."""
    rows = []
    for name, r in found.items():
        if name == "seconds":
            continue
        total = r["total"]
        shares = [percent(k["share"]) for k in r["by_kind"].values()]
        between = f"{percent(total['low'])} to {percent(total['high'])}"
        rows.append([name, f"{r['px']} px", *shares, percent(total["share"]), between])
    kinds = next(list(r["by_kind"]) for name, r in found.items() if name != "seconds")
    return {
        "kind": "table",
        "columns": ["model after", "frames of", *(k.replace("_", " ") for k in kinds), "right", "95 % interval"],
        "rows": rows,
        "caption": (
            f"The same films of {found['seconds']} s. The first model is the one this page asks: a few dozen steps at "
            "the higher resolution, with the language model frozen, do not win back what the change costs a tower "
            "this small."
        ),
        "source": "results/needle.json",
    }


def percent(share: float | None) -> str:
    """A share as text."""
    return "-" if share is None else f"{100 * share:.1f} %"
