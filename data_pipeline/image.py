"""Pictures to square tiles, exactly as the reference cuts and scales them (Pillow's bicubic on uint8).

In: a picture. Out: uint8 tiles [I, px, px, 3]. The orientation that EXIF asks for is ignored, as the reference
ignores it. The device turns uint8 into the tower's floats; `normalize` is the reference's host version of that.
Next: data_pipeline/layout.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from data_pipeline.containers import LEAKS, VideoError
from hico_jax.shapes import Float, UInt8, ndarray

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEAN_COLOUR = (123, 116, 103)  # int(255 * MEAN): what pictures are padded with
GRID = "(1x1),...,(6x6)"  # columns x rows of tiles, from the least to the most
ASPECTS = ("anyres_nopad", "square", "pad")


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An opened picture whose faults become one `VideoError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError as error:
        raise VideoError(f"{os.fspath(path)}: no such file") from error
    except LEAKS as error:
        raise VideoError(f"{os.fspath(path)}: this picture cannot be read ({error})") from error


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height from a picture's header.

    Raises:
      VideoError: missing, not a picture, or too large.
    """
    with _opened(path) as image:
        return image.size


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture in RGB.

    Raises:
      VideoError: missing, not a picture, truncated, or too large.
    """
    with _opened(path) as image:
        return image.convert("RGB")


def resize(frame: UInt8[ndarray, "height width 3"], height: int, width: int) -> UInt8[ndarray, "height2 width2 3"]:
    """Squash to a size with Pillow's bicubic: antialiased when shrinking, rounded to uint8.

    Width first, then height, in two calls: the passes round in between, and Pillow 13 would choose their order by
    cost, where earlier ones, and the models' training, always began with the width.
    """
    image = Image.fromarray(frame)
    if image.width != width:
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    if image.height != height:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def normalize(pixels: UInt8[ndarray, "*lead 3"]) -> Float[ndarray, "*lead 3"]:
    """uint8 to the tower's float32, bit for bit as `UMTImageProcessor` computes it."""
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


def candidates(grid: str | Sequence[Sequence[int]], px: int) -> list[tuple[int, int]]:
    """The (width, height) that a picture may be squashed to: `image_grid_pinpoints`, as text or as a list of them.

    Of a text such as "(1x1),...,(6x6)" only the first and the last pair count: everything between is allowed.

    Raises:
      ValueError: no pair in the text.

    Example:
      >>> candidates("(1x1),...,(1x2)", 224)
      [(224, 224), (224, 448)]
    """
    if not isinstance(grid, str) or grid.startswith("["):
        return [(int(w), int(h)) for w, h in (json.loads(grid) if isinstance(grid, str) else grid)]
    pairs = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)x(\d+)\)", grid)]
    if not pairs:
        raise ValueError(f"grid {grid!r} names no grid; write it like {GRID!r}")
    first, last = pairs[0], pairs[-1]
    return [(w * px, h * px) for w in range(first[0], last[0] + 1) for h in range(first[1], last[1] + 1)]


def best_resolution(
    size: tuple[int, int], allowed: Sequence[tuple[int, int]], px: int, max_pixels: int | None = None
) -> tuple[int, int]:
    """The (width, height) that keeps most of the picture's pixels and wastes least (`select_best_resolution`).

    `max_pixels` bounds the canvas and the global view together; one tile is always allowed.
    """
    width, height = size
    best, best_kept, best_waste = allowed[0], -1, 0
    for w, h in allowed:
        if max_pixels is not None and w * h != px * px and w * h + px * px > max_pixels:
            continue
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = w * h - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = (w, h), kept, waste
    return best


def grid_shape(
    size: tuple[int, int], px: int, grid: str | Sequence[Sequence[int]] = GRID, max_pixels: int | None = None
) -> tuple[int, int]:
    """Columns and rows of tiles for a picture of (width, height) (`get_anyres_image_grid_shape`).

    Example:
      >>> grid_shape((1920, 1080), 448)
      (5, 3)
    """
    width, height = best_resolution(size, candidates(grid, px), px, max_pixels)
    return width // px, height // px


def anyres_tiles(
    image: Image.Image, px: int, grid: str | Sequence[Sequence[int]] = GRID
) -> tuple[UInt8[ndarray, "I px px 3"], tuple[int, int]]:
    """The whole picture squashed to one tile, then its tiles in raster order; and (rows, columns).

    Even a grid of one gives two tiles, as in the reference (`process_anyres_image_nopad`).
    """
    cols, rows = grid_shape(image.size, px, grid)
    canvas = resize(np.asarray(image), rows * px, cols * px)
    tiles = canvas.reshape(rows, px, cols, px, 3).swapaxes(1, 2).reshape(rows * cols, px, px, 3)
    return np.concatenate([resize(np.asarray(image), px, px)[None], tiles]), (rows, cols)


def pad_square(image: Image.Image) -> Image.Image:
    """Centre the picture on a square of the mean colour (`expand2square`)."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def picture_tiles(
    images: Sequence[Image.Image], px: int, *, aspect: str = "anyres_nopad", grid: str | Sequence[Sequence[int]] = GRID
) -> list[tuple[UInt8[ndarray, "I px px 3"], tuple[int, int] | None]]:
    """Tiles and grid (None: one plain tile) of each picture of a sample.

    Several pictures are each padded to a square and become one tile; one picture follows `aspect`.

    Raises:
      ValueError: unknown aspect.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"image_aspect is {aspect!r}; it must be one of {', '.join(ASPECTS)}")
    if aspect == "anyres_nopad" and len(images) == 1:
        return [anyres_tiles(images[0], px, grid)]
    pad = aspect != "square"
    return [(resize(np.asarray(pad_square(i) if pad else i), px, px)[None], None) for i in images]
