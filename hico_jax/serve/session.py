"""A film opened once, any number of questions: each costs its own tokens.

    import hico_jax
    from hico_jax.serve.session import Session

    model = hico_jax.load("runs/demo/model")
    talk = Session(model, "film.mp4")           # read, encoded and run through the language model once
    print(talk.ask("What happens?").text)       # questions that know nothing of each other
    print(talk.say("Who is there?").text)       # turns of one conversation
    print(talk.say("And in this picture?", media=["b.jpg"]).text)
    talk.save("film.session")                   # what was seen, said and computed
    print(Session.open(model, "film.session").say("When do they leave?").text)

Answers are those of `Model.ask` with the same history. In: a model and media. Out: `Reply`s.
Next: hico_jax/serve/pool.py
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.buckets import ladder
from data_pipeline.containers import PICTURE_SUFFIXES
from hico_jax.api import Model, Pictures
from hico_jax.film import Answer, Film
from hico_jax.generate import GenerationConfig
from hico_jax.serve import prompts, saved
from hico_jax.serve.pool import PIECE, Lane, Look, Pool, Ready
from hico_jax.serve.prompts import Media, Prompt
from hico_jax.serve.speech import Speech
from hico_jax.shapes import ndarray

Source = Media | str | os.PathLike[str] | Image.Image
ROOM = 1024  # tokens of a talk that fit behind the film before its lane is made anew


@dataclasses.dataclass(frozen=True)
class Reply(Answer):
    """An answer, and what the session saved and saw."""

    first_token_s: float = 0.0  # until the first token was chosen
    reused: int = 0  # tokens of the prompt that did not run again
    attention: tuple[tuple[float, ...], ...] = ()  # of each film's clips, where it was asked for; each film sums to 1


class Session:
    """What is seen and said, and the keys and values of it.

    Turns belong to the session (`say`), single questions do not (`ask`). A question that fails leaves it as it was.
    Layers behind an attention-guided drop run anew for every question, over what the drop leaves them.
    """

    def __init__(
        self, model: Model, *media: Source, settings: GenerationConfig | None = None, piece: int = PIECE, **watch: Any
    ) -> None:
        self.model, self.piece = model, piece
        self.settings = settings or GenerationConfig(eos=model.tokenizer.eos_ids)
        self.media: list[Media] = [self.look(one, **watch) for one in media]
        self.history: list[dict[str, Any]] = []
        self.pool: Pool | None = None

    def look(self, source: Source, **watch: Any) -> Media:
        """A film or a picture, seen once. What was seen already is passed on."""
        if isinstance(source, Film | Pictures):
            return source
        if isinstance(source, Image.Image) or os.fspath(source).lower().endswith(PICTURE_SUFFIXES):
            return self.model.look([source])
        return self.model.watch(source, **watch)

    def ask(self, question: str, **options: Any) -> Reply:
        """A question about what the session was opened with; nothing said before matters, nothing is kept."""
        return self._answer([self._turn(question, ())], **options)

    def say(self, question: str, media: Sequence[Source] = (), **options: Any) -> Reply:
        """The next turn of the talk, which may bring more films and pictures."""
        turn = {"role": "user", "content": question, "seen": tuple(self.look(one) for one in media)}
        told = [*self.history, turn]
        turns = [self._turn(told[0]["content"], told[0]["seen"]), *told[1:]]
        reply = self._answer(turns, **options)
        self.history += [turn, {"role": "assistant", "content": reply.text}]
        return reply

    def prepare(self) -> None:
        """Run what is seen through the language model now, so that the first question does not wait for it."""
        for _ in self._stream(self._prompt([self._turn("", ())]), dataclasses.replace(self.settings, max_new_tokens=1)):
            pass

    def forget(self) -> None:
        """Begin the talk anew; what was seen stays."""
        self.history = []

    def save(self, folder: str | os.PathLike[str], *, keys: bool = True) -> None:
        """Write the session; with `keys` also its keys and values, so that nothing runs again when it is reopened."""
        lane = self.pool.lanes[0] if self.pool is not None else None
        saved.write(folder, self.model, self.media, self.history, self.pool if keys else None, lane)

    @classmethod
    def open(cls, model: Model, folder: str | os.PathLike[str], *, settings: GenerationConfig | None = None) -> Session:
        """A saved session.

        Raises:
          ValueError: the folder holds none, a damaged one, or one of another model.
        """
        session = cls(model, settings=settings)
        session.media, session.history, held = saved.read(folder, model)
        if held is not None:
            session.pool = held.pool(model.hico, session.piece)
        return session

    def _turn(self, question: str, seen: Sequence[Media]) -> dict[str, Any]:
        return {"role": "user", "content": question, "seen": (*self.media, *seen)}

    def _prompt(self, turns: Sequence[dict[str, Any]]) -> Prompt:
        row, media = self.model.row(turns)
        return prompts.prompt(row, media, self.model.geometry)

    def _answer(
        self, turns: Sequence[dict[str, Any]], *, settings: GenerationConfig | None = None, stop: Sequence[str] = (),
        attention: bool = False, on_text: Callable[[str], None] | None = None,
    ) -> Reply:  # fmt: skip
        settings = settings or self.settings
        prompt, began = self._prompt(turns), time.perf_counter()
        speech, first, reused, look = Speech(self.model.tokenizer, stop), 0.0, 0, None
        for token, ready in self._stream(prompt, settings, attention):
            if ready is not None:
                first, reused, look = time.perf_counter() - began, ready.reused, ready.look
            text = speech.push(token)
            if on_text is not None and text:
                on_text(text)
            if speech.stopped:
                break
        text = speech.finish()
        if on_text is not None and text:
            on_text(text)
        films = [one for turn in turns for one in turn.get("seen", ()) if isinstance(one, Film)]
        return Reply(
            text=speech.text, ids=tuple(speech.ids), prompt_tokens=len(prompt), visual_tokens=prompt.num_visual,
            kept=prompt.kept, seconds=time.perf_counter() - began, first_token_s=first, reused=reused,
            attention=by_clip(look, prompt, films, self.model.geometry.tokens_per_clip) if look is not None else (),
        )  # fmt: skip

    def _stream(self, prompt: Prompt, settings: GenerationConfig, look: bool = False) -> Iterator[tuple[int, Any]]:
        """Tokens as they come; the first one with what the pool says of the prompt."""
        pool, lane = self._lane(prompt, settings)
        try:
            *_, ready = pool.fill(lane, prompt, look=look)
            assert isinstance(ready, Ready)
            token, steps = int(pool.first(lane, ready, settings).ids[0]), 1
            yield token, ready
            while token not in settings.eos and steps < settings.max_new_tokens:
                token = int(pool.step([lane], [token], [settings], [steps]).ids[0])
                steps += 1
                yield token, None
        finally:
            pool.leave(lane)

    def _lane(self, prompt: Prompt, settings: GenerationConfig) -> tuple[Pool, Lane]:
        """The session's lane, made anew where a longer conversation needs a longer one."""
        needed = len(prompt) + settings.max_new_tokens
        if self.pool is None or self.pool.capacity < needed:
            text = len(prompt) - prompt.num_visual + settings.max_new_tokens + ROOM
            self.pool = Pool(
                self.model.hico, count=1, capacity=ladder(needed + ROOM, 64), piece=self.piece, text_room=text
            )
        self.pool.check(prompt, settings.max_new_tokens)
        return self.pool, self.pool.lanes[0]


def by_clip(look: Look, prompt: Prompt, films: Sequence[Film], per_clip: int) -> tuple[tuple[float, ...], ...]:
    """Attention summed over each clip's tokens, film by film; each film's numbers sum to 1."""
    whole: ndarray = np.zeros(sum(f.num_clips for f in films))
    clips = prompt.slots[look.origins] // per_clip
    inside = clips < len(whole)
    np.add.at(whole, clips[inside], look.weights[inside])
    parts = np.split(whole, np.cumsum([f.num_clips for f in films])[:-1]) if films else []
    return tuple(tuple((part / (part.sum() or 1.0)).tolist()) for part in parts)
