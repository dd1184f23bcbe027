"""`hico_jax.load` and the model it gives, against every recorded whole model, and as a user talks to it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hico_jax
from data_pipeline import chat
from data_pipeline.frames import time_message
from data_pipeline.tokenizer import Tokenizer
from hico_jax import api, cli, generate
from hico_jax.convert.export import export
from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo
from tests import golden_rows
from tests.golden_rows import close

SLOW = pytest.mark.slow
FAST = ("umt224_text_only_dummy_image_eval", "internvideo2_video_eval")
FLASH = (
    *FAST,
    *(pytest.param(name, marks=SLOW) for name in (
        "umt224_video_eval", "umt224_video_eval_llm_attention", "umt224_video_eval_llm_uniform0_attention",
        "umt224_video_train", "umt224_image_anyres_eval", "umt224_image_anyres_5tiles_eval",
        "umt224_image_single_eval", "internvideo2_image_anyres_loss_evalmode",
    )),
)  # fmt: skip
INTERNVL = (
    "full_r16_video_two_turn_labels",
    *(pytest.param(name, marks=SLOW) for name in (
        "full_r16_video", "full_r64_video", "full_r16_batch_train", "full_r16_text_only_dummy",
        "full_r16_video_rope_dynamic_beyond",
    )),
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", FLASH)
def test_recorded_models(golden: Any, name: str) -> None:
    case = golden.case("F_full", name)
    config, tensors = case["config"], golden.tensors(case["file"])
    model = hico_jax.load(golden.folder / config["checkpoint"], dtype="float32")
    visuals = [
        ((np.moveaxis(frames, -1, 1).astype(np.float32) - 128) / 64, "video" if kind == "video" else "image", size)
        for kind, size, frames in golden_rows.media_of(case, golden.tensors("pixels.safetensors"))
    ]
    compress = None
    if config["mm_llm_compress"]:
        lists = [config[f"llm_{n}_list"] for n in ("compress_layer", "image_token_ratio")]
        compress = (config["llm_compress_type"], *lists)
    ids = tensors["input_ids"][0]
    logits = model.logits(ids, visuals, compress)
    assert logits.dtype == np.float32
    if "logits" in tensors:
        close(logits, tensors["logits"][0])
    for key, cut in (("logits_last24", logits[-24:]), ("logits_strided4", logits[::4])):
        if key in tensors:
            close(cut, tensors[key])
    if "logits_strided8" in tensors:
        close(logits[::8], tensors["logits_strided8"][0])
    if "generated_ids" in tensors:
        wanted = tensors["generated_ids"].tolist()
        assert model.generate_ids(ids, visuals, len(wanted), compress) == wanted


@pytest.mark.parity
@pytest.mark.parametrize("name", INTERNVL)
def test_recorded_internvl_models(golden: Any, name: str, tmp_path: pathlib.Path) -> None:
    case = golden.case("I_internvl_hico", name)
    config, tensors = case["config"], golden.tensors(case["file"])
    folder = tmp_path / f"HiCo_R{config['tokens_per_frame']}"  # the name tells, as it does for the released ones
    folder.mkdir()
    for file in (golden.folder / "I_internvl_hico_ckpt").iterdir():
        (folder / file.name).symlink_to(file)
    raw = json.loads((folder / "config.json").read_text())
    raw["llm_config"] |= config["llm_overrides"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(raw))
    model = hico_jax.load(folder, dtype="float32")
    for row in range(len(config["frames_per_row"])):
        real = tensors["attention_mask"][row].astype(bool)
        ids, _, pixels = golden_rows.internvl_row(golden, name, row)
        visuals = [(pixels, "video", None)] if len(pixels) else []
        logits = model.logits(ids, visuals)
        for key in ("logits", "logits_tail"):
            if key in tensors:
                expected = tensors[key][row][real] if key == "logits" else tensors[key][row]
                close(logits[-len(expected) :], expected)
        if "generated_ids" in tensors:
            prompt = ids[: len(ids) - (int(real.sum()) - config["generate"]["prompt_tokens"])]
            wanted = tensors["generated_ids"].reshape(-1).tolist()
            assert model.generate_ids(prompt, visuals, len(wanted)) == wanted


@pytest.fixture(scope="module")
def model(asked_model: HiCo, words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> api.Model:
    folder = tmp_path_factory.mktemp("model")
    file = words.save(folder / "tokenizer")  # type: ignore[attr-defined]
    return hico_jax.load(export(asked_model, folder / "weights", files=[file]))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)) for _ in range(2)]


SHORT = GenerationConfig(max_new_tokens=3, eos=())


def test_a_talk_about_a_film(model: api.Model, noise_film: pathlib.Path) -> None:
    film = model.watch(noise_film, max_frames=8)
    assert film.num_frames == 8
    talk = model.chat(film, settings=SHORT)
    first, second = talk.say("Who?"), talk.say("When?")
    assert first.visual_tokens == second.visual_tokens == 8
    assert second.prompt_tokens > first.prompt_tokens
    assert [turn["role"] for turn in talk.history] == ["user", "assistant"] * 2
    assert model.ask(film, "Who?", settings=SHORT).ids == first.ids
    assert model.count_tokens("Who?") == len(model.tokenizer.encode("Who?"))


def test_images_and_text(model: api.Model, pictures: list[Image.Image]) -> None:
    answer = model.ask(None, "Which?", images=pictures, settings=SHORT)
    assert (answer.visual_tokens, len(answer.ids)) == (2 * 2, 3)
    assert model.ask(model.look(pictures), "Which?", settings=SHORT).ids == answer.ids
    assert model.ask(None, "Hello?", settings=SHORT).visual_tokens == 0


def test_a_talk_about_a_film_and_pictures(
    model: api.Model, noise_film: pathlib.Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A film first, pictures in a later turn, then a question about all: the row and what stands in its slots."""
    rows: list[tuple[Any, Any]] = []
    real = generate.generate
    monkeypatch.setattr(
        generate, "generate", lambda model, prompt, *rest: rows.append(prompt) or real(model, prompt, *rest)
    )
    film = model.watch(noise_film, max_frames=8)
    talk = model.chat(film, settings=SHORT)
    talk.say("Who?")
    second = talk.say("Is it here?", images=pictures)
    third = talk.say("Sure?")
    assert second.visual_tokens == third.visual_tokens == 8 + 2 * 2
    batch, visual = rows[-1]
    message = time_message(film.duration_s, film.indices, film.fps)
    said = [turn["content"] for turn in talk.history]
    ids = chat.prompt_ids(model.tokenizer, [
        {"role": "user", "content": chat.first_question("Who?", message)}, {"role": "assistant", "content": said[1]},
        {"role": "user", "content": "<image>\n<image>\nIs it here?"}, {"role": "assistant", "content": said[3]},
        {"role": "user", "content": "Sure?"},
    ])  # fmt: skip
    slots, length = np.asarray(batch.slots[0]), third.prompt_tokens
    assert length == len(ids) - 3 + 8 + 2 * 2
    assert np.asarray(batch.tokens[0])[:length][slots[:length] < 0].tolist() == [i for i in ids if i >= 0]
    assert slots[slots >= 0].tolist() == list(range(8 + 2 * 2))
    np.testing.assert_array_equal(visual[:, :8], film.visual[:, :8])
    np.testing.assert_array_equal(visual[:, 8:], model.look(pictures).visual)
    assert model.ask(film, "Sure?", images=pictures, settings=SHORT).visual_tokens == 8 + 2 * 2


