"""Watch a film once, ask about it as often as you like.

In: a path and a model. Out: the film's visual tokens (`Film`), then answers with what each step took. Frames are
read ahead, resized, encoded and let go a few clips at a time, so memory grows with the film's visual tokens only.
Next: hico_jax/generate.py
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline import chat, layout, video
from data_pipeline.buckets import ladder
from data_pipeline.frames import Sampling, time_message
from data_pipeline.tokenizer import Tokenizer
from hico_jax import generate
from hico_jax.batch import Batch
from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo
from hico_jax.shapes import Array, Float, Int, UInt8, ndarray

INFERENCE = Sampling("dynamic_fps1", 64, 512, 8)  # what `chat` of the released models uses
READING = 4  # pieces of a film that are decoded at the same time, where there are cores
UIDS = itertools.count(1)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Film:
    """A watched film: its visual tokens on the device, and what was seen."""

    path: str
    visual: Float[Array, "1 S D"]  # padded to a bucket; `num_clips` says how much is real
    indices: Int[ndarray, " T"]  # which frames were seen
    fps: float
    duration_s: float
    num_clips: int
    read_s: float  # waiting for frames: decoding and resizing beyond what happens while clips are encoded
    encode_s: float  # tower, merging and projector
    uid: int = dataclasses.field(default_factory=UIDS.__next__)  # tells equal-looking media apart

    @property
    def num_frames(self) -> int:
        return len(self.indices)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was said, and what it took."""

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int  # text and visual tokens of the row
    visual_tokens: int
    kept: tuple[int, ...]  # visual tokens alive after each stage of video-level compression
    seconds: float  # prefill and decoding


