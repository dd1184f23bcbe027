"""Rows as lines, as a Markdown table, and as what goes into the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.speed.rows import Row

COLUMNS = ("row", "value", "roof", "of roof", "recorded*", "times recorded", "peak GiB", "compile s", "goal", "note")


def complete(row: Row, found: Mapping[str, Any]) -> dict[str, Any]:
    """The row's figures with its name, its ratio to the roof and to the opponent's recorded figure."""
    out: dict[str, Any] = {"row": row.name, "what": row.what, "unit": row.unit, "goal": row.goal, **found}
    value, roof = found.get("value"), found.get("roof")
    if value and roof:
        out["of_roof"] = roof / value if row.lower_is_better else value / roof
    if row.recorded is not None:
        out["recorded"] = row.recorded
        if value:
            out["times_recorded"] = row.recorded / value if row.lower_is_better else value / row.recorded
    return out


def reason(tail: Sequence[str]) -> str:
    """The line that says most about why a process died."""
    for line in reversed(tail):
        if any(word in line for word in ("Error", "RESOURCE_EXHAUSTED", "Check failed", "F0", "Aborted")):
            return line.strip()[:400]
    return tail[-1][:400] if tail else "it said nothing"


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def cells(result: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    failed = result.get("failed")
    share = result.get("of_roof")
    times = result.get("times_recorded")
    value = "failed" if failed else f"{_number(result.get('value'))} {result['unit']}".strip()
    return [
        f"{result['row']}", value, _number(result.get("roof")), f"{share:.0%}" if share else "",
        _number(result.get("recorded")), f"{times:.2f}x" if times else "", _number(result.get("peak_gib")),
        _number(result.get("compile_s")), result["goal"], str(failed or result.get("note", ""))[:200],
    ]  # fmt: skip


def line(result: Mapping[str, Any]) -> str:
    """One row in words, as it ends."""
    named = zip(COLUMNS, cells(result), strict=True)
    return (
        "== " + "; ".join(f"{name} {cell}" for name, cell in named if cell) + f"; took {result.get('row_s', 0):.0f} s"
    )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """All rows as Markdown, the environment below."""
    lines = [" | ".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cells(r)) for r in results]
    text = "\n".join(f"| {line} |" for line in lines)
    found = next((r["environment"] for r in results if "environment" in r), {})
    text += "\n\n* recorded on the same kind of card (PyTorch 2.11, one H100 80 GB), not in this run."
    return text + "\n" + ", ".join(f"{name} {value}" for name, value in found.items() if value)
