"""A heat-map as a picture file, for papers and slides: the chart of `charts.heatmap` in pixels.

In: numbers and labels. Out: a PNG.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from hico_jax.report.charts import HEAT_LIGHT, Number

CELL_W, CELL_H, SCALE = 84, 46, 2
INK, PAPER, UNKNOWN = (34, 40, 46), (255, 255, 255), (226, 226, 226)


def heatmap_png(
    path: str | pathlib.Path,
    values: Sequence[Sequence[Number]],
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    x_label: str = "",
    y_label: str = "",
) -> pathlib.Path:
    """Shares from 0 to 1, each printed as a percentage in a cell coloured by it; None is grey.

    Raises:
      ValueError: the values do not fit the labels.
    """
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise ValueError(
            f"heat-map {title!r} has {len(values)} rows of {sorted({len(r) for r in values})} values for {len(rows)} "
            f"rows and {len(columns)} columns of labels"
        )
    font, bold = ImageFont.load_default(size=13 * SCALE), ImageFont.load_default(size=16 * SCALE)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label_w = max([0.0, *(probe.textlength(r, font=font) for r in rows)]) / SCALE + 24
    left, top = label_w + (18 if y_label else 0), 56
    width = max(left + CELL_W * len(columns) + 16, probe.textlength(title, font=bold) / SCALE + 32)
    height = top + CELL_H * len(rows) + (58 if x_label else 34)
    image = Image.new("RGB", (math.ceil(width * SCALE), math.ceil(height * SCALE)), PAPER)
    pen = ImageDraw.Draw(image)

    def text(x: float, y: float, words: str, anchor: str, ink: tuple[int, int, int] = INK) -> None:
        pen.text((x * SCALE, y * SCALE), words, fill=ink, font=font, anchor=anchor)

    pen.text((16 * SCALE, 14 * SCALE), title, fill=INK, font=bold)
    for i, row in enumerate(values):
        y = top + i * CELL_H
        text(left - 10, y + CELL_H / 2, rows[i], "rm")
        for j, value in enumerate(row):
            x = left + j * CELL_W
            known = value is not None and math.isfinite(value)
            share = min(max(float(value), 0.0), 1.0) if known else 0.0  # type: ignore[arg-type]
            box = [round(v * SCALE) for v in (x + 1, y + 1, x + CELL_W - 1, y + CELL_H - 1)]
            pen.rectangle(box, fill=_mix(share) if known else UNKNOWN)
            ink = PAPER if known and share > 0.55 else INK
            text(x + CELL_W / 2, y + CELL_H / 2, f"{100 * share:.0f}%" if known else "–", "mm", ink)
    for j, name in enumerate(columns):
        text(left + (j + 0.5) * CELL_W, top + CELL_H * len(rows) + 14, name, "mm")
    text(left + CELL_W * len(columns) / 2, top + CELL_H * len(rows) + 38, x_label, "mm")
    if y_label:
        turned = Image.new("RGB", (round(CELL_H * len(rows) * SCALE), 20 * SCALE), PAPER)
        ImageDraw.Draw(turned).text((turned.width / 2, 10 * SCALE), y_label, fill=INK, font=font, anchor="mm")
        image.paste(turned.rotate(90, expand=True), (4 * SCALE, top * SCALE))
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    image.save(part, "PNG")
    return part.replace(path)


def _mix(share: float) -> tuple[int, int, int]:
    low, high = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in HEAT_LIGHT)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue
