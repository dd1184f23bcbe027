"""The first batch as a page: frames, and every row's text with what is not learnt in grey.

In: a host batch. Out: one HTML file that needs nothing else.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from hico_jax.batch import Batch

STYLE = """body{font:14px/1.5 sans-serif;margin:2em;max-width:70em}img{height:72px;margin:1px}
.row{border-top:1px solid #ccc;padding:1em 0}.masked{color:#999}.learnt{color:#060;font-weight:600}
.visual{color:#fff;background:#678;border-radius:3px;padding:0 .3em}.pad{color:#c66}"""


def page(batch: Batch, decode: Callable[[Sequence[int]], str] | None = None, *, rows: int = 8, frames: int = 12) -> str:
    """The page's text. Runs of visual tokens show as their number; segments of a packed row are apart."""
    show = decode or (lambda ids: " ".join(map(str, ids)) + " ")
    parts = [f"<!doctype html><meta charset=utf-8><title>First batch</title><style>{STYLE}</style><h1>First batch</h1>"]
    parts.append(f"<p>{batch.shape[0]} rows of {batch.shape[1]} tokens; grey is not learnt, green is.</p>")
    for row in range(min(rows, batch.shape[0])):
        parts.append(f'<div class="row">{"".join(_pictures(batch, row, frames))}<p>{_text(batch, row, show)}</p></div>')
    return "\n".join(parts) + "\n"


def _pictures(batch: Batch, row: int, limit: int) -> list[str]:
    from PIL import Image

    clips, images = np.asarray(batch.clips[row]), np.asarray(batch.images[row])
    every = [f for f in (*clips.reshape(-1, *clips.shape[2:]), *images) if f.any()]
    picked = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, limit).astype(int))] if every else []
    made = []
    for frame in picked:
        low, high = float(frame.min()), float(frame.max())
        if frame.dtype != np.uint8:
            frame = ((frame - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(frame).resize((72, 72)).save(file, "JPEG", quality=80)
        made.append(f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">')
    return made


def _text(batch: Batch, row: int, show: Callable[[Sequence[int]], str]) -> str:
    tokens, slots, segments = (np.asarray(a[row]) for a in (batch.tokens, batch.slots, batch.segments))
    # A token is learnt when the one before it, in its segment, has a weight; a run of visual tokens counts by its last.
    weights = np.asarray(batch.weights[row])
    learnt = np.append(False, (weights[:-1] > 0) & (segments[1:] == segments[:-1])) & (slots < 0)
    kinds = np.where(segments == 0, 0, np.where(slots >= 0, 1, np.where(learnt, 3, 2))) + 4 * segments
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    told, before = [], 1
    for start, stop in itertools.pairwise(edges):
        segment, kind = divmod(int(kinds[start]), 4)
        if segment > before:
            told.append("<hr>")
        before = segment or before
        name = ("pad", "visual", "masked", "learnt")[kind]
        text = f"{stop - start} {name}" if kind < 2 else html.escape(show(tokens[start:stop].tolist()))
        told.append(f'<span class="{name}">{text}</span>'.replace("\n", "<br>"))
    return "".join(told)
