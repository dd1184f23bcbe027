"""Text to ids and back. One protocol, two readers: `tokenizer.json` (Qwen) and `tokenizer.model` (InternLM).

In: a folder with the files a model is released with. Out: a `Tokenizer`. No id is a constant here: the ids of
the newline and of the chat marks come from the vocabulary, so rules that name them hold for any model.
Next: data_pipeline/chat.py
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from hico_jax.shapes import ndarray

IMAGE_TEXT = "<image>"  # where a video or image stands in a text
PLACEHOLDER = -200  # and in the ids, until layout puts visual tokens there
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GUARD = "\uf8ff"  # stands inside a mark that is not one; private, and never encoded
# How text is cut before merging bytes: as Qwen does, but no punctuation joins a word (Qwen's "(B" is one piece), so
# that an option's letter in a list is the very token that answers.
WORD_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@runtime_checkable
class Tokenizer(Protocol):
    """What the house asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this; the embedding table may be larger."""
        ...

    @property
    def bos_id(self) -> int | None:
        """What every text starts with; None for Qwen."""
        ...

    @property
    def pad_id(self) -> int: ...
    @property
    def newline_id(self) -> int: ...
    @property
    def im_start_id(self) -> int: ...
    @property
    def im_end_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    @property
    def marks(self) -> re.Pattern[str]:
        """Matches every text that `encode` would take for a control token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; chat marks in it become their own ids."""
        ...

    def decode(self, ids: Sequence[int] | ndarray, *, skip_special: bool = True) -> str:
        """The text of ids; placeholders (negative ids) are left out."""
        ...


def encode_media(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which each `<image>` becomes the placeholder -200 (`tokenizer_image_token`)."""
    first, *rest = text.split(IMAGE_TEXT)
    ids = encode_guarded(tokenizer, first)
    for part in rest:
        ids.append(PLACEHOLDER)
        ids.extend(encode_guarded(tokenizer, part))
    return ids


def guard(text: str, marks: re.Pattern[str]) -> str:
    """The text with every mark in it broken by `GUARD`: somebody's words never become control tokens."""
    text = text.replace(GUARD, "")
    while marks.search(text):
        text = marks.sub(lambda m: f"{m[0][:1]}{GUARD}{m[0][1:]}", text)
    return text


def encode_guarded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text without its guards: what they broke is spelt in ordinary tokens."""
    if GUARD not in text:
        return tokenizer.encode(text)
    return [i for part in text.split(GUARD) for i in tokenizer.encode(part)]


def _pattern(marks: Iterable[str]) -> re.Pattern[str]:
    found = sorted({m for m in marks if len(m) > 1}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) or r"(?!)")


class BytePairTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library. Make one with `load_tokenizer` or `train_bpe`."""

    bos_id: int | None = None

    def __init__(self, inner: Any, name: str = "the tokenizer") -> None:
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.marks = _pattern(token.content for token in inner.get_added_tokens_decoder().values())
        self.pad_id, self.im_start_id, self.im_end_id = (_required(inner.token_to_id(s), s, name) for s in SPECIAL)
        newline = self.encode("\n")
        if len(newline) != 1:
            raise ValueError(f"{name} writes a newline as {len(newline)} ids {newline}; the chat format needs one")
        self.newline_id = newline[0]
        self.eos_ids = (self.im_end_id, self.pad_id)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | ndarray, *, skip_special: bool = True) -> str:
        return self._inner.decode([int(i) for i in ids if i >= 0], skip_special_tokens=skip_special)

    def save(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Write `tokenizer.json` into the folder; the file is complete or absent."""
        path = pathlib.Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        part.replace(path)
        return path


class SentencePieceTokenizer:
    """A `tokenizer.model` and its special tokens, which stand outside it in `tokenizer_config.json`.

    As in the reference's slow tokenizer, text between special tokens is encoded piece by piece.
    """

    def __init__(
        self, model: Any, special: dict[str, int], *, add_bos: bool = True, name: str = "the tokenizer"
    ) -> None:
        self._model = model
        self._special = special
        self._text_of = {i: s for s, i in special.items()}
        self.marks = _pattern(special)
        self._split = re.compile(f"({self.marks.pattern})")
        self.vocab_size: int = max([model.get_piece_size(), *(i + 1 for i in special.values())])
        self.im_start_id = _required(special.get("<|im_start|>"), "<|im_start|>", name)
        self.im_end_id = _required(special.get("<|im_end|>"), "<|im_end|>", name)
        eos = _required(model.eos_id() if model.eos_id() >= 0 else None, "an end-of-text id", name)
        self.pad_id: int = model.pad_id() if model.pad_id() >= 0 else eos
        self.bos_id: int | None = model.bos_id() if add_bos and model.bos_id() >= 0 else None
        self.newline_id: int = model.encode("\n")[-1]  # a model that prefixes a space writes two
        self.eos_ids = (self.im_end_id, eos)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._model.encode(part))
        return ids

    def decode(self, ids: Sequence[int] | ndarray, *, skip_special: bool = True) -> str:
        texts: list[str] = []
        run: list[int] = []
        size = self._model.get_piece_size()
        for i in (int(i) for i in ids if i >= 0):
            mark = self._text_of.get(i)
            if mark is None and i < size:
                run.append(i)
                continue
            texts.append(self._model.decode(run))
            run = []
            if mark is not None and not skip_special:
                texts.append(mark)
        texts.append(self._model.decode(run))
        return "".join(texts)


def load_tokenizer(folder: str | os.PathLike[str]) -> BytePairTokenizer | SentencePieceTokenizer:
    """The tokenizer in a model's folder, by the files that are there.

    Raises:
      ValueError: no tokenizer file, a file that cannot be read, or a vocabulary without the chat marks.
    """
    folder = pathlib.Path(folder)
    if (path := folder / "tokenizer.json").is_file():
        return _load_json(path)
    if (path := folder / "tokenizer.model").is_file():
        return _load_model(path)
    raise ValueError(
        f"{folder} holds neither tokenizer.json nor tokenizer.model; copy one from the model's release into it"
    )


def _load_json(path: pathlib.Path) -> BytePairTokenizer:
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error
    return BytePairTokenizer(inner, str(path))


def _load_model(path: pathlib.Path) -> SentencePieceTokenizer:
    import sentencepiece

    config_path = path.with_name("tokenizer_config.json")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    try:
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        added = {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{config_path} does not list special tokens as expected: {error}") from error
    return SentencePieceTokenizer(model, added, add_bos=config.get("add_bos_token", True), name=str(path))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairTokenizer:
    """A byte-level vocabulary like Qwen's, learnt from the texts; the special tokens come last.

    `vocab_size` counts everything; a small text may yield fewer. The same texts give the same vocabulary.

    Raises:
      ValueError: fewer ids than bytes and special tokens need.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {least}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(WORD_SPLIT), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return BytePairTokenizer(inner)


def _required(token_id: int | None, text: str, name: str) -> int:
    if token_id is None:
        raise ValueError(f"{name} has no {text}; it cannot write the chat format")
    return token_id
