"""A span of time in an answer, and how well it fits: Charades-STA.

In: the model's text. Out: seconds, or None where no span can be made out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[float, float]
THRESHOLDS = (0.3, 0.5, 0.7)

_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"
_PAIR = re.compile(r"(\d+\.*\d*)\s*-\s*(\d+\.*\d*)")
_FIRST = re.compile(r"\b(\d+\.\d+\b|\b\d+)\b")
_CUES = ("start", "end", "happen")


def reference_span(answer: str) -> Span | None:
    """What `extract_time` of the reference finds.

    Its third form, clock times, never applies: where there is one, the plain numbers in it are found first.

    Raises:
      ValueError: a number such as "1..2", on which the reference stops.
    """
    text = answer.lower().replace(_EXAMPLE, "").replace("to", "-")
    pairs = [(float(a), float(b)) for a, b in _PAIR.findall(text)]
    if not pairs:
        cued = [s for s in re.split(r"[!?\n]", text) if any(cue in s for cue in _CUES)]
        firsts = [float(found[0]) for s in cued if (found := _FIRST.findall(s))]
        pairs = list(zip(firsts[::2], firsts[1::2], strict=False))
    if not pairs:
        return None
    start, end = pairs[0]
    return (start, end) if end > start else (end, start)


def hull_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """The reference's overlap: over the hull of both spans instead of their union.

    Raises:
      ZeroDivisionError: both are the same point, as in the reference.
    """
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return max(0.0, shared) / (max(a[1], b[1]) - min(a[0], b[0]))


_NUMBER = r"(\d+:\d{1,2}:\d{2}(?:\.\d+)?|\d+:\d{2}(?:\.\d+)?|\d+(?:\.\d+)?)(?!\.\.|\.?\d)"
_UNIT = r"(?:\s*(?:seconds?|secs?|s)\b\.?)?"
_JOIN = r"\s*(?:-|–|—|~|\bto\b|\band\b|\buntil\b|\btill\b|\bthrough\b)\s*"
_STRICT_PAIR = re.compile(rf"(?<![\d.:]){_NUMBER}{_UNIT}{_JOIN}{_NUMBER}{_UNIT}", re.IGNORECASE)
_STRICT_ENDS = (
    re.compile(rf"(?:start|begin|from)[^\d]*?(?<![\d.:]){_NUMBER}", re.IGNORECASE),
    re.compile(rf"(?:end|finish|stop|until)[^\d]*?(?<![\d.:]){_NUMBER}", re.IGNORECASE),
)


def strict_span(answer: str) -> Span | None:
    """The span an answer states: "3 - 9", "from 3 to 9 s", "starts at 0:03 and ends at 0:09"; None for anything else.

    Example:
      >>> strict_span("It starts at 1:05 and ends at 1:20.5."), strict_span("tomato")
      ((65.0, 80.5), None)
    """
    text = answer.replace(",", " ")
    if found := _STRICT_PAIR.search(text):
        ends = found.group(1), found.group(2)
    else:
        first, last = (pattern.search(text) for pattern in _STRICT_ENDS)
        if first is None or last is None:
            return None
        ends = first.group(1), last.group(1)
    start, end = sorted(map(_seconds, ends))
    return start, end


def _seconds(text: str) -> float:
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Shared time over the time either covers; 0 where neither covers any."""
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    either = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / either if either > 0 else 0.0
