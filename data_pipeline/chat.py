"""A conversation to ids and labels, and a question to a prompt.

In: turns of text with `<image>` where media stand. Out: ids with one placeholder (-200) per visual, and labels
with -100 where nothing is learnt. Training and inference write the time message with different whitespace; the
released models were trained and are used that way, so both are kept.
Next: data_pipeline/layout.py
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from data_pipeline.tokenizer import IMAGE_TEXT, Tokenizer, encode_guarded, encode_media, guard
from hico_jax.shapes import ndarray

IGNORE = -100  # a label that is not learnt
NOISE = "QA_GT_caption_based_noisy"  # a mark in some of the reference's annotations
ROLES = {"human": "user", "gpt": "assistant", "<|im_start|>user": "user", "<|im_start|>assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Template:
    """A family's way to write ChatML."""

    system: str
    end: str = "<|im_end|>\n"
    media: str = IMAGE_TEXT  # what an `<image>` becomes


_INTERNVL = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
TEMPLATES = {
    "qwen_2": Template("You are a helpful assistant."),
    "internvl2_5": Template(_INTERNVL, media=f"<img>{IMAGE_TEXT}</img>"),
    "internlm2-chat": Template(  # of earlier InternVL models
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
        end="<|im_end|>",
        media=f"<img>{IMAGE_TEXT}</img>",
    ),
}
TRAIN_TEMPLATES = ("qwen_2", "plain")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Ids with placeholders, and the label of each id."""

    ids: list[int]
    labels: list[int]


def read_turns(conversation: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(role, content) of each turn, whether written as from/value or role/content.

    Raises:
      ValueError: a turn with neither pair of keys, or a content that is not text.
    """
    turns: list[tuple[str, str]] = []
    for i, turn in enumerate(conversation):
        keys = ("from", "value") if "from" in turn else ("role", "content")
        role, content = turn.get(keys[0]), turn.get(keys[1])
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"turn {i} has keys {sorted(turn)}; give 'from' and 'value', or 'role' and 'content', as text"
            )
        if _SURROGATE.search(content):
            raise ValueError(f"turn {i} holds half of a surrogate pair (U+D800 to U+DFFF), which is no text")
        turns.append((ROLES.get(role, role), content))
    return turns


def place_media(turns: Sequence[tuple[str, str]], message: str = "") -> list[tuple[str, str]]:
    """Move a lone `<image>` to the front of its turn and write the time message behind each (`preprocess_multimodal`).

    Example:
      >>> place_media([("user", "Who? <image>")], "\\nIt lasts 3 s. ")
      [('user', '<image>\\nIt lasts 3 s. \\nWho?')]
    """
    replacement = f"{IMAGE_TEXT}{message.rstrip()} " if message else IMAGE_TEXT
    placed = []
    for role, content in turns:
        if content.count(IMAGE_TEXT) == 1 and not content.startswith(IMAGE_TEXT):
            content = f"{IMAGE_TEXT}\n{content.replace(IMAGE_TEXT, '').strip()}".strip()
        placed.append((role, content.replace(IMAGE_TEXT, replacement).replace(NOISE, "")))
    return placed


def encode_chat(
    tokenizer: Tokenizer,
    turns: Sequence[tuple[str, str]],
    *,
    has_media: bool,
    system: str | None = None,
    guarded: bool = True,
) -> Encoded:
    """Ids and labels of a conversation for training (`preprocess_qwen`).

    Each block is tokenized on its own. Assistant blocks are labelled whole; besides, every newline and chat mark
    is labelled wherever it stands, so the model also learns to open and close turns. A first turn that is not the
    user's is dropped. Without media, `<image>` is ordinary text, and so are control tokens in a turn, which the
    reference obeys (`guarded=False`).

    Raises:
      ValueError: no turn is left.
    """
    kept = list(turns[1:] if turns and turns[0][0] != "user" else turns)
    if not kept:
        raise ValueError(f"a conversation of {len(turns)} turns has no user turn")
    always = {tokenizer.newline_id, tokenizer.im_start_id, tokenizer.im_end_id}
    ids, labels = _start(tokenizer)
    template = TEMPLATES["qwen_2"]
    for role, content in [("system", template.system if system is None else system), *kept]:
        text = _block(role, content, template, tokenizer.marks if guarded else None)
        block = encode_media(tokenizer, text) if has_media else encode_guarded(tokenizer, text)
        learnt = role not in ("user", "system")
        ids += block
        labels += [i if i >= 0 and (learnt or i in always) else IGNORE for i in block]
    return Encoded(ids, labels)


