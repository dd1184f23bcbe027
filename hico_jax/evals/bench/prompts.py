"""The text of every question, byte for byte as the reference's harness asks it, its slips included.

In: a record of an official annotation file. Out: what stands after the time message in the user's turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hico_jax.evals.bench.matchers import LETTERS

ONLY_BEST = "\nOnly give the best option."
DIRECTLY = "Answer with the option's letter from the given choices directly."
VIRTUAL_FRAMES = 512  # frames that LongVideoBench's subtitles are matched against

CHARADES = (
    "Please find the visual event described by a sentence in the video, determining its starting and ending times. "
    "The format should be: 'The event happens in the start time - end time'. For example, The event 'person turn a "
    "light on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: "
)
_VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video{}. Respond with only the "
    "letter (A, B, C, or D) of the correct option."
)
_FRAMES_ONLY = f"These are the frames of a video. {_VIDEOMME.format('')}"
_WITH_SUBTITLES = f"These are the frames and subtitles of a video. {_VIDEOMME.format(' and the subtitles')}"


def mvbench(record: Mapping[str, Any]) -> str:
    """MVBench (`mvbench_doc_to_text`)."""
    return f"Question: {record['question']}\nOption:\n{_bracketed(record['candidates'])}{ONLY_BEST}"


def mlvu(record: Mapping[str, Any]) -> str:
    """MLVU multiple choice: no space after "Question:"."""
    return f"Question:{record['question']}\nOption:\n{_bracketed(record['candidates'])}{DIRECTLY}"


def lvbench(record: Mapping[str, Any]) -> str:
    """LVBench: its candidates begin with a letter of their own, so lines read "A. (A) ..."."""
    lines = "".join(f"{LETTERS[i]}. {c}\n" for i, c in enumerate(record["candidates"]))
    return f"{record['question']}\n{lines}{DIRECTLY}"


def _bracketed(options: Sequence[str]) -> str:
    return "".join(f"({LETTERS[i]}) {c}\n" for i, c in enumerate(options))


def perceptiontest(record: Mapping[str, Any]) -> str:
    """PerceptionTest: every option from the third on is called (C); without options only the question."""
    text = f"\nQuestion: {record['question']}"
    if options := record.get("options"):
        text += "".join(f"\n({LETTERS[min(i, 2)]}). {o}" for i, o in enumerate(options)) + ONLY_BEST
    return text


def longvideobench(record: Mapping[str, Any], subtitles: Sequence[Mapping[str, Any]]) -> str:
    """LongVideoBench, always with the subtitles that some virtual frame falls into."""
    times = virtual_times(record["duration"])
    said = insert_subtitles(times, subtitles, record["starting_timestamp_for_subtitles"], record["duration"])
    options = [record[f"option{i}"] for i in range(5) if record.get(f"option{i}", "N/A") != "N/A"]
    lines = "".join(f"\n({LETTERS[i]}). {o}" for i, o in enumerate(options))
    return (
        f" This video's subtitles are listed below: \n{said}.\n Select the best answer to the following "
        "multiple-choice question based on the video and the subtitles. Respond with only the letter of the correct "
        f"option.\nQuestion: {record['question']}{lines}\n{DIRECTLY}\n"
    )


def virtual_times(duration_s: float, num_frames: int = VIRTUAL_FRAMES) -> list[float]:
    """Times of the virtual frames: one a second, or `num_frames` evenly for longer films."""
    if duration_s > num_frames:
        return [duration_s / num_frames * i for i in range(num_frames)]
    return [float(i) for i in range(int(duration_s))]


def insert_subtitles(
    times: Sequence[float],
    subtitles: Sequence[Mapping[str, Any]],
    offset_s: float,
    duration_s: float,
    image: str | None = None,
) -> str:
    """Lines of the subtitles with a frame strictly inside (`insert_subtitles_into_frames`).

    A subtitle is either `timestamp` (two numbers, the second may be absent) and `text`, or `start`, `end` as
    "H:M:S.s" and `line`. One shorter than a second is widened to a second. With `image`, that word stands for each
    frame, before the first subtitle whose middle comes after it.
    """
    lines: list[str] = []
    shown = 0
    for entry in subtitles:
        if "timestamp" in entry:
            start, end = entry["timestamp"]
            end, text = (end if isinstance(end, float) and not math.isnan(end) else duration_s), entry["text"]
        else:
            start, end, text = clock_seconds(entry["start"]), clock_seconds(entry["end"]), entry["line"]
        start, end = start - offset_s, end - offset_s
        middle = (start + end) / 2
        while image is not None and shown < len(times) and times[shown] <= middle:
            lines.append(image)
            shown += 1
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < t < end for t in times):
            lines.append(text)
    if image is not None:
        lines += [image] * (len(times) - shown)
    return "\n".join(lines)


def clock_seconds(text: str) -> float:
    """Seconds of "H:M:S.s", or "H:M:S,s" as subtitle files write it."""
    hours, minutes, seconds = text.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def videomme(record: Mapping[str, Any]) -> str:
    """Video-MME without subtitles."""
    return f"{_videomme(_FRAMES_ONLY, record)}\n{DIRECTLY}"


def videomme_subtitles(record: Mapping[str, Any], srt: str | None) -> str:
    """Video-MME with subtitles: all lines of the file in one; None where the video has no file."""
    lines = [
        found.group(1)
        for line in (srt or "").splitlines()
        if (found := re.search(r'<font color="white" size=".72c">(.*?)</font>', line))
    ]
    head = "" if srt is None else "This video's subtitles are listed below: \n" + "\n".join(lines)
    return f"{head}\n{_videomme(_WITH_SUBTITLES if lines else _FRAMES_ONLY, record)}\nThe best answer is:"


def _videomme(instruction: str, record: Mapping[str, Any]) -> str:
    return f"{instruction}\nQuestion: {record['question']}\nOption:\n" + "\n".join(record["options"])


def charades(record: Mapping[str, Any]) -> str:
    """Charades-STA; captions end with a dot, so two follow."""
    return f"{CHARADES}{record['caption']}. Please return its start time and end time."
