from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax.models.vision import internvideo2
from tests import golden_rows

PREFIX = "model.vision_tower.vision_tower."


def of_case(golden, name):
    case = golden.case("C_internvideo2", name)
    given = case["config"]
    config = internvideo2.InternVideo2Config(
        image_px=given["img_size"],
        patch_px=given["patch_size"],
        embed_dim=given["embed_dim"],
        num_blocks=given["blocks_built"],
        num_heads=given["num_heads"],
        mlp_ratio=given["mlp_ratio"],
        frames_per_clip=given["num_frames"],
        image_positions=given["sep_image_video_pos_embed"],
    )
    weights = golden.tensors(given["weights_file"])
    tower = golden_rows.filled(
        config, internvideo2.TORCH_NAMES, weights, ours="vision", theirs=PREFIX, layers=config.num_blocks
    )
    shape = given["input"]
    pixels = golden.tensors("pixels.safetensors")[shape["tensor"]][: shape["take_first"]].reshape(shape["reshape_to"])
    pixels = (np.moveaxis(pixels, 2, -1).astype(np.float32) - 128) / 64
    return tower, pixels, golden.tensors(case["file"])


@pytest.mark.parity
@pytest.mark.parametrize("name", ["v224_f4", "i224", "i224_jointpos"])
def test_recorded_towers(golden, name):
    tower, pixels, tensors = of_case(golden, name)
    out = jax.jit(lambda tower, x: tower(x))(tower, pixels)
    # The reference's own float32 is 5e-6 from its float64 on values up to 7.6.
    np.testing.assert_allclose(out, tensors["out"], atol=3e-5)
    if "patch_embed_first64" in tensors:
        np.testing.assert_allclose(
            tower.patch(jnp.asarray(pixels[:1]))[:, :64], tensors["patch_embed_first64"], atol=1e-5
        )


@pytest.mark.parity
def test_recorded_tables_to_start_from(golden):
    tensors = golden.tensors("C_internvideo2_sincos_tables.safetensors")
    # The reference rounds angles to float32 on the way: 1.1e-6 from ours.
    for name, arguments in (("e1408_g16_t4_cls", (1408, 16, 4)), ("e1408_g16_t1_cls", (1408, 16, 1))):
        table = internvideo2.sincos(*arguments)
        np.testing.assert_allclose(table[tensors[f"{name}.row_index"]], tensors[f"{name}.rows"], atol=2e-6)
        np.testing.assert_allclose(table.astype(float).sum(1), tensors[f"{name}.row_sum_f64"], atol=1e-4)
        # 1,025 rows, each off by up to 1.1e-6 in the same direction where an angle was rounded.
        np.testing.assert_allclose(table.astype(float).sum(0), tensors[f"{name}.col_sum_f64"], atol=2e-4)
    table = internvideo2.sincos(64, 5, 3, cls=False)
    np.testing.assert_allclose(table[tensors["e64_g5_t3_nocls.row_index"]], tensors["e64_g5_t3_nocls.rows"], atol=2e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["t8g4_to_t4g4", "t4g4_to_t4g7"])
def test_recorded_stretching(golden, name):
    tensors = golden.tensors("C_internvideo2_interpolate_pos_embed.safetensors")
    given = golden.case("C_internvideo2", "interpolate_pos_embed")["config"][name]
    old, new = (given["orig_t_size"], given["orig_grid"]), (given["new_t"], given["new_grid"])
    made = internvideo2.stretch_positions(tensors[f"{name}.pos_embed_in"][0], old, new)
    np.testing.assert_allclose(made, tensors[f"{name}.pos_embed_out"][0], atol=5e-6)
    made = internvideo2.stretch_positions(tensors[f"{name}.img_pos_embed_in"][0], (1, old[1]), (1, new[1]))
    np.testing.assert_allclose(made, tensors[f"{name}.img_pos_embed_out"][0], atol=5e-6)


def test_what_the_tower_does_not_take():
    config = internvideo2.VARIANTS["tiny"]
    tower = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    for shape in ((1, 4, 42, 42, 3), (1, 2, 28, 28, 3)):
        with pytest.raises(ValueError, match="the tower takes 4 \\(or one: an image\\) of 28 x 28"):
            tower(jnp.zeros(shape))
    with pytest.raises(ValueError, match="not a multiple of patch_px 14; use 28"):
        internvideo2.InternVideo2Config(image_px=30)
    with pytest.raises(ValueError, match="a multiple of 16 and of num_heads"):
        internvideo2.InternVideo2Config(embed_dim=40)
