"""The models that are known by name, as a table: `hico models`.

In: the registry. Out: text, or JSON. Parameters are counted on abstract models, so nothing is allocated.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from flax import nnx

from hico_jax import registry, weights
from hico_jax.models import layers


def main(args: argparse.Namespace) -> None:
    """Print every entry of `registry.MODELS`."""
    rows = [row(name) for name in registry.MODELS]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(table(rows))
    if there := [name for name in weights.NAMES if weights.shipped(name)]:
        print(f"\nTrained weights that ship, for --model: {', '.join(there)}.")


def row(name: str) -> dict[str, Any]:
    """What there is to know of one model without its weights."""
    entry, config = registry.entry(name), registry.model_config(name)
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return {
        "name": name,
        "tower": entry.vision[1],
        "language model": entry.llm[1],
        "px": config.vision.image_px,
        "tokens/frame": config.compressor.tokens_per_frame,
        "parameters": layers.num_params(model),
        "context": config.max_length,
        "source": entry.source,
        "licence": entry.licence,
        "note": entry.note,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Columns as wide as their widest cell; notes on a line of their own below."""
    columns = [name for name in rows[0] if name != "note"]
    cells = [columns] + [[_shown(name, row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    pads = [str.rjust if isinstance(rows[0][name], int) else str.ljust for name in columns]
    lines = [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in cells
    ]
    width = max(len(row["name"]) for row in rows)
    return "\n".join([*lines, "", *(f"{row['name']:<{width}}  {row['note']}" for row in rows)])


def _shown(name: str, value: Any) -> str:
    if name == "parameters":
        size, unit = next(pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= pair[0])
        return f"{value / size:.3g} {unit}"
    return f"{value:,}" if isinstance(value, int) else value or "-"
