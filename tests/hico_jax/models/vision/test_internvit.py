from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax.convert import load
from hico_jax.models.compress import tome
from hico_jax.models.vision import internvit
from tests import golden_rows


@pytest.fixture(scope="module")
def loaded(golden):
    return load.load(golden.folder / "I_internvl_hico_ckpt", activations="float32").model


def pixels_of(golden, case, tensors):
    if "pixels_uint8" in tensors:
        made = (tensors["pixels_uint8"].astype(np.float32) - 128) / 64
    else:
        video = golden.tensors("pixels.safetensors")["video224"].reshape(-1, 3, 224, 224)
        made = golden_rows.canvas_pixels(case["config"]["pixels"], video)
    return np.moveaxis(made, 1, -1)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["vit_interp_down", "vit_nonsquare", pytest.param("vit_native", marks=pytest.mark.slow),
             pytest.param("vit_interp_up", marks=pytest.mark.slow)],
)  # fmt: skip
def test_recorded_towers(golden, loaded, name):
    case = golden.case("I_internvl_hico", name)
    tensors = golden.tensors(case["file"])
    pixels = pixels_of(golden, case, tensors)
    out = jax.jit(lambda tower, x: tower.states(x))(loaded.vision, pixels[:, None])
    # The reference's own float32 is 1e-5 from its float64.
    np.testing.assert_allclose(out, tensors["last_hidden_state"], atol=5e-5)


@pytest.mark.parity
def test_recorded_pixel_shuffle(golden):
    tensors = golden.tensors("I_pixel_shuffle.safetensors")
    for name in ("square", "odd_after"):
        np.testing.assert_array_equal(internvit.pixel_shuffle(jnp.asarray(tensors[f"{name}.x"])), tensors[f"{name}.v2"])


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["features_r16_interp", pytest.param("features_r16", marks=pytest.mark.slow),
             pytest.param("features_r64_inferred", marks=pytest.mark.slow)],
)  # fmt: skip
def test_recorded_features(golden, loaded, name):
    """Tower, pixel shuffle, merging over the language model's heads, `mlp1`."""
    case = golden.case("I_internvl_hico", name)
    tensors, count = golden.tensors(case["file"]), case["config"]["num_tome_tokens"]
    clip = pixels_of(golden, case, tensors)[None]

    @jax.jit
    def run(model, clip):
        merged = tome.merge(model.vision(clip), count, model.config.vision.merge_heads)
        return merged, model.projector(merged)

    merged, made = run(loaded, clip)
    np.testing.assert_allclose(merged, tensors["merged"], atol=5e-5)
    np.testing.assert_allclose(made[0].reshape(tensors["vit_embeds"].shape), tensors["vit_embeds"], atol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "count"), [("merge_random_r16", 64), ("merge_random_r64_inferred", 256)])
def test_recorded_merging(golden, name, count):
    x = golden.tensors("I_merge_random_r16.safetensors")["x"]
    tensors = golden.tensors(f"I_{name}.safetensors")
    out, trace = jax.jit(lambda x: tome.merge_with_trace(x, count, 8))(x)
    np.testing.assert_allclose(out, tensors["out"], atol=2e-6)
    np.testing.assert_array_equal(trace.sizes, tensors["size"][..., 0])


def test_what_the_tower_does_not_take():
    config = internvit.VARIANTS["tiny"]
    with pytest.raises(ValueError, match="takes multiples of 28"):
        nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))(jnp.zeros((1, 4, 42, 42, 3)))
    with pytest.raises(ValueError, match="not a multiple of 28"):
        dataclasses.replace(config, image_px=42)
    with pytest.raises(ValueError, match="must be a multiple of num_heads"):
        dataclasses.replace(config, width=15)
