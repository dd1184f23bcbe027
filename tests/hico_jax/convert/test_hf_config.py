from __future__ import annotations

import dataclasses
import json

import pytest

from hico_jax import registry
from hico_jax.batch import DropSchedule
from hico_jax.convert import hf_config
from hico_jax.models.vision import internvideo2, umt

DROP = DropSchedule("uniform0_attention", (1, 2), (1.0, 0.5, 0.25))


def released(**changes):
    """The keys of the 2B model at 448 pixels that say what it is."""
    return {
        "model_type": "videochat_flash_qwen",
        "mm_vision_tower": "umt-hd-large",
        "mm_hidden_size": 1024,
        "mm_projector_type": "tome16_mlp_hd64",
        "mm_vision_select_layer": -2,
        "mm_local_num_frames": 4,
        "mm_llm_compress": False,
        "llm_compress_type": "attention",
        "llm_compress_layer_list": [24],
        "llm_image_token_ratio_list": [1.0, 0.5],
        "tokenizer_model_max_length": 32768,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "mm_resampler_type": None,
    } | changes


def test_released_sizes():
    config = hf_config.from_raw(released())
    assert config.vision == umt.VARIANTS["umt-hd-large"]
    assert config.llm == registry.LLM["qwen2"].VARIANTS["qwen2.5-1.5b"]
    assert (config.dtype, config.max_length, config.drop) == ("bfloat16", 32768, DropSchedule())
    assert config.geometry().tokens_per_clip == 64


def test_compression_when_it_is_on():
    config = hf_config.from_raw(released(mm_llm_compress=True))
    assert config.drop == DropSchedule("attention", (24,), (1.0, 0.5))


@pytest.mark.parametrize(("tower", "px"), [("umt-large", 224), ("umt-hd-large", 448), ("my/umt-hd-v2", 448)])
def test_towers_by_substring(tower, px):
    assert hf_config.from_raw(released(mm_vision_tower=tower)).vision.image_px == px


@pytest.mark.parametrize("tower", ["openai/internvideo2", "google/siglip-umt", "InternViT-300M"])
def test_towers_that_are_not_built(tower):
    with pytest.raises(
        ValueError,
        match=r"this tower is not supported yet.*'internvideo2' \(224 px\), 'umt-hd' \(448 px\), 'umt' \(224 px\)",
    ):
        hf_config.from_raw(released(mm_vision_tower=tower))


def test_select_layer_counts_blocks():
    assert hf_config.from_raw(released(mm_vision_select_layer=-1)).vision.num_blocks == 24
    given = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "image_size": 96}
    vision = hf_config.from_raw(released(vision_config=given, mm_hidden_size=64)).vision
    assert (vision.num_blocks, vision.embed_dim, vision.num_heads, vision.image_px) == (2, 64, 4, 96)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "llama"}, "model_type 'llama', which is not supported yet; .*internvl_chat"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_vision_tower": None}, "lacks mm_vision_tower"),
        ({"mm_hidden_size": 1408}, "mm_hidden_size 1408 but its tower is 1024 wide"),
        ({"mm_llm_compress": True, "llm_compress_type": "random"}, "drop.kind is 'random'"),
        ({"vision_config": [1]}, "vision_config .* must be an object"),
    ],
)
def test_mistakes(changes, what):
    with pytest.raises(ValueError, match=what):
        hf_config.from_raw(released(**changes))


def test_untouched_configuration_comes_back_as_it_was(golden):
    for raw in (released(), *(golden.json(f"F_{n}_ckpt/config.json") for n in ("umt224", "internvideo2"))):
        dtype = raw["torch_dtype"]
        assert hf_config.to_raw(hf_config.from_raw(raw), raw, torch_dtype=dtype) == raw


def test_changes_are_written_and_the_rest_kept():
    raw = released(some_key={"a": 1})
    config = dataclasses.replace(hf_config.from_raw(raw), drop=DROP, max_length=999, dtype="float32")
    out = hf_config.to_raw(config, raw, torch_dtype="bfloat16")
    assert hf_config.from_raw(out) == config
    changed = {key for key in out if out[key] != raw.get(key, "absent")}
    assert changed == {
        "mm_llm_compress", "llm_compress_type", "llm_compress_layer_list", "llm_image_token_ratio_list",
        "tokenizer_model_max_length", "hico_jax",
    }  # fmt: skip
    assert out["hico_jax"] == {"dtype": "float32"}


