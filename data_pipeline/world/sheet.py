"""A contact sheet: some frames of a film side by side, each with a line of text.

In: frames and captions. Out: a PIL image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hico_jax.shapes import UInt8, ndarray


def contact_sheet(
    frames: Sequence[UInt8[ndarray, "height width 3"]] | UInt8[ndarray, "T height width 3"],
    captions: Sequence[str],
    *,
    columns: int = 8,
    px: int = 96,
    marked: Sequence[int] = (),
) -> Image.Image:
    """Frames in rows of `columns`, captions below, a bright border around the `marked` ones.

    Raises:
      ValueError: no frames, or not one caption a frame.
    """
    if not len(frames) or len(frames) != len(captions):
        raise ValueError(f"there are {len(frames)} frames and {len(captions)} captions; give one caption a frame")
    gap, line = 6, 14
    rows = -(-len(frames) // columns)
    width, height = min(columns, len(frames)) * (px + gap) + gap, rows * (px + line + gap) + gap
    sheet = Image.new("RGB", (width, height), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for i, (pixels, caption) in enumerate(zip(frames, captions, strict=True)):
        x, y = gap + i % columns * (px + gap), gap + i // columns * (px + line + gap)
        sheet.paste(Image.fromarray(np.asarray(pixels)).resize((px, px), Image.Resampling.BICUBIC), (x, y))
        if i in marked:
            draw.rectangle((x - 3, y - 3, x + px + 2, y + px + 2), outline=(220, 40, 60), width=3)
        draw.text((x, y + px + 1), caption, fill=(30, 30, 30), font=font)
    return sheet
