from __future__ import annotations

import dataclasses

import pytest

from hico_jax import registry
from hico_jax.convert import hf_config, hf_internvl
from hico_jax.models.vision import internvit


def published(**changes):
    """What `to_raw` writes of the registry's model is what the published file says."""
    config = registry.model_config("internvl_hico_r16")
    return hf_config.to_raw(config, torch_dtype="bfloat16") | changes


def test_published_sizes_come_back():
    config = hf_config.from_raw(published())
    assert config == registry.model_config("internvl_hico_r16")
    assert config.vision == internvit.VARIANTS["internvit-300m"]
    assert "hico_jax" not in published()


def test_the_folder_tells_r16_from_r64():
    raw = published()
    assert hf_config.from_raw(raw, "InternVL_2_5_HiCo_R64") == registry.model_config("internvl_hico_r64")
    assert (
        hf_config.from_raw(raw | {"_name_or_path": "OpenGVLab/InternVL_2_5_HiCo_R64"}).compressor.tokens_per_frame == 64
    )
    written = hf_internvl.to_raw(registry.model_config("internvl_hico_r64"), raw, torch_dtype="bfloat16")
    assert written == raw | {"hico_jax": {"tokens_per_frame": 64}}
    assert hf_config.from_raw(written, "anything").geometry().tokens_per_clip == 256


def test_the_recorded_file_is_kept(golden):
    raw = golden.json("I_internvl_hico_ckpt/config.json")
    assert hf_config.to_raw(hf_config.from_raw(raw), raw, torch_dtype="float32") == raw


def test_changed_settings_are_written():
    config = registry.model_config("internvl_hico_r16")
    longer = dataclasses.replace(config.llm, rope_factor=3.0)
    config = dataclasses.replace(config, llm=longer, max_length=3 * 32768, dtype="float32")
    assert hf_config.from_raw(hf_config.to_raw(config, published(), torch_dtype="bfloat16")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "vision_config None; it must be an object"),
        ({"llm_config": {"model_type": "llama"}}, "llm_config of type 'llama'"),
        ({"ps_version": "v1"}, "ps_version 'v1'; only 'v2' is built"),
        ({"vision_config": {"qk_normalization": True}}, "vision_config.qk_normalization True; only False"),
        ({"vision_config": {"hidden_size": 3}}, "lacks vision_config.intermediate_size"),
        ({"llm_config": {}}, "lacks vocab_size"),
    ],
)
def test_what_is_not_built(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_raw(published(**changes))
