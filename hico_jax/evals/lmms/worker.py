"""Answers questions that arrive as JSON lines, for a program in another environment.

    python -m hico_jax.evals.lmms.worker MODEL MAX_FRAMES [DROP [REPETITION_PENALTY]]

In: one JSON object a line (video, prompt, max_new_tokens, and start, end, reader where a part is meant). Out: one JSON
object a line; a video that cannot be read is answered with nothing, and said on stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from data_pipeline.tokenizer import load_tokenizer
from hico_jax import ask, film
from hico_jax.batch import DropSchedule
from hico_jax.evals.bench import command, runner, tasks
from hico_jax.options import parse_drop


def main(arguments: list[str]) -> int:
    """Load, say that it is ready, answer until the other side closes."""
    folder, max_frames, *rest = arguments
    drop = rest[0] if rest else "none"
    model, tokenizer_folder = ask.load_model(folder)
    if drop != "none":
        model = ask.with_drop(model, DropSchedule(*parse_drop(drop)))
    sampling = ask.whole_clips(command.sampling_of(int(max_frames)), model)
    penalty = float(rest[1]) if len(rest) > 1 and rest[1] else command.shipped_penalty(folder)
    viewer = film.Viewer(model, load_tokenizer(tokenizer_folder), sampling=sampling)
    out, sys.stdout = sys.stdout, sys.stderr  # whatever prints must not come between the lines
    serve(runner.ModelAnswerer(viewer, repetition_penalty=penalty), sys.stdin, out)
    return 0


def serve(answerer: runner.Answerer, lines: Iterable[str], out: TextIO) -> None:
    """Answer line by line. A video is watched once while questions about it follow each other."""
    _say(out, {"ready": True})
    key: Any = None
    seen: Any = None
    for line in lines:
        request = json.loads(line)
        item = tasks.Item(
            id=str(request["id"]), source="", groups={}, video=request["video"], prompt=request["prompt"],
            start=request.get("start"), end=request.get("end"), reader=request.get("reader"),
        )  # fmt: skip
        try:
            if key != (item.video, item.start, item.end, item.reader):
                key, seen = None, answerer.watch(item)
                key = (item.video, item.start, item.end, item.reader)
            text = answerer.answer(seen, item, int(request["max_new_tokens"])).text
        except ValueError as error:  # an unreadable video, or more than fits
            print(f"hico_jax: {error}; answered with nothing", file=sys.stderr)
            text = ""
        _say(out, {"id": request["id"], "text": text})


def _say(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