class Viewer:
    """A model, its tokenizer, and how frames are chosen.

    `clips_per_step` clips are encoded at once; it bounds memory and is the one shape the tower is compiled for.
    """

    def __init__(
        self, model: HiCo, tokenizer: Tokenizer, *, sampling: Sampling = INFERENCE, clips_per_step: int = 16
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.geometry = model.config.geometry()
        self.clips_per_step = clips_per_step

    def watch(
        self,
        path: str | os.PathLike[str],
        *,
        start: float | None = None,
        end: float | None = None,
        reader: str | None = None,
        order: Int[ndarray, " T"] | Callable[[int], Int[ndarray, " T"]] | None = None,
    ) -> Film:
        """Read and encode a film, or its part in seconds.

        `order` permutes the chosen frames, as a control: indices, or what makes them from the number of frames.

        Raises:
          VideoError: the file cannot be read.
          ValueError: the frames do not make whole clips, or are more than the model has room for.
        """
        indices, fps, duration = self._choose(path, start, end, reader)
        if callable(order):
            order = order(len(indices))
        return self.assemble(path, ahead(self._chunks(path, indices, order)), indices, fps, duration)

    def watch_grey(
        self,
        path: str | os.PathLike[str],
        *,
        start: float | None = None,
        end: float | None = None,
        reader: str | None = None,
    ) -> Film:
        """As many grey frames as `watch` would see: a control with every visual token and nothing to see in it.

        Raises:
          VideoError, ValueError: as `watch`.
        """
        indices, fps, duration = self._choose(path, start, end, reader)
        step, px = self.clips_per_step * self.geometry.frames_per_clip, self.geometry.image_px
        grey = (np.full((min(step, len(indices) - i), px, px, 3), 128, np.uint8) for i in range(0, len(indices), step))
        return self.assemble(path, grey, indices, fps, duration)

    def _choose(
        self, path: str | os.PathLike[str], start: float | None, end: float | None, reader: str | None
    ) -> tuple[Int[ndarray, " T"], float, float]:
        """Which frames are seen, the film's rate and length in seconds."""
        info = video.open_video(path, reader)
        indices, duration = video.choose(info, self.sampling, start=start, end=end)
        self.check_room(path, layout.Visual.film(len(indices), self.geometry).num_clips)
        return indices, info.fps, duration

    def assemble(
        self,
        path: str | os.PathLike[str],
        chunks: Iterable[UInt8[ndarray, "T height width 3"]],
        indices: Int[ndarray, " T"],
        fps: float,
        duration: float,
        run: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    ) -> Film:
        """A film of frames that somebody reads, `clips_per_step` clips at a time. `run` does the work on the device."""
        clips, read_s, encode_s, parts = len(indices) // self.geometry.frames_per_clip, 0.0, 0.0, []
        began = time.perf_counter()
        for frames in chunks:
            read_s += time.perf_counter() - began
            began = time.perf_counter()
            parts.append(run(lambda frames=frames: jax.block_until_ready(self._encode(frames))))
            encode_s += time.perf_counter() - began
            began = time.perf_counter()
        per_clip = self.geometry.tokens_per_clip
        room = ladder(clips, 4) * per_clip
        visual = jnp.concatenate(parts, axis=1)[:, :room]
        visual = jnp.pad(visual, ((0, 0), (0, room - visual.shape[1]), (0, 0)))
        return Film(os.fspath(path), visual, indices, fps, duration, clips, read_s, encode_s)

    def _chunks(
        self, path: str | os.PathLike[str], indices: Int[ndarray, " T"], order: Int[ndarray, " T"] | None
    ) -> Iterator[UInt8[ndarray, "T height width 3"]]:
        """Frames of `clips_per_step` clips at a time, in the order the model sees them."""
        step = self.clips_per_step * self.geometry.frames_per_clip
        size = (self.geometry.image_px, self.geometry.image_px)
        if order is None and (np.diff(indices) >= 0).all():
            yield from video.iter_frames(path, indices, size, step, workers=min(READING, os.cpu_count() or 1))
            return
        wanted = indices if order is None else indices[order]
        whole = np.argsort(wanted, kind="stable")
        frames = np.concatenate(list(video.iter_frames(path, wanted[whole], size, step)))
        shown = np.empty_like(frames)
        shown[whole] = frames
        for first in range(0, len(shown), step):
            yield shown[first : first + step]

    def _encode(self, frames: UInt8[ndarray, "T height width 3"]) -> Float[Array, "1 S D"]:
        """Visual tokens of a chunk; a short one is padded with black clips, whose tokens are cut off again."""
        count = len(frames) // self.geometry.frames_per_clip
        clips = np.zeros((1, self.clips_per_step, self.geometry.frames_per_clip, *frames.shape[1:]), np.uint8)
        clips[0, :count] = frames.reshape(count, self.geometry.frames_per_clip, *frames.shape[1:])
        none = np.zeros((1, 0, *frames.shape[1:]), np.uint8)
        return encode(self.model, clips, none)[:, : count * self.geometry.tokens_per_clip]

    def check_room(self, path: str | os.PathLike[str], clips: int) -> None:
        tokens = clips * self.geometry.tokens_per_clip
        if tokens >= self.geometry.max_length:
            raise ValueError(
                f"{os.fspath(path)}: {clips * self.geometry.frames_per_clip} frames make {tokens} visual tokens but "
                f"the model has room for {self.geometry.max_length}; ask for fewer frames with --max-frames"
            )

    def ask(
        self,
        film: Film | None,
        question: str,
        *,
        history: Sequence[Mapping[str, str]] = (),
        config: GenerationConfig | None = None,
    ) -> Answer:
        """Answer one question; None asks without a film. `history` holds earlier turns as role and content."""
        return self.ask_many([film], [question], history=history, config=config)[0]

    def ask_many(
        self,
        films: Sequence[Film | None],
        questions: Sequence[str],
        *,
        history: Sequence[Mapping[str, str]] = (),
        config: GenerationConfig | None = None,
    ) -> list[Answer]:
        """Answer `questions[b]` about `films[b]`, all in one batch. Films of one size cost least."""
        config = config or GenerationConfig(eos=self.tokenizer.eos_ids)
        rows = [self.row(f, q, history) for f, q in zip(films, questions, strict=True)]
        began = time.perf_counter()
        made = generate.generate(self.model, self.prompt(rows, films), config)
        seconds = time.perf_counter() - began
        answers = []
        for b, row in enumerate(rows):
            ids = made.ids[b, : made.lengths[b]].tolist()
            visual = int((row.slots >= 0).sum())
            answers.append(
                Answer(
                    text=chat.clean_answer(self.tokenizer, ids),
                    ids=tuple(ids),
                    prompt_tokens=len(row),
                    visual_tokens=visual,
                    kept=self.geometry.drop.kept(visual),
                    seconds=seconds / len(rows),
                )
            )
        return answers

    def row(self, film: Film | None, question: str, history: Sequence[Mapping[str, str]] = ()) -> layout.Row:
        """The prompt of one question: what the released model's `chat` renders."""
        turns = [dict(turn) for turn in (*history, {"role": "user", "content": question})]
        internvl, visuals = self.model.config.llm.arch == "internlm2", []
        if film is not None:
            first = turns[0]["content"]
            if internvl:  # it names every frame, and its clips' tokens are dealt out over them
                turns[0]["content"] = chat.frames_question(first, film.num_frames)
            else:
                message = time_message(film.duration_s, film.indices, film.fps)
                turns[0]["content"] = chat.first_question(first, message)
            visuals = [layout.Visual(num_clips=film.num_clips, parts=film.num_frames if internvl else 1)]
        ids = chat.prompt_ids(self.tokenizer, turns, template="internvl2_5" if internvl else "qwen_2")
        return layout.row(ids, None, visuals, self.geometry)

    def prompt(self, rows: Sequence[layout.Row], films: Sequence[Film | None]) -> tuple[Batch, Float[Array, "B S D"]]:
        """Rows and visual tokens padded to a few shapes, so that one compilation serves many questions."""
        length = min(ladder(max(map(len, rows)), 64), self.geometry.max_length)
        num_clips = max((ladder(f.num_clips, 4) for f in films if f is not None), default=0)
        batch = layout.collate(
            rows, self.geometry, length, num_clips, training=False, pixels=False, drop_multiple=32
        )  # fmt: skip
        width = num_clips * self.geometry.tokens_per_clip
        blank = jnp.zeros((1, width, self.model.config.llm.embed_dim), jnp.dtype(self.model.config.dtype))
        visual = [
            blank if f is None else jnp.pad(f.visual, ((0, 0), (0, width - f.visual.shape[1]), (0, 0))) for f in films
        ]
        return batch, jnp.concatenate(visual)


def ahead(items: Iterable[T], most: int = 2) -> Iterator[T]:
    """The same items, made by a thread of its own while the last one is used; at most `most` wait.

    So decoding a film costs no time beside a tower that is slower. What the thread raises is raised here.
    """
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(most)
    stop, end = threading.Event(), object()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                made.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:
            put(end, error)

    thread = threading.Thread(target=work, daemon=True, name="reading ahead")
    thread.start()
    try:
        while (got := made.get())[0] is not end:
            yield got[0]
        if got[1] is not None:
            raise got[1]
    finally:
        stop.set()
        thread.join()


@jax.jit
def encode(
    model: HiCo, clips: UInt8[Array, "B N T height width 3"], images: UInt8[Array, "B I height width 3"]
) -> Float[Array, "B S D"]:
    """`HiCo.encode`, compiled once for each shape."""
    return model.encode(clips, images)


def timings(film: Film, answer: Answer) -> dict[str, Any]:
    """What `hico ask` prints below an answer."""
    return {
        "frames": film.num_frames, "film_s": round(film.duration_s, 2), "read_s": round(film.read_s, 3),
        "encode_s": round(film.encode_s, 3), "visual_tokens": answer.visual_tokens,
        "kept": list(answer.kept), "answer_s": round(answer.seconds, 3),
    }  # fmt: skip
