"""Events of the engine to OpenAI's answers, whole or as a stream of server-sent events.

Beside OpenAI's fields, an answer carries `hico`: frames, tokens after each stage of compression, seconds, attention.
In: a request and its events. Out: JSON objects.
Next: hico_jax/serve/protocol.py
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from hico_jax.api import Model
from hico_jax.film import Film
from hico_jax.serve import protocol
from hico_jax.serve.engine import Ended, Spoke, Started, Ticket
from hico_jax.serve.meters import Meters
from hico_jax.serve.prompts import Prompt
from hico_jax.serve.protocol import ApiError, Chat
from hico_jax.serve.session import by_clip

REASONS = {"stop": "stop", "length": "length"}


class Reply:
    """One answer in the making."""

    def __init__(
        self, name: str, chat: Chat, prompt: Prompt, films: Sequence[Film], model: Model, meters: Meters
    ) -> None:
        self.name, self.chat, self.prompt, self.films = name, chat, prompt, films
        self.model, self.meters = model, meters
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.started: Started | None = None

    async def whole(self, events: AsyncIterator[Any]) -> dict[str, Any]:
        """The answer in one object.

        Raises:
          ApiError: it came to no end.
        """
        text, log_probs, ended = [], [], None
        async for event in events:
            if isinstance(event, Started):
                self._begin(event)
            elif isinstance(event, Spoke):
                text.append(event.text)
                if self.chat.log_probs:
                    log_probs.append(self._log_prob(event))
            else:
                text.append(event.text)
                ended = event
        assert ended is not None
        self._check(ended)
        choice = {
            "index": 0, "message": {"role": "assistant", "content": "".join(text), "refusal": None},
            "finish_reason": REASONS[ended.reason],
            "logprobs": {"content": log_probs, "refusal": None} if self.chat.log_probs else None,
        }  # fmt: skip
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self._usage(ended),
            "hico": self._hico(ended),
        }

    async def stream(self, events: AsyncIterator[Any], ticket: Ticket) -> AsyncIterator[str]:
        """The answer as events; who stops listening ends it."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            held: list[dict[str, Any]] = []  # tokens whose text has not come yet
            async for event in events:
                if isinstance(event, Started):
                    self._begin(event)
                elif isinstance(event, Spoke):
                    if self.chat.log_probs:
                        held.append(self._log_prob(event))
                    if event.text:
                        yield self._event({"content": event.text}, held)
                        held = []
                else:
                    if event.text or held:
                        yield self._event({"content": event.text}, held)
                    try:
                        self._check(event)
                    except ApiError as error:
                        yield f"data: {json.dumps(error.body())}\n\n"
                    else:
                        yield self._event({}, finish=REASONS[event.reason], hico=self._hico(event))
                        if self.chat.usage:
                            last = {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(event)}
                            yield f"data: {json.dumps(last)}\n\n"
                        yield "data: [DONE]\n\n"
        finally:
            ticket.cancel()

    def _begin(self, event: Started) -> None:
        self.started = event
        self.meters.first_token.observe(event.first_token_s)

    def _check(self, ended: Ended) -> None:
        self.meters.whole.observe(ended.seconds)
        if ended.reason == "deadline":
            raise ApiError(504, f"no end came within the time allowed; {ended.num_tokens} tokens had been said")
        if ended.reason not in REASONS:
            raise ApiError(503 if ended.reason == "cancelled" else 500, "the answer could not be finished; ask again")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _event(
        self, delta: dict[str, Any], log_probs: Sequence[Any] = (), finish: str | None = None, hico: Any = None
    ) -> str:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        if log_probs:
            choice["logprobs"] = {"content": list(log_probs), "refusal": None}
        event = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return f"data: {json.dumps(event if hico is None else {**event, 'hico': hico})}\n\n"

    def _log_prob(self, event: Spoke) -> dict[str, Any]:
        decode = lambda token: self.model.tokenizer.decode([token], skip_special=False)
        top = [(decode(token), p) for token, p in event.top[: self.chat.top_log_probs]]
        return protocol.log_prob(decode(event.token), event.log_prob, top)

    def _usage(self, ended: Ended) -> dict[str, Any]:
        reused = self.started.reused if self.started is not None else 0
        return protocol.usage(len(self.prompt), reused, ended.num_tokens)

    def _hico(self, ended: Ended) -> dict[str, Any]:
        started, geometry = self.started, self.model.geometry
        told: dict[str, Any] = {
            "visual_tokens": self.prompt.num_visual, "kept": list(self.prompt.kept),
            "films": [
                {"frames": f.num_frames, "duration_s": round(f.duration_s, 3), "read_s": round(f.read_s, 3),
                 "encode_s": round(f.encode_s, 3)} for f in self.films
            ],
            "seconds": round(ended.seconds, 4),
        }  # fmt: skip
        if started is not None:
            told |= {"waited_s": round(started.waited_s, 4), "first_token_s": round(started.first_token_s, 4)}
            if started.look is not None:
                clips = by_clip(started.look, self.prompt, self.films, geometry.tokens_per_clip)
                told["attention"] = [[round(w, 6) for w in film] for film in clips]
        return told


class Stream(StreamingResponse):
    """Server-sent events to a reader who may not stand still for longer than `patience_s`."""

    def __init__(self, content: AsyncIterator[str], patience_s: float, give_up: Callable[[], None]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.patience_s, self.give_up = patience_s, give_up

    async def stream_response(self, send: Any) -> None:
        async def patiently(message: Any) -> None:
            try:
                await asyncio.wait_for(send(message), self.patience_s)
            except TimeoutError:
                self.give_up()
                raise OSError("the reader stands still") from None

        try:
            await super().stream_response(patiently)
        finally:
            self.give_up()