def test_a_converted_folder_answers_too(model: api.Model, tmp_path: pathlib.Path) -> None:
    assert model.folder is not None
    assert cli.main(["convert", str(model.folder), str(tmp_path / "ours")]) == cli.OK
    again = hico_jax.load(tmp_path / "ours")
    assert again.eos == model.eos
    assert again.ask(None, "Hello?", settings=SHORT).ids == model.ask(None, "Hello?", settings=SHORT).ids


PIXELS = np.zeros((4, 3, 32, 32), np.float32)


def test_mistakes(model: api.Model, tmp_path: pathlib.Path) -> None:
    for visuals, message in (
        ([], "1 <image> placeholders for 0"),
        ([(PIXELS[:3], "video", None)], "3 frames do not make whole clips"),
        ([(PIXELS, "image", None)], r"comes without its size"),
        ([(PIXELS, "film", None)], "must be 'video' or 'image'"),
        ([(PIXELS[0], "video", None)], r"pixels have shape \(3, 32, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.logits([1, -200, 2], visuals)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        hico_jax.load(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        hico_jax.load(tmp_path)
    with pytest.raises(ValueError, match="has 70 tokens but the model has rows for 64"):
        api.check_vocabulary(70, 64, "here")


def test_end_tokens_come_from_the_folder(tmp_path: pathlib.Path) -> None:
    assert api._eos(tmp_path, {}) == ()
    assert api._eos(tmp_path, {"eos_token_id": 2}) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert api._eos(tmp_path, {"eos_token_id": 2}) == (5, 6)


def test_one_placeholder_a_frame_or_a_token_is_as_good_as_one(model: api.Model) -> None:
    visuals = [(np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32), "video", None)]
    one = model.logits([5, -200, 6], visuals)
    assert one.shape == (2 + 8, 512)
    np.testing.assert_allclose(model.logits([5, *[-200] * 8, 6], visuals), one, atol=1e-6)
