"""OpenAI's chat completions as far as a video model can speak them: requests in, one sentence about what is wrong out.

Media stand before the text of their turn, as the model was trained. Greedy unless a temperature is given.
In: a JSON body. Out: a `Chat`. Nothing here knows the server.
Next: hico_jax/serve/app.py
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.tokenizer import IMAGE_TEXT
from hico_jax.generate import GenerationConfig
from hico_jax.serve.sampling import TOP

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS, MOST_MESSAGES = 4, 256


class ApiError(Exception):
    """An answer in OpenAI's error shape; with 429, after how many seconds to try again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Part:
    """A film or a picture that a turn shows."""

    kind: str  # "image_url", "video_url" or "file"
    url: str
    start: float | None = None  # seconds; of a video
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message."""

    role: str
    text: str
    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chat:
    """A request that makes sense."""

    model: str
    turns: tuple[Turn, ...]
    settings: GenerationConfig
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # in the last event of a stream
    log_probs: bool
    top_log_probs: int
    attention: bool


def parse(body: Any, *, eos: tuple[int, ...], max_new_tokens: int, max_media: int) -> Chat:
    """Check a request.

    Raises:
      ApiError: what is wrong with it.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    _refuse(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    if len(messages) > MOST_MESSAGES:
        raise ApiError(400, f"there are {len(messages)} messages; at most {MOST_MESSAGES} are taken", param="messages")
    turns = tuple(_turn(i, message) for i, message in enumerate(messages))
    if any(turn.role == "system" for turn in turns[1:]):
        raise ApiError(400, "only the first message may have the role system", param="messages")
    if turns[-1].role != "user":
        raise ApiError(400, "the last message must have the role user", param="messages")
    if sum(len(turn.parts) for turn in turns) > max_media:
        raise ApiError(400, f"at most {max_media} videos and pictures are taken in one request", param="messages")
    most = _get(body, "max_completion_tokens", body.get("max_tokens"))
    limit = min(512, max_new_tokens) if most is None else _number("max_tokens", most, 1, max_new_tokens, whole=True)
    temperature = _number("temperature", _get(body, "temperature", 0), 0, 2)
    own = body.get("hico")
    if own is not None and not isinstance(own, dict):
        raise ApiError(400, "hico must be an object", param="hico")
    settings = GenerationConfig(
        max_new_tokens=int(limit), do_sample=temperature > 0, temperature=temperature or 1.0,
        top_k=int(_number("top_k", _get(body, "top_k", 0), 0, 2**31 - 1, whole=True)),
        top_p=_number("top_p", _get(body, "top_p", 1), 0, 1, above=True),
        repetition_penalty=_number("repetition_penalty", _get(body, "repetition_penalty", 1), 0, 10, above=True),
        seed=int(_number("seed", _get(body, "seed", 0), -(2**63), 2**63 - 1, whole=True)) % 2**31, eos=eos,
    )  # fmt: skip
    top = int(_number("top_logprobs", _get(body, "top_logprobs", 0), 0, TOP, whole=True))
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    return Chat(
        model=str(_get(body, "model", "")), turns=turns, settings=settings, stop=_stop(body.get("stop")),
        stream=_flag(body, "stream"), usage=bool((options or {}).get("include_usage")),
        log_probs=_flag(body, "logprobs"), top_log_probs=top, attention=bool((own or {}).get("attention")),
    )  # fmt: skip


def _get(body: Mapping[str, Any], name: str, other: Any) -> Any:
    value = body.get(name)
    return other if value is None else value


def _refuse(body: Mapping[str, Any]) -> None:
    """What others mean and we cannot do is an error, not ignored."""
    for name, fine in (
        ("n", (None, 1)), ("presence_penalty", (None, 0)), ("frequency_penalty", (None, 0)), ("logit_bias", (None, {})),
        ("tools", (None, [])), ("functions", (None, [])), ("audio", (None,)),
        ("response_format", (None, {"type": "text"})), ("modalities", (None, ["text"])),
    ):  # fmt: skip
        if not any(body.get(name) == one and type(body.get(name)) is not bool for one in fine):
            raise ApiError(400, f"{name} is not supported", param=name)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if value not in (None, True, False) or (isinstance(value, int | float) and not isinstance(value, bool)):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return bool(value)


def _number(name: str, value: Any, least: float, most: float, *, whole: bool = False, above: bool = False) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or (value == value and abs(value) > 2**64)
    wrong = wrong or math.isnan(value)
    if wrong or (whole and value != int(value)) or not least <= value <= most or (above and value == least):
        kind = "a whole number" if whole else "a number"
        raise ApiError(400, f"{name} must be {kind} {'above' if above else 'from'} {least} to {most}", param=name)
    return value if whole else float(value)


def _stop(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else [] if value is None else value
    fine = (
        isinstance(given, list)
        and len(given) <= MOST_STOPS
        and all(isinstance(s, str) and 0 < len(s) <= 256 for s in given)
    )
    if not fine:
        raise ApiError(400, f"stop must be a text or a list of at most {MOST_STOPS} texts", param="stop")
    return tuple(given)


def _turn(index: int, message: Any) -> Turn:
    param = f"messages[{index}]"
    if not isinstance(message, dict) or str(message.get("role")) not in ROLES:
        raise ApiError(400, f"{param} must be an object with a role of {', '.join(ROLES)}", param=param)
    role, content = ROLES[str(message["role"])], message.get("content")
    parts: list[Part] = []
    if isinstance(content, str):
        text = content
    elif isinstance(content, list) and content:
        texts = []
        for i, part in enumerate(content):
            found = _part(part, f"{param}.content[{i}]")
            (texts if isinstance(found, str) else parts).append(found)  # type: ignore[arg-type]
        text = "\n".join(texts)
    else:
        raise ApiError(400, f"{param}.content must be a text or a list of parts", param=param)
    if parts and role != "user":
        raise ApiError(400, f"{param} shows a video or picture; only messages of the role user may", param=param)
    if IMAGE_TEXT in text:
        raise ApiError(
            400, f"{param} contains {IMAGE_TEXT}, which marks where media stand; write it otherwise", param=param
        )
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ApiError(400, f"{param} holds half of a surrogate pair, which is no text", param=param)
    return Turn(role, text, tuple(parts))


def _part(part: Any, param: str) -> str | Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image_url", "video_url"):
        given = part.get(kind)
        given = {"url": given} if isinstance(given, str) else given
        if isinstance(given, dict) and isinstance(given.get("url"), str):
            start, end = (_seconds(given.get(name), f"{param}.{name}") for name in ("start", "end"))
            if start is not None and end is not None and end <= start:
                raise ApiError(400, f"{param} ends before it starts", param=param)
            return Part(kind, given["url"], start, end)
    if kind == "file" and isinstance(part.get("file"), dict) and isinstance(part["file"].get("file_id"), str):
        return Part("file", part["file"]["file_id"])
    raise ApiError(400, f"{param} must be a part of the type text, image_url, video_url or file", param=param)


def _seconds(value: Any, name: str) -> float | None:
    return None if value is None else float(_number(name, value, 0, 1e7))


def usage(prompt: int, reused: int, new: int) -> dict[str, Any]:
    """OpenAI's account of tokens."""
    return {
        "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": reused},
    }  # fmt: skip


def log_prob(token: str, value: float, top: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """One token of `logprobs.content`."""
    one = lambda text, p: {"token": text, "logprob": max(p, -9999.0), "bytes": list(text.encode())}
    return {**one(token, value), "top_logprobs": [one(text, p) for text, p in top]}
