"""Something that answers questions without a model."""

from __future__ import annotations

import hashlib
import pathlib

from data_pipeline.video import VideoError
from hico_jax.evals.bench import runner, tasks


class Parrot:
    """Answers from the prompt's hash; counts what it was asked; may be stopped after some answers."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.watched: list[str] = []
        self.stop_after = stop_after

    def watch(self, item: tasks.Item) -> str:
        self.watched.append(item.video)
        if not pathlib.Path(item.video).exists():
            raise VideoError(f"{item.video}: no such file")
        return item.video

    def answer(self, seen: str, item: tasks.Item, max_new_tokens: int) -> runner.Reply:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(item.id)
        name = pathlib.Path(seen).name  # where the tests keep it is another place in every run
        said = hashlib.sha256(f"{item.prompt}{name}".encode()).digest()[0]
        if item.span is not None:
            return runner.Reply(f"The event happens in the {said % 3}.0 - {said % 5 + 3}.0 seconds.")
        return runner.Reply(("A", "B.", "(C)", "I do not know", "")[said % 5], {"frames": 8})