def encode_plain(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> Encoded:
    """Ids and labels of a captioned visual: placeholder, caption, newline (`preprocess_plain`, stage 1).

    Raises:
      ValueError: not two turns, or the first has no `<image>`.
    """
    if len(turns) != 2 or IMAGE_TEXT not in turns[0][1]:
        raise ValueError(
            f"the plain template needs two turns, the first with {IMAGE_TEXT}; this sample has {len(turns)}"
        )
    ids, labels = _start(tokenizer)
    block = encode_media(tokenizer, f"{IMAGE_TEXT}{guard(turns[1][1], tokenizer.marks)}\n")
    return Encoded(ids + block, labels + [i if i >= 0 else IGNORE for i in block])


def encode_sample(
    tokenizer: Tokenizer,
    conversation: Sequence[Mapping[str, str]],
    *,
    template: str = "qwen_2",
    has_media: bool,
    message: str = "",
) -> Encoded:
    """Ids and labels of one annotated sample; the annotation itself is left as it is.

    Raises:
      ValueError: an unknown template or a malformed conversation.
    """
    turns = read_turns(conversation)
    if has_media:
        turns = place_media(turns, message)
    if template == "plain":
        return encode_plain(tokenizer, turns)
    if template == "qwen_2":
        return encode_chat(tokenizer, turns, has_media=has_media)
    raise ValueError(f"template is {template!r}; it must be one of {', '.join(TRAIN_TEMPLATES)}")


def first_question(question: str, message: str = "", placeholders: int = 1) -> str:
    """The first user turn about media, with the whitespace of inference (`chat` in the released model).

    Example:
      >>> first_question("Who?", "\\nIt lasts 3 s. ")
      '<image>\\nIt lasts 3 s. Who?'
    """
    text = f"{message.strip()} {question}" if message.strip() else question
    return f"{IMAGE_TEXT}\n" * placeholders + text


def frames_question(question: str, num_frames: int) -> str:
    """The first user turn of the InternVL models, which name every frame.

    Example:
      >>> frames_question("Who?", 2)
      'Frame1: <image>\\nFrame2: <image>\\nWho?'
    """
    return "".join(f"Frame{i + 1}: {IMAGE_TEXT}\n" for i in range(num_frames)) + question


def prompt_text(
    messages: Sequence[Mapping[str, str]],
    *,
    template: str = "qwen_2",
    system: str | None = None,
    answer: bool = True,
    marks: re.Pattern[str] | None = None,
) -> str:
    """The whole dialogue as text, ending where the assistant is to answer. A leading system message is used as such.

    `marks` (a tokenizer's) are guarded where they stand in somebody's words.

    Raises:
      ValueError: unknown template or malformed message.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}; it must be one of {', '.join(TEMPLATES)}")
    chosen = TEMPLATES[template]
    turns = read_turns(messages)
    if not turns or turns[0][0] != "system":
        turns.insert(0, ("system", chosen.system if system is None else system))
    text = "".join(_block(role, content, chosen, marks) for role, content in turns)
    return text + ("<|im_start|>assistant\n" if answer else "")


def prompt_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, template: str = "qwen_2", system: str | None = None
) -> list[int]:
    """Ids of the prompt, with a placeholder per `<image>`."""
    text = prompt_text(messages, template=template, system=system, marks=tokenizer.marks)
    return _start(tokenizer)[0] + encode_media(tokenizer, text)


def clean_answer(tokenizer: Tokenizer, ids: Sequence[int] | ndarray) -> str:
    """The answer's text: special tokens out, a trailing stop mark cut, whitespace stripped."""
    return tokenizer.decode(ids).strip().removesuffix("<|im_end|>").strip()


def _start(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    return ([], []) if tokenizer.bos_id is None else ([tokenizer.bos_id], [IGNORE])


def _block(role: str, content: str, template: Template, marks: re.Pattern[str] | None) -> str:
    if marks is not None:
        role, content = guard(role, marks), guard(content, marks)
    return f"<|im_start|>{role}\n{content.replace(IMAGE_TEXT, template.media)}{template.end}"
