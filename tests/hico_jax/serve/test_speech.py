"""Pieces of an answer join to the whole answer, and end where a stop string begins."""

from __future__ import annotations

import pytest

from data_pipeline import chat
from data_pipeline.tokenizer import Tokenizer
from hico_jax.serve.speech import WINDOW, Speech

TEXTS = (" The card is red. ", "日本語とémoji 🎬🎬", "a <|im_en b <|im_end|>", "two\n\nlines  \n", "")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_clean_answer(text: str, words: Tokenizer) -> None:
    ids = words.encode(text)
    speech = Speech(words)
    pieces = [speech.push(i) for i in ids]
    pieces.append(speech.finish())
    assert "".join(pieces) == speech.text == chat.clean_answer(words, ids)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize(
    ("stop", "said"),
    [(("is",), "The card "), (("red.", "card"), "The "), (("nothing",), "The card is red."), ((), "The card is red.")],
)
def test_a_stop_string_is_not_said_nor_what_may_become_one(stop: tuple[str, ...], said: str, words: Tokenizer) -> None:
    speech, pieces = Speech(words, stop), []
    for i in words.encode("The card is red."):
        pieces.append(speech.push(i))
        assert said.startswith("".join(pieces))
        if speech.stopped:
            break
    pieces.append(speech.finish())
    assert "".join(pieces) == said
    assert speech.stopped == (said != "The card is red.")


def test_a_long_answer_is_not_decoded_again_and_again(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is what decoding all of it would have said, while no more than a window is decoded."""
    text = "".join(TEXTS[i % 4] for i in range(60)) + "🎬" * 300
    ids, sizes = words.encode(text), []
    decode = words.decode

    def counted(some: list[int], **options: bool) -> str:
        sizes.append(len(some))
        return decode(some, **options)

    speech, said = Speech(words), ""
    with monkeypatch.context() as patch:
        patch.setattr(words, "decode", counted)
        for i, token in enumerate(ids):
            said += speech.push(token)
            assert speech._whole() == decode(ids[: i + 1])
    assert said + speech.finish() == chat.clean_answer(words, ids)
    assert len(ids) > 2000
    assert max(sizes) <= 2 * WINDOW + 8
