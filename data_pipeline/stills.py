"""Films that are not films: animated GIFs, folders of frames, single pictures.

The reference's rules: a GIF has one frame a second whatever it says, and its transparency is dropped; a folder has one
frame a second, three if its path names tvqa, ordered by the number after the last underscore. Where the reference
collapses repeated indices of a short GIF, and then rejects it, the frame is repeated here.

In: a path and indices. Out: RGB uint8 frames.
Next: data_pipeline/video.py
"""

from __future__ import annotations

import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.containers import PICTURE_SUFFIXES, VideoError, guard
from data_pipeline.image import read_image
from hico_jax.shapes import UInt8, ndarray


def gif_size(path: str) -> tuple[int, int, int]:
    """Number of frames, width, height of a GIF."""
    with guard(path, "reading"), _gif(path) as image:
        return getattr(image, "n_frames", 1), image.width, image.height


def iter_gif(path: str, indices: Sequence[int] | ndarray) -> Iterator[UInt8[ndarray, "height width 3"]]:
    """Frames of rising indices, one at a time; the colours under transparent parts show."""
    with guard(path, "decoding"), _gif(path) as image:
        for index in indices:
            image.seek(int(index))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
                yield np.ascontiguousarray(np.asarray(image.convert("RGBA"))[..., :3])


def _gif(path: str) -> Image.Image:
    return Image.open(path, formats=("GIF",))


def folder_files(path: str) -> list[str]:
    """The pictures of a folder in the order of the numbers in their names.

    Raises:
      VideoError: no pictures in it.
    """
    with guard(path, "listing"):
        names = sorted(n for n in os.listdir(path) if n.lower().endswith(PICTURE_SUFFIXES) and not n.startswith("."))
    if not names:
        raise VideoError(f"{path}: this folder holds no {', '.join(PICTURE_SUFFIXES)} pictures")
    return [os.path.join(path, n) for n in sorted(names, key=_number)]


def folder_fps(path: str) -> float:
    """Frames a second of a folder: 3 for TVQA, else 1."""
    return 3.0 if "tvqa" in path.lower() else 1.0


def iter_folder(files: Sequence[str], indices: Sequence[int] | ndarray) -> Iterator[UInt8[ndarray, "height width 3"]]:
    """Pictures of rising indices, upright (OpenCV, which the reference uses here, obeys EXIF)."""
    for index in indices:
        file = files[int(index)]
        with guard(file, "reading"), warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                yield np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def iter_picture(path: str, indices: Sequence[int] | ndarray) -> Iterator[UInt8[ndarray, "height width 3"]]:
    """A single picture, as a film of one frame."""
    frame = np.asarray(read_image(path))
    for _ in indices:
        yield frame


def _number(name: str) -> int:
    match = re.search(r"_(\d+)$", pathlib.PurePath(name).stem)
    return int(match.group(1)) if match else -1