def test_another_image_size_changes_the_tower_and_the_grid():
    raw = released(mm_vision_tower="umt-large", image_grid_pinpoints=[[224, 224]])
    config = dataclasses.replace(hf_config.from_raw(raw), vision=umt.VARIANTS["umt-hd-large"])
    out = hf_config.to_raw(config, raw, torch_dtype="bfloat16")
    assert out["mm_vision_tower"] == "umt-hd-large"
    assert out["image_grid_pinpoints"][1] == [448, 896]
    assert "vision_config" not in out


@pytest.mark.parametrize("name", registry.MODELS)
@pytest.mark.parametrize("torch_dtype", ["float32", "bfloat16"])
def test_every_model_of_ours(name, torch_dtype):
    config = registry.model_config(name)
    drop = DROP if config.llm.num_layers > 2 else DropSchedule()
    config = dataclasses.replace(config, drop=drop, vision=dataclasses.replace(config.vision, remat=True))
    out = json.loads(json.dumps(hf_config.to_raw(config, torch_dtype=torch_dtype)))
    back = hf_config.from_raw(out)
    assert back == dataclasses.replace(config, vision=dataclasses.replace(config.vision, remat=False))
    assert out["transformers_version"]  # the reference fails without it


def test_a_tower_of_our_own_says_its_nominal_depth():
    out = hf_config.to_raw(registry.model_config("tiny"))
    assert out["vision_config"]["num_hidden_layers"] == umt.VARIANTS["tiny"].num_blocks + 1
    assert out["hico_jax"]["pretrain_grid"] == 2


def test_internvideo2_by_name_and_from_its_sizes():
    raw = released(mm_vision_tower="internvideo2-after-umt", mm_hidden_size=1408)
    assert hf_config.from_raw(raw).vision == internvideo2.VARIANTS["internvideo2-1b"]
    joint = dataclasses.replace(internvideo2.VARIANTS["internvideo2-1b"], image_positions=False)
    out = hf_config.to_raw(dataclasses.replace(hf_config.from_raw(raw), vision=joint), raw, torch_dtype="bfloat16")
    assert out["hico_jax"] == {"image_positions": False}
    assert hf_config.from_raw(out).vision == joint


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_yarn_is_read_and_written(spelling):
    scaling = {spelling: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = hf_config.from_raw(released(rope_scaling=scaling))
    assert (config.llm.rope_kind, config.llm.rope_factor, config.llm.rope_original) == ("yarn", 4.0, 32768)
    plain = dataclasses.replace(hf_config.from_raw(released()), llm=config.llm)
    out = hf_config.to_raw(plain, released(), torch_dtype="bfloat16")
    assert out["rope_scaling"] == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert hf_config.from_raw(out).llm == config.llm


def test_the_language_model_alone():
    raw = hf_config.to_raw(registry.model_config("umt_qwen2_5_7b_1m"), torch_dtype="bfloat16")
    alone = hf_config.language_raw(registry.model_config("umt_qwen2_5_7b_1m"), raw)
    assert (alone["model_type"], alone["rope_theta"], alone["rms_norm_eps"]) == ("qwen2", 1e7, 1e-5)
    base = registry.model_config("umt_qwen2_7b")
    assert hf_config.language_config(alone, base).llm == registry.model_config("umt_qwen2_5_7b_1m").llm


@pytest.mark.parametrize("keeps", ["nothing", "offload"])
def test_how_a_run_saved_memory_is_no_part_of_a_model(keeps):
    config = registry.model_config("tiny")
    trained = dataclasses.replace(config, llm=dataclasses.replace(config.llm, remat=True, remat_keeps=keeps))
    out = hf_config.to_raw(trained)
    assert out == hf_config.to_raw(config)
    assert hf_config.to_raw(trained, out) == out
    off = dataclasses.replace(config, drop=DropSchedule("none", (1,), (1.0, 0.5), shares=4))
    assert hf_config.to_raw(off) == out


def test_shares_of_dropping_are_carried_and_the_reference_passes_over_them():
    config = dataclasses.replace(registry.model_config("tiny"), drop=DropSchedule("attention", (1,), (1.0, 0.5)))
    shared = dataclasses.replace(config, drop=dataclasses.replace(config.drop, shares=8))
    plain, out = hf_config.to_raw(config), hf_config.to_raw(shared)
    assert out["hico_jax"].pop("drop_shares") == 8
    assert out == plain
    assert hf_config.from_raw(hf_config.to_raw(shared)).drop == shared.drop
    assert hf_config.to_raw(shared, hf_config.to_raw(shared)) == hf_config.to_raw(shared)


def test_what_config_json_cannot_say_is_named():
    config = dataclasses.replace(registry.model_config("tiny"), projector="norm_mlp")
    with pytest.raises(ValueError, match=r"cannot say projector='norm_mlp'; such a model has no PyTorch twin"):
        hf_config.to_raw(config)
