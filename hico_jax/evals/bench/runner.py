"""Ask a model every question once, and remember each answer at once, so that a stopped run goes on where it was.

Questions about one video are asked together: it is read and encoded once. Each process appends to a file of its own;
what any of them has answered is not asked again, whatever the number of processes was.

In: items and something that answers. Out: one JSON line a question.
Next: hico_jax/evals/bench/scores.py
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from data_pipeline.video import VideoError
from hico_jax.evals import journal
from hico_jax.evals.bench.tasks import Benchmark, Item, strict
from hico_jax.evals.needle import shuffled
from hico_jax.film import Film, Viewer
from hico_jax.generate import GenerationConfig


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer, and what it took."""

    text: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Answerer(Protocol):
    """Something that watches a video and answers questions about it."""

    def watch(self, item: Item) -> Any:
        """See the item's video.

        Raises:
          VideoError: it cannot be read.
        """
        ...

    def answer(self, seen: Any, item: Item, max_new_tokens: int) -> Reply:
        """Answer.

        Raises:
          ValueError: the prompt does not fit the model.
        """
        ...


# What is shown of a video: itself, or as a control its frames in an order that keeps none of its own, as many grey
# frames, or nothing.
SHOWN = ("film", "shuffled", "blank", "nothing")


class ModelAnswerer:
    """A `Viewer` that answers greedily, as the reference's scripts do; controls are shown something else (`SHOWN`)."""

    def __init__(self, viewer: Viewer, *, repetition_penalty: float = 1.0, shown: str = "film") -> None:
        if shown not in SHOWN:
            raise ValueError(f"what is shown is {shown!r}; it must be one of {', '.join(SHOWN)}")
        self.viewer, self.repetition_penalty, self.shown = viewer, repetition_penalty, shown

    def watch(self, item: Item) -> Film:
        if self.shown == "blank":
            return self.viewer.watch_grey(item.video, start=item.start, end=item.end, reader=item.reader)
        order = _mixed(item.video) if self.shown == "shuffled" else None
        return self.viewer.watch(item.video, start=item.start, end=item.end, reader=item.reader, order=order)

    def answer(self, seen: Film, item: Item, max_new_tokens: int) -> Reply:
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, repetition_penalty=self.repetition_penalty, eos=self.viewer.tokenizer.eos_ids
        )
        found = self.viewer.ask(None if self.shown == "nothing" else seen, item.prompt, config=config)
        facts = {
            "frames": seen.num_frames, "visual_tokens": found.visual_tokens, "prompt_tokens": found.prompt_tokens,
            "kept": list(found.kept), "answer_tokens": len(found.ids), "read_s": round(seen.read_s, 4),
            "encode_s": round(seen.encode_s, 4), "answer_s": round(found.seconds, 4),
        }  # fmt: skip
        return Reply(found.text, facts)


def _mixed(video: str) -> Callable[[int], Any]:
    """Another order for each video, the same in every run: by its name, not by the folder that it is in."""
    return lambda count: shuffled(count, zlib.crc32(pathlib.Path(video).name.encode()))


def run(
    benchmark: Benchmark,
    items: Sequence[Item],
    answerer: Answerer,
    folder: pathlib.Path,
    *,
    shard: tuple[int, int] = (0, 1),
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer this process's share of what no process has answered yet.

    Raises:
      ValueError: another process writes the same share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    videos = [list(group) for group in _by_video(items)]
    mine = [group for i, group in enumerate(videos) if i % shard[1] == shard[0]]
    with journal.Appending(folder / f"answers.{shard[0]}of{shard[1]}.jsonl") as file:
        done = {line["id"] for line in journal.read(folder)}
        count, total = sum(item.id in done for group in mine for item in group), sum(map(len, mine))
        tick(count, total)
        for group in mine:
            for line in _ask(benchmark, [item for item in group if item.id not in done], answerer):
                journal.add(file, line)
                count += 1
                tick(count, total)


def _by_video(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Items grouped by what is watched, in the order in which each first comes."""
    key = lambda item: (item.video, item.start, item.end, item.reader)
    order = {k: i for i, k in enumerate(dict.fromkeys(map(key, items)))}
    for _, group in itertools.groupby(sorted(items, key=lambda item: order[key(item)]), key=key):
        yield group


def _ask(benchmark: Benchmark, items: Sequence[Item], answerer: Answerer) -> Iterator[dict[str, Any]]:
    seen: Any = None
    failed: tuple[str, str] | None = None
    for item in items:
        if item.fault:
            yield _line(benchmark, item, Reply(""), "invalid", item.fault)
            continue
        if seen is None and failed is None:
            try:
                seen = answerer.watch(item)
            except VideoError as error:
                failed = "unreadable", str(error)
            except ValueError as error:  # more frames than the model has room for
                failed = "too long", str(error)
        if failed is not None:
            yield _line(benchmark, item, Reply(""), *failed)
            continue
        try:
            reply = answerer.answer(seen, item, benchmark.max_new_tokens)
        except ValueError as error:  # the row does not fit
            yield _line(benchmark, item, Reply(""), "too long", str(error))
            continue
        yield _line(benchmark, item, reply, "answered" if reply.text.strip() else "empty", item.note)


def _line(benchmark: Benchmark, item: Item, reply: Reply, status: str, note: str) -> dict[str, Any]:
    """What is kept of one question. Without an answer there is nothing to judge, and nothing is guessed.

    `status` is "answered", "empty" (answered with nothing), "unreadable" (the video), "too long" (the prompt) or
    "invalid" (the annotation).
    """
    nothing = {"parsed": None, "score": 0.0, "note": ""}
    line = {
        "id": item.id, "source": item.source, "groups": dict(item.groups), "video": item.video, "prompt": item.prompt,
        "options": list(item.options), "expected": item.span or item.expected, "key": item.key, "answer": reply.text,
        "status": status, "note": note, "reference": nothing, "strict": nothing,
    }  # fmt: skip
    if status in ("answered", "empty"):
        line["reference"] = dataclasses.asdict(benchmark.reference(item, reply.text))
        line["strict"] = dataclasses.asdict((benchmark.own or strict)(item, reply.text))
    return line | reply.facts


def finished(folder: pathlib.Path, items: Sequence[Item]) -> list[dict[str, Any]] | None:
    """The answers in the order of the items; None while some are missing."""
    found = {line["id"]: line for line in journal.read(folder)}
    if any(item.id not in found for item in items):
        return None
    return [found[item.id] for item in items]
