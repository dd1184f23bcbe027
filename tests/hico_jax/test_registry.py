from __future__ import annotations

import pytest

from hico_jax import registry


@pytest.mark.parametrize("name", list(registry.MODELS))
def test_every_model_has_a_configuration(name: str) -> None:
    geometry = registry.model_config(name).geometry()
    assert geometry.tokens_per_clip < (geometry.image_px // 16) ** 2 * geometry.frames_per_clip


OURS = ("nano", "nano_hd", "hico_nano", "hico_nano_hd", "tiny")  # published nowhere else


def test_the_released_models_are_the_published_ones() -> None:
    small = registry.model_config("umt_hd_qwen2_5_1_5b")
    assert (small.vision.image_px, small.llm.embed_dim, small.llm.tied) == (448, 1536, True)
    seven = registry.model_config("umt_qwen2_7b")
    assert (seven.vision.image_px, seven.llm.embed_dim, seven.geometry().tokens_per_clip) == (224, 3584, 64)
    long = registry.model_config("umt_qwen2_5_7b_1m").llm
    assert (long.rope_theta, long.norm_eps, long.max_positions) == (1e7, 1e-5, 1_010_000)
    for name, entry in registry.MODELS.items():
        assert bool(entry.source) == bool(entry.licence) == (name not in OURS)


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'umt_qwen_7b'; did you mean umt_qwen2_7b\?"):
        registry.model_config("umt_qwen_7b")


def test_configuration_classes_are_found_by_key() -> None:
    assert registry.config_class("vision", "umt") is type(registry.model_config("tiny").vision)
    with pytest.raises(ValueError, match=r"vision\.arch is 'vit'; it must be one of umt"):
        registry.config_class("vision", "vit")
