from __future__ import annotations

import numpy as np

from data_pipeline.world.presets import PRESETS
from data_pipeline.world.questions import KINDS
from data_pipeline.world.texts import corpus, text_items


def test_text_items_have_no_media():
    items = text_items(np.random.default_rng(0), 40)
    assert len(items) == 40
    assert items == text_items(np.random.default_rng(0), 40)
    assert all(set(item) == {"id", "conversations"} for item in items)
    assert all([t["from"] for t in item["conversations"]] == ["human", "gpt"] for item in items)
    assert not any("<image>" in turn["value"] for item in items for turn in item["conversations"])


def test_the_corpus_has_every_word_the_model_must_say():
    lines = corpus("nano", scenes=100)
    assert lines == corpus("nano", scenes=100)
    words = set(" ".join(lines).replace("?", " ").replace(".", " ").split())
    for name, kind in KINDS.items():
        assert set(kind.answers) <= words, name
    for name in PRESETS["nano"].weights:
        if name in KINDS:
            wording = KINDS[name].wording.rstrip("?.").replace(",", "")
            assert set(wording.split()) <= {w.rstrip(",") for w in words}, name


def test_answers_are_one_token_in_a_small_vocabulary():
    from data_pipeline.tokenizer import train_bpe

    tokenizer = train_bpe(corpus("nano"), 512)
    for name in ("card_colour", "card_shape", "order_red", "present"):
        for answer in KINDS[name].answers:
            assert len(tokenizer.encode(answer)) == 1, answer
