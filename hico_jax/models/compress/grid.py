"""Places of patches: the square grid of a frame, windows over it, evenly spaced ones. What the other compressors share.

In: numbers. Out: indices and pooling weights, made on the host.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from hico_jax.shapes import Array, Float, Int, ndarray


def check(num_patches: int, num_tokens: int, num_frames: int) -> tuple[int, int]:
    """Patches and tokens of each frame.

    Raises:
      ValueError: frames do not share the patches or the tokens evenly, or there are more tokens than patches.
    """
    if num_patches % num_frames or num_tokens % num_frames or not 0 < num_tokens <= num_patches:
        raise ValueError(
            f"cannot make {num_tokens} tokens of {num_patches} patches in {num_frames} frames; "
            "lower compressor.tokens_per_frame or compressor.tokens_per_image"
        )
    return num_patches // num_frames, num_tokens // num_frames


def side(patches_per_frame: int) -> int:
    """The side of a frame's square grid.

    Raises:
      ValueError: it is no square.
    """
    found = math.isqrt(patches_per_frame)
    if found * found != patches_per_frame:
        raise ValueError(f"{patches_per_frame} patches of a frame are no square grid; choose another compressor")
    return found


def shape(num_tokens: int, most: int) -> tuple[int, int]:
    """Rows and columns for so many tokens, as square as they can be.

    Raises:
      ValueError: no rows and columns of at most `most` make that number.

    Example:
      >>> shape(16, 14), shape(8, 14)
      ((4, 4), (2, 4))
    """
    for rows in range(math.isqrt(num_tokens), 0, -1):
        if num_tokens % rows == 0 and num_tokens // rows <= most:
            return rows, num_tokens // rows
    raise ValueError(f"{num_tokens} tokens do not fill rows and columns of a grid of {most} x {most}")


def windows(size: int, number: int) -> Float[ndarray, "number size"]:
    """Weights of `number` means over windows that cover `size` places, as even as they can be (adaptive pooling)."""
    weights = np.zeros((number, size), np.float32)
    for i in range(number):
        start, stop = i * size // number, -(-(i + 1) * size // number)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def evenly(size: int, number: int) -> Int[ndarray, " number"]:
    """The middles of `number` equal parts of `size` places."""
    return ((2 * np.arange(number) + 1) * size // (2 * number)).astype(np.int32)


def pool(
    x: Float[Array, "B T P E"], frames: int, rows: int, columns: int
) -> Float[Array, "B M E"]:  # fmt: skip
    """Means over windows of time, height and width; float32 sums."""
    batch, num_frames, patches, width = x.shape
    edge = side(patches)
    cube = x.astype(jnp.float32).reshape(batch, num_frames, edge, edge, width)
    times, heights, widths = windows(num_frames, frames), windows(edge, rows), windows(edge, columns)
    pooled = jnp.einsum("BTHWE,tT,hH,wW->BthwE", cube, times, heights, widths, precision="highest")
    return pooled.reshape(batch, frames * rows * columns, width).astype(x.dtype)
