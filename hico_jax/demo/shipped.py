"""The demo's first act: the model that ships with the package is asked about a film it never saw.

In: a folder and a seed. Out: answers on the terminal, `film.mp4`, `film.png`, `answers.json`, `report.html`.
Next: hico_jax/demo/story.py
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import numpy as np

from data_pipeline import video
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.world import sheet
from hico_jax import ask
from hico_jax.demo import measure
from hico_jax.evals import needle
from hico_jax.film import Viewer
from hico_jax.report import page

NAME = "nano"
SECONDS, DEPTH = 96, 0.62
KINDS = ("card_colour", "card_shape")
SEED = 90_000  # of the films, far from those the training demo uses


def first_answer(out: pathlib.Path, seed: int, began: float) -> dict[str, Any]:
    """Hide a card in a film, watch it, answer, and say what is true. `began` is when the command was."""
    print(f"A film of {SECONDS} s is drawn and encoded; a card is hidden in it for 4 s ...", flush=True)
    hidden = needle.hide(out, SECONDS, DEPTH, seed + SEED)
    path = out / "film.mp4"
    pathlib.Path(hidden.film.path).replace(path)
    print(f"The shipped model `{NAME}` watches it (the first time compiles) ...", flush=True)
    model, tokenizer = ask.load_model(NAME)
    viewer = Viewer(model, load_tokenizer(tokenizer), sampling=measure.WHOLE)
    film = viewer.watch(path)
    trials = list(needle.ask(viewer, hidden, film, kinds=KINDS))
    first_s = time.monotonic() - began
    blind = list(needle.ask(viewer, hidden, None, kinds=KINDS))
    card = hidden.film.scene.cards[0]
    for trial in trials:
        print(f"\n  question  {trial.question}\n  answer    {trial.answer}")
        print(f"  truth     {trial.expected} ({'right' if trial.correct else 'wrong'})")
    tokens = trials[0].visual_tokens
    print(f"\n{first_s:.1f} s from the command to these answers; {film.num_frames} frames as {tokens} visual tokens.")
    result = {
        "model": NAME, "trials": measure.records(trials), "blind": measure.records(blind), "first_s": first_s,
        "film_s": film.duration_s, "frames": film.num_frames, "visual_tokens": tokens,
        "card": f"{card.colour} {card.content}", "card_s": [card.start_s, card.end_s],
    }  # fmt: skip
    (out / "answers.json").write_text(json.dumps(result, indent=1) + "\n")
    _sheet(out / "film.png", path, int(card.start_s))
    page.write(_report(result, trials, blind), out / "report.html")
    print(f"The film, the answers and a page are in {out}. Ask it yourself:")
    print(f'  hico ask {path} "What colour is the card?" --model {NAME} --max-frames {SECONDS}')
    print("To see one learn from nothing (about ten minutes on two cores): hico demo --train")
    return result


def _sheet(target: pathlib.Path, path: pathlib.Path, card_s: int) -> None:
    spread = np.linspace(0, SECONDS - 1, 12).astype(int).tolist()
    shown = sorted({*spread, card_s + 1, card_s + 2})
    frames = np.concatenate(list(video.iter_frames(path, shown)))
    marked = [shown.index(card_s + 1), shown.index(card_s + 2)]
    sheet.contact_sheet(frames, [f"{second} s" for second in shown], columns=7, marked=marked).save(target)


def _report(result: dict[str, Any], trials: list[needle.Trial], blind: list[needle.Trial]) -> page.Report:
    rows = [
        [t.question, t.answer, t.expected, {"text": "right" if t.correct else "wrong", "tone": "good" if t.correct
         else "bad"}, b.answer]
        for t, b in zip(trials, blind, strict=True)
    ]  # fmt: skip
    return {
        "title": "An answer from the model that ships",
        "lead": f"`{NAME}` was trained from nothing by this project's own stages. It was asked about a film that it "
        "never saw, drawn from a seed and encoded as H.264.",
        "facts": [
            {"value": f"{sum(t.correct for t in trials)} of {len(trials)}", "label": "answers right"},
            {"value": f"{result['first_s']:.0f} s", "label": "from the command to the answers"},
            {"value": f"{result['visual_tokens']:,}", "label": f"visual tokens for {result['frames']} frames"},
        ],
        "sections": [
            {
                "title": "Questions and answers",
                "text": f"The card ({result['card']}) is shown from {result['card_s'][0]:g} s to "
                f"{result['card_s'][1]:g} s. One film is an example, not a score: docs/nano.md has those.",
                "blocks": [
                    {
                        "kind": "table", "columns": ["question", "answer", "truth", "", "without the film"],
                        "rows": rows, "source": "answers.json",
                    },
                    {"kind": "image", "src": "film.png", "alt": "Frames of the film; those with the card are marked."},
                ],
            }
        ],
    }  # fmt: skip
