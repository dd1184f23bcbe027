from __future__ import annotations

import io
import json

import pytest
import sentencepiece

from data_pipeline import tokenizer as tk

TEXTS = ["the red ball moves left\n", "a blue square stays where it is, then turns\n", "naïve café 日本語 12.50\n"] * 20


@pytest.fixture(scope="module")
def small():
    return tk.train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=330, byte_fallback=True, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
        character_coverage=1.0,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    added = {"330": {"content": "<|im_start|>"}, "331": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return tk.load_tokenizer(folder)


def test_recorded_encodings(golden):
    tokenizer = tk.load_tokenizer(golden.folder / "G_tokenizer")
    for case in golden.json("G_preprocess_text.json")["encode"]:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"]
        assert tokenizer.decode(ids, skip_special=False) == case["decoded"]
        assert tokenizer.decode(ids) == case["decoded"].replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert (tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.newline_id) == (440, 441, 442, 198)
    assert tokenizer.vocab_size == 443


@pytest.mark.parametrize("text", ["ball 12\n\n x", "é — “q” 日本\t", "<|im_start|>user\nHi<|im_end|>\n", ""])
@pytest.mark.parametrize("which", ["small", "pieces"])
def test_text_survives_a_round_trip(which, text, request):
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_media_become_placeholders(small):
    ids = tk.encode_media(small, "a<image>b<image>")
    assert ids == [*small.encode("a"), -200, *small.encode("b"), -200]
    assert small.decode(ids) == "ab"


def test_trained_vocabulary(small, tmp_path):
    assert small.vocab_size == 300
    assert (small.pad_id, small.im_start_id, small.im_end_id) == (297, 298, 299)
    assert small.encode("\n") == [small.newline_id]
    assert len(small.encode("the red ball")) < 12
    assert tk.train_bpe(TEXTS, 300).encode(TEXTS[1]) == small.encode(TEXTS[1])
    small.save(tmp_path / "t")
    again = tk.load_tokenizer(tmp_path / "t")
    assert again.encode(TEXTS[1] + "<|im_end|>") == small.encode(TEXTS[1] + "<|im_end|>")
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["tokenizer.json"]


def test_pieces_have_their_marks_outside_the_model(pieces):
    assert (pieces.im_start_id, pieces.im_end_id, pieces.vocab_size, pieces.bos_id) == (330, 331, 332, 1)
    assert pieces.eos_ids == (331, 2)
    assert pieces.decode([pieces.newline_id]) == "\n"


def test_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        tk.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="alone need 259"):
        tk.train_bpe(TEXTS, 100)


def test_a_vocabulary_without_chat_marks_is_refused(small, tmp_path):
    stored = json.loads(small._inner.to_str())
    stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] != "<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"has no <\|im_end\|>"):
        tk.load_tokenizer(tmp_path)
