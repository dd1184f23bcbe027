"""Text without video: conversations for the mixture, and the corpus a small tokenizer is trained on.

In: nothing. Out: annotation items; lines of text.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from data_pipeline.world.presets import PRESETS, Preset
from data_pipeline.world.questions import KINDS, ask, choose, conversation, listed
from data_pipeline.world.recipes import SPLITS, Look, in_proportion, make_scene
from data_pipeline.world.scene import COLOURS, DIGITS, SHAPES

_OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up", "first": "last", "yes": "no", "no": "yes"}
_TOLD = 1 << 24  # told films have numbers of their own
_SEEN_ONLY = ("when", "part", "caption", "blinks")  # what a caption does not tell
_FACTS: tuple[tuple[str, str], ...] = (
    *((f"Is {c} a colour or a shape?", "colour") for c in COLOURS),
    *((f"Is {s} a colour or a shape?", "shape") for s in SHAPES),
    *((f"What is the opposite of {a}?", b) for a, b in _OPPOSITES.items()),
    *((f"Which digit comes after {a}?", b) for a, b in itertools.pairwise(DIGITS)),
    *((f"Say {w}.", w) for w in (*COLOURS, *SHAPES)),
)


def text_items(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """Annotation items with text only: short facts about the world's own words."""
    items = []
    for i, k in enumerate(rng.integers(len(_FACTS), size=number)):
        question, answer = _FACTS[int(k)]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        items.append({"id": f"text_{i:05d}", "conversations": turns})
    return items


def told_items(preset: Preset, seed: int) -> list[dict[str, Any]]:
    """Annotation items about films that are told, not shown: the caption in words, then the same questions.

    What a language model knows before it sees: to follow hints, and to give the letter of the option it means. From
    films alone a small model learns neither in minutes (docs/nano.md).
    """
    look = Look(1, 1.0, preset.middle_s, preset.card_s, preset.contents, preset.written)
    items = []
    for i, recipe in enumerate(in_proportion(preset.middle_recipes, preset.told)):
        scene = make_scene(recipe, seed=seed, split=SPLITS[0], index=_TOLD + i, look=look)
        rng = np.random.default_rng((scene.seed, 5))
        weights = {kind: w for kind, w in preset.weights.items() if kind not in _SEEN_ONLY}
        caption = ask("caption", scene)
        questions = choose(
            scene, weights, rng, turns=preset.turns, choice_share=0.3, paper_share=0.6, think_share=preset.think_share
        )  # fmt: skip
        if caption and questions:
            turns = conversation(questions, media=f"The video shows {caption.answer}.\n")
            items.append({"id": f"told_{i:05d}", "conversations": turns})
    return items


def option_items(rng: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """Annotation items about lists of options alone: the letter of one, or the one of a letter."""
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    items = []
    for i in range(number):
        turns = []
        for _ in range(4):
            words = (tuple(COLOURS), SHAPES, captions)[int(rng.integers(3))]
            options = rng.choice(words, 4, replace=False).tolist()
            place = int(rng.integers(4))
            letter, option = "ABCD"[place], options[place]
            asked, answer = (f"Which option is {option}?", letter)
            if rng.uniform() < 0.25:
                asked, answer = (f"What is option {letter}?", option)
            turns.append({"from": "human", "value": f"Options: {listed(options)}\n{asked}"})
            turns.append({"from": "gpt", "value": answer})
        items.append({"id": f"options_{i:05d}", "conversations": turns})
    return items


def corpus(preset: str | Preset = "nano", *, scenes: int = 600) -> list[str]:
    """Lines of text as the model will meet them, for training a small tokenizer. Always the same lines."""
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    rng = np.random.default_rng(0)
    look = Look(contents=preset.contents, written=preset.written)
    lines = ["You are a helpful assistant.", "system", "user", "assistant"] * 50
    recipes = list(preset.recipes)
    for i in range(scenes):
        scene = make_scene(recipes[i % len(recipes)], seed=0, split=SPLITS[0], index=i, look=look)
        frames = int(rng.integers(1, 500)) * 4
        seconds = scene.duration_s if i % 2 else float(rng.uniform(1, 10_000))
        lines.append(f"The video lasts for {seconds:.2f} seconds, and {frames} frames are uniformly sampled from it.")
        for question in choose(
            scene, preset.weights, rng, turns=4, choice_share=preset.choice_share, paper_share=preset.paper_share,
            think_share=preset.think_share,
        ):  # fmt: skip
            lines += [question.text, question.answer]
    for question, answer in _FACTS:
        lines += [question, answer]
    for name, kind in KINDS.items():
        if name.rpartition("_")[2] in COLOURS and not preset.weights.get(name.partition("_")[0]):
            continue  # eight sentences that this world never asks
        # A word alone, and the same word inside a sentence, where a space comes before it.
        lines.append(kind.wording)
        lines += [text for answer in kind.answers for text in (answer, f"It is {answer}.")]
    return lines
