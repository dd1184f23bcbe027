"""What option an answer means: as the reference's harness judges it, quirk for quirk, and as it should be judged.

`reference` rules reproduce the published evaluation (recorded cases, group H). `strict` is one rule for every
benchmark, with the quirks mended; `QUIRKS` says which.

In: the model's text and the options. Out: a letter, or None where none can be made out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

QUIRKS = {
    "mcq": (
        "a sentence that begins 'A man ...' is option A; letters run to E whatever the options are; "
        "items with an empty answer leave the denominator"
    ),
    "perceptiontest": "any capital A to D that stands alone counts, so 'A man ...' is A; lower case never counts",
    "longvideobench": "an answer that names nothing is guessed at random; of several letters the last one counts",
    "videomme": "the first capital A to D counts even inside a word ('Answer: C' is A); lower case never counts",
    "world": "none: an answer is right when it is the expected word",
    "grounding": (
        "every 'to' becomes '-', also inside words; units, clock times and dashes other than '-' are not read; the IoU "
        "is over the hull of both spans; a repeated (video, caption, span) is scored once"
    ),
}

_PUNCTUATION = r""";/[]"{}()=+\_-><@`,?!"""
_LEADING = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE)
_DOT = re.compile(r"\.(?!\d)")
_ALONE = re.compile(r"\b([A-E])\b", re.IGNORECASE)


def mcq_text(prediction: str) -> str:
    """The normalized prediction of MVBench, MLVU and LVBench: a letter, or text where none stands alone."""
    text = prediction.strip()
    if found := _LEADING.match(text):
        return found.group(1).upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    crowded = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        glued = crowded or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if glued else " ")
    cleaned = _DOT.sub("", cleaned, count=32)  # a flag stands where the count belongs
    cleaned = cleaned.strip("'").strip('"').strip(")").strip("(").strip().lower()
    found = _ALONE.search(cleaned)
    return found.group(1).upper() if found else cleaned


def mcq_letter(prediction: str) -> str | None:
    """`mcq_text` where it is a letter."""
    text = mcq_text(prediction)
    return text if text in ("A", "B", "C", "D", "E") else None


def perception_letter(prediction: str) -> str | None:
    """PerceptionTest: the first capital A to D that stands alone."""
    found = re.search(r"\b([A-D])\b", prediction)
    return found.group(1) if found else None


def longvideobench_letter(prediction: str, options: Sequence[str]) -> str | None:
    """LongVideoBench (after MMMU): (X), then "X ", then "X.", then an option's text; None: the reference guesses."""
    text = prediction
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    last: dict[str, int] = {}
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [c for c in letters if form.format(c) in text]
        if named:
            last = {c: text.rfind(place.format(c)) for c in named}
            break
    if not last and len(text.split()) > 5:
        low = text.lower()
        last = {c: low.rfind(o.lower()) for c, o in zip(letters, options, strict=True) if o.lower() in low}
    return max(last, key=lambda c: last[c]) if last else None  # of equal places the first letter


def guess(identity: str, num_options: int, seed: int) -> str:
    """The random choice for an answer that names nothing; the reference's is unseeded, this one repeats."""
    return LETTERS[int(np.random.default_rng([seed, *identity.encode()]).integers(num_options))]


# The last two are one string each because of commas that are missing in the reference.
_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer",
    "The best option isThe correct option is", "Best answer:Best option:",
)  # fmt: skip


def videomme_letter(prediction: str) -> str | None:
    """Video-MME: known prefixes out, then the first capital A to D anywhere."""
    text = prediction.strip()
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    found = re.search("[ABCD]", text)
    return found.group(0) if found else None


def _bare(text: str) -> str:
    return re.sub(r"[\s.,:;!?'\"`*]+", " ", text).strip().lower()


def strict_letter(prediction: str, options: Sequence[str]) -> str | None:
    """The one option that an answer names; None where it names none, or two.

    In this order: the whole answer is a letter; it begins with a letter and a mark ("B.", "(b)", "C:"); it says
    "answer is X" or "option X"; one capital letter in brackets or alone; it is, or contains, the text of one option.
    Only letters of the options count, and "A" or "I" that begins a sentence is a word.

    Example:
      >>> strict_letter("A man is walking.", ["red", "blue"]), strict_letter("The answer is (b).", ["red", "blue"])
      (None, 'B')
    """
    letters = LETTERS[: len(options)]
    if not letters:
        return None
    text = prediction.strip().strip("*`\"'").strip()
    span = f"[{letters}{letters.lower()}]"
    if found := re.fullmatch(rf"[(\[<]?({span})[)\]>]?[.,:;!?*`\"'。)]*", text):
        return found.group(1).upper()
    texts = [_bare(_plain(option, letters)) for option in options]
    whole = [c for c, o in zip(letters, texts, strict=True) if o and o == _bare(text)]
    if len(whole) == 1:
        return whole[0]
    if found := re.match(rf"(?:\(({span})\)[.:]?|({span})(?:\)|:|\.))(?=\s|$)", text):
        return (found.group(1) or found.group(2)).upper()
    # "A dog", "I think": words, not options. A small letter counts in brackets only.
    alone = rf"([{letters}])(?![\w']|\.\w)(?!(?<=[AI])\s+[a-z])"
    cue = r"(?:answer|option|choice)(?:\s+(?:is|would be|should be))?\s*:?\s*"
    said = {a or b for a, b in re.findall(rf"(?i:{cue})(?:\(({span})\)|{alone})", text)}
    if not said:
        said = set(re.findall(rf"\(({span})\)", text))
    if not said:
        said = set(re.findall(rf"(?<![\w'])(?:{alone})", text))
    said = {c.upper() for c in said}
    if said:
        return said.pop() if len(said) == 1 else None
    inside = [c for c, o in zip(letters, texts, strict=True) if o and re.search(rf"\b{re.escape(o)}\b", _bare(text))]
    return inside[0] if len(inside) == 1 else None


def _plain(option: str, letters: str) -> str:
    """An option without a letter of its own, such as "(A) red" or "A. red"."""
    return re.sub(rf"^\s*(?:\([{letters}]\)|[{letters}][.)])\s*", "", option)
