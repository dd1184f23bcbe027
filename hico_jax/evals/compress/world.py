"""Questions of the made-up world by kind of task, as items of a benchmark.

In: a folder and a seed. Out: films, and `Item`s whose answers are single words.
"""

from __future__ import annotations

import pathlib

from data_pipeline.world import films
from data_pipeline.world.questions import KINDS, Question, ask_all
from data_pipeline.world.recipes import Look, make_scene
from data_pipeline.world.scene import Scene
from hico_jax.evals.bench.tasks import Benchmark, Item, Verdict

# Which questions belong to which kind of task. Kinds named by a prefix end in a colour.
TASKS = {
    "appearance": ("card_colour", "card_shape"), "order": ("first_colour", "second_colour", "order_"),
    "motion": ("direction",), "counting": ("count_shapes",), "grounding": ("when", "part"), "multi-hop": ("chain_",),
}  # fmt: skip
RECIPES = {"card": ("appearance", "grounding"), "two_cards": ("order",), "mover": ("motion",), "count": ("counting",)}


def _judge(item: Item, answer: str) -> Verdict:
    said = answer.strip().removesuffix(".").lower()
    return Verdict(said, float(said == item.expected.lower()))


BENCHMARK = Benchmark("world", "The made-up world", (), lambda *_: {}, _judge, "world", 6, own=_judge)


CHAIN_S = (16.0, 32.0)  # room for four to eight cards


def items(folder: pathlib.Path, number: int, seconds: int, seed: int, chains: int = 0) -> list[Item]:
    """`number` films of each recipe, and as many long ones with a card anywhere; training never shows any of them.

    `chains` films more hold a chain of hints amid the cards of another, so that its last card must be reached.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Item] = []
    for i in range(number):
        placed = films.needles(seed + i, seconds, split="val")
        path = folder / f"long_{seconds}s_{seed + i}.mp4"
        scene = films.haystack(path, num_seconds=seconds, seed=seed + i, needles=placed, split="val").scene
        found += _items(path, scene, ("appearance", "grounding"), f"long{i}")
        for recipe, tasks in RECIPES.items():
            scene = make_scene(recipe, seed=seed, split="val", index=i, look=Look(seconds=(8.0, 8.0)))
            path = folder / f"{recipe}_{seed}_{i}.mp4"
            if not path.is_file():
                films.write_scene(path, scene)
            found += _items(path, scene, tasks, f"{recipe}{i}")
    for i in range(chains):
        scene = make_scene("two_chains", seed=seed, split="val", index=i, look=Look(seconds=CHAIN_S))
        path = folder / f"chains_{seed}_{i}.mp4"
        if not path.is_file():
            films.write_scene(path, scene)
        found += _items(path, scene, ("multi-hop",), f"chains{i}")
    return found


def _items(path: pathlib.Path, scene: Scene, tasks: tuple[str, ...], name: str) -> list[Item]:
    return [
        Item(
            id=f"{name}/{q.kind}", source=str(path), groups={"task": task, "kind": _kind(q)}, video=str(path),
            prompt=q.text, options=KINDS[q.kind].answers, expected=q.answer,
        )
        for q in ask_all(scene) for task in tasks if q.kind.startswith(TASKS[task])
    ]  # fmt: skip


def _kind(question: Question) -> str:
    """The kind without the colour that it is about."""
    named = question.kind.startswith(("order_", "chain_"))
    return question.kind.rsplit("_", 1)[0] if named else question.kind


def chance(found: list[Item]) -> float:
    """What guessing scores: the mean of one over the number of possible answers."""
    return sum(1 / len(item.options) for item in found) / len(found)
