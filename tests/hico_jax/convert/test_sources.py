from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from hico_jax import registry
from hico_jax.convert import sources
from tests.hico_jax.convert import pickled

TOWER = "model.vision_tower.vision_tower"
INTERNVIDEO2 = registry.VISION["internvideo2"].VARIANTS["internvideo2-1b"]
ONE = np.ones(2, np.float32)


def names_of(tmp_path, names, **options):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(dict.fromkeys(names, ONE), file)
    return set(sources.open_any(file, **options))


def test_the_raw_umt_file(tmp_path):
    names = ["encoder.patch_embed.proj.weight", "encoder.blocks.0.norm1.weight", "encoder.blocks.23.norm1.weight",
             "encoder.norm.weight", "decoder.x", "clip_decoder.0.head.weight"]  # fmt: skip
    assert names_of(tmp_path, names, vision=registry.VISION["umt"].VARIANTS["umt-large"]) == {
        f"{TOWER}.encoder.patch_embed.proj.weight", f"{TOWER}.encoder.blocks.0.norm1.weight",
        f"{TOWER}.encoder.vision_layernorm.weight",
    }  # fmt: skip


def test_the_raw_internvideo2_file(tmp_path):
    names = ["pos_embed", "img_pos_embed", "cls_token", "patch_embed.proj.bias", "blocks.38.ls1.weight",
             "blocks.39.ls1.weight", "clip_projector.norm1_k.weight"]  # fmt: skip
    assert names_of(tmp_path, names, vision=INTERNVIDEO2) == {f"{TOWER}.{n}" for n in names[:5]}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["t8g4_to_t4g4", "t4g4_to_t4g7"])
def test_positions_of_a_raw_encoder_are_stretched(golden, tmp_path, name):
    """A file for eight frames, or for smaller ones, into a tower that takes other sizes, as the reference does it."""
    recorded = golden.tensors("C_internvideo2_interpolate_pos_embed.safetensors")
    given = golden.case("C_internvideo2", "interpolate_pos_embed")["config"][name]
    tables = {key: recorded[f"{name}.{key}_in"] for key in ("pos_embed", "img_pos_embed")}
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tables | {"blocks.0.ls1.weight": ONE}, file)
    vision = dataclasses.replace(
        INTERNVIDEO2, image_px=14 * given["new_grid"], frames_per_clip=given["new_t"], embed_dim=16, num_heads=2
    )
    found = sources.open_any(file, vision=vision)
    for key in tables:
        table, expected = found[f"{TOWER}.{key}"], recorded[f"{name}.{key}_out"]
        assert table.shape == found.entries[f"{TOWER}.{key}"].shape == expected.shape
        np.testing.assert_allclose(table, expected, atol=5e-6)
    changed = [key for key in tables if tables[key].shape != recorded[f"{name}.{key}_out"].shape]
    assert len(found.notes) == len(changed) > 0
    np.testing.assert_array_equal(found[f"{TOWER}.blocks.0.ls1.weight"], ONE)
    same = dataclasses.replace(vision, image_px=14 * given["orig_grid"], frames_per_clip=given["orig_t_size"])
    assert sources.open_any(file, vision=same).notes == ()


def test_positions_of_internvit_are_stretched(tmp_path):
    table = np.random.default_rng(0).normal(size=(1, 1 + 16**2, 4)).astype(np.float16)
    file = tmp_path / "x.safetensors"
    names = ("embeddings.class_embedding", "embeddings.position_embedding")
    safetensors.numpy.save_file({names[0]: ONE, names[1]: table}, file)
    vision = registry.VISION["internvit"].VARIANTS["internvit-300m"]
    found = sources.open_any(file, vision=vision)
    made = found[f"vision_model.{names[1]}"]
    assert (made.shape, made.dtype) == ((1, 1 + 32**2, 4), np.float16)
    assert "from 1 frames of 16 x 16 patches to 1 of 32 x 32" in found.notes[0]


def test_plain_internlm2_and_internvit(tmp_path):
    names = ["model.tok_embeddings.weight", "model.layers.0.attention.wo.weight", "output.weight"]
    assert names_of(tmp_path, names) == {f"language_model.{n}" for n in names}
    names = ["embeddings.class_embedding", "encoder.layers.0.ls1"]
    assert names_of(tmp_path, names) == {f"vision_model.{n}" for n in names}


def test_whole_models_qwen2_and_projectors_keep_their_names(tmp_path):
    for names in (
        {"model.embed_tokens.weight", f"{TOWER}.pos_embed"},
        {"model.embed_tokens.weight", "lm_head.weight"},
        {"model.mm_projector.mlp.0.weight"},
        {"vision_model.embeddings.class_embedding", "language_model.output.weight"},
    ):
        assert names_of(tmp_path, names) == names


def test_pickled_files_are_asked_for(tmp_path):
    pickled.save(tmp_path / "mm_projector.bin", {"model.mm_projector.mlp.0.bias": ONE})
    for source in (tmp_path, tmp_path / "mm_projector.bin"):
        with pytest.raises(ValueError, match="pass --allow-pickle"):
            sources.open_any(source)
        np.testing.assert_array_equal(sources.open_any(source, allow_pickle=True)["model.mm_projector.mlp.0.bias"], ONE)


def test_pickled_shards(tmp_path):
    pickled.save(tmp_path / "1.bin", {"model.norm.weight": ONE})
    index = {"weight_map": {"model.norm.weight": "1.bin"}}
    (tmp_path / sources.BIN_INDEX).write_text(json.dumps(index))
    assert set(sources.open_any(tmp_path, allow_pickle=True)) == {"model.norm.weight"}
    (tmp_path / "1.bin").unlink()
    with pytest.raises(ValueError, match=r"names '1\.bin', which is missing"):
        sources.open_any(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_numbers_that_are_none(dtype):
    tensor = np.array([0, -1, 3e4], dtype)
    sources.check_finite("x", tensor)
    for bad in (np.nan, np.inf, -np.inf):
        tensor[1] = bad
        with pytest.raises(ValueError, match="x has 1 numbers of 3 that are NaN or infinite"):
            sources.check_finite("x", tensor)
    sources.check_finite("count", np.array([1, 2]))
