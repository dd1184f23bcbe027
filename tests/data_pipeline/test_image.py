from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_pipeline import image
from data_pipeline.containers import VideoError


def recorded_float(pixels):
    return np.moveaxis(image.normalize(pixels), -1, 1)


def test_recorded_image_processor(golden):
    case = golden.case("G_preprocess", "umt_image_processor")
    stored = golden.tensors(case["file"])
    for name, config in case["config"]["cases"].items():
        frames = stored[f"{name}.image_u8"]
        frames = frames if frames.ndim == 4 else frames[None]
        made = np.stack([image.resize(f, *config["size_hw"]) for f in frames])
        assert (recorded_float(made) == stored[f"{name}.pixel_values"]).all(), name  # bit for bit


def test_recorded_tiles(golden):
    stored = golden.tensors("G_preprocess_anyres_tensors.safetensors")
    for name in ("img_a", "img_b"):
        picture = Image.fromarray(stored[f"{name}.image_u8"])
        tiles, _ = image.anyres_tiles(picture, 224, "(1x1),...,(3x3)")
        ((padded, grid),) = image.picture_tiles([picture], 224, aspect="pad")
        assert grid is None
        for kind, made in (("anyres_nopad_3x3", tiles), ("process_images_pad", padded)):
            values = recorded_float(made)
            assert values.shape == tuple(stored[f"{name}.{kind}.shape"])
            assert (values[:, :, ::8, ::8] == stored[f"{name}.{kind}.strided8"]).all(), (name, kind)
            sums = values.astype(np.float64).sum((2, 3))
            np.testing.assert_allclose(sums, stored[f"{name}.{kind}.tile_sum_f64"], rtol=1e-12)


def test_recorded_grids(golden):
    stored = golden.json("G_preprocess_anyres.json")
    for case in stored["get_anyres_image_grid_shape"]:
        args = (case["patch_size"], case["grid_pinpoints"], case["max_resolutions"])
        got = image.grid_shape(tuple(case["size_wh"]), *args)
        assert list(got) == case["out"], case
    for case in stored["select_best_resolution"]:
        allowed = [tuple(c) for c in stored["select_best_resolution_P"]]
        got = image.best_resolution(tuple(case["size_wh"]), allowed, case["patch_size"], case["max_resolutions"])
        assert list(got) == case["out"], case


def test_recorded_squares(golden):
    for case in golden.json("G_preprocess_anyres.json")["expand2square"]:
        padded = image.pad_square(Image.fromarray(np.array(case["in"], np.uint8)))
        assert np.asarray(padded).tolist() == case["out"]


@pytest.mark.parametrize(
    ("size", "px", "grid"),
    [
        ((640, 480), 224, (3, 3)), ((1920, 1080), 224, (6, 4)), ((300, 2000), 224, (1, 6)), ((100, 100), 224, (1, 1)),
        ((640, 480), 448, (2, 2)), ((300, 2000), 448, (1, 5)), ((3000, 500), 448, (6, 1)),
    ],
)  # fmt: skip
def test_published_grids(size, px, grid):
    assert image.grid_shape(size, px) == grid


def test_tiles_are_the_canvas_cut_in_raster_order():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tiles, grid = image.anyres_tiles(Image.fromarray(pixels), 8)
    assert grid == (2, 3)
    assert (tiles[1] == pixels[:8, :8]).all()
    assert (tiles[3] == pixels[:8, 16:]).all()
    assert (tiles[4] == pixels[8:, :8]).all()
    assert (tiles[0] == image.resize(pixels, 8, 8)).all()


def test_one_picture_is_tiled_and_several_are_not():
    picture = Image.new("RGB", (16, 8), (9, 9, 9))
    ((tiles, grid),) = image.picture_tiles([picture], 8)
    assert (len(tiles), grid) == (3, (1, 2))
    several = image.picture_tiles([picture, picture], 8)
    assert [(len(t), g) for t, g in several] == [(1, None), (1, None)]
    assert abs(several[0][0][0, 4].astype(int) - 9).max() <= 2
    assert abs(several[0][0][0, 0, 0].astype(int) - image.MEAN_COLOUR).max() <= 2  # the bicubic overshoots a little
    ((squashed, _),) = image.picture_tiles([picture], 8, aspect="square")
    assert (squashed == 9).all()
    with pytest.raises(ValueError, match="image_aspect is 'wide'"):
        image.picture_tiles([picture], 8, aspect="wide")
    with pytest.raises(ValueError, match="names no grid"):
        image.candidates("6 by 6", 8)


def test_kinds_of_pictures(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = (200, 10, 10)
    made = Image.fromarray(pixels)
    transparent = made.convert("RGBA")
    transparent.putalpha(Image.new("L", (6, 4), 0))
    for name, picture in (("a.png", made), ("b.png", transparent), ("c.png", made.quantize(4)), ("d.bmp", made)):
        picture.save(tmp_path / name)
        assert (np.asarray(image.read_image(tmp_path / name)) == pixels).all(), name
        assert image.read_size(tmp_path / name) == (6, 4)
    made.convert("L").save(tmp_path / "e.png")
    assert image.read_image(tmp_path / "e.png").mode == "RGB"


def test_the_orientation_tag_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert image.read_image(tmp_path / "a.jpg").size == (6, 4)


def test_bad_pictures(tmp_path, monkeypatch):
    with pytest.raises(VideoError, match="no such file"):
        image.read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(VideoError, match=r"text\.png: this picture cannot be read"):
        image.read_image(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:900])
    with pytest.raises(VideoError, match=r"half\.png: this picture cannot be read"):
        image.read_image(tmp_path / "half.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    Image.new("RGB", (6, 4)).save(tmp_path / "large.png")
    with pytest.raises(VideoError, match="exceeds limit"):
        image.read_size(tmp_path / "large.png")


def test_width_is_scaled_before_height():
    """The order shows in the rounding; one call of Pillow 13 would choose it by cost."""
    frame = np.random.default_rng(1).integers(0, 256, (150, 101, 3), dtype=np.uint8)
    bicubic = Image.Resampling.BICUBIC
    ordered = Image.fromarray(frame).resize((84, 150), bicubic).resize((84, 56), bicubic)
    assert (image.resize(frame, 56, 84) == np.asarray(ordered)).all()
