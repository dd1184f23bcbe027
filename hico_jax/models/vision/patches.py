"""What every tower begins with: frames cut into patches, positions stretched to another clip, a stack of blocks.

In: normalized pixels of clips `[B T height width 3]`, or tables of positions. Out: patches `[B P E]`, frame by frame,
row by row; tables.
Next: hico_jax/models/vision/umt.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.models import layers
from hico_jax.parallel.sharding import shard
from hico_jax.shapes import Array, Float, UInt32, ndarray

T = TypeVar("T")


def check_grid(image_px: int, patch_px: int) -> None:
    """Frames must be cut into whole patches.

    Raises:
      ValueError: they are not.
    """
    if image_px % patch_px:
        raise ValueError(
            f"vision.image_px is {image_px}, not a multiple of patch_px {patch_px}; "
            f"use {image_px // patch_px * patch_px} for example"
        )


class PatchEmbed(nnx.Module):
    """Cut frames into squares and project each: the reference's 3-D convolution of one frame, as a matrix product."""

    def __init__(self, side: int, width: int, *, rngs: nnx.Rngs) -> None:
        bound = 1 / math.sqrt(side * side * 3)  # PyTorch's default for a convolution, which the reference keeps
        shape = (side, side, 3, width)
        weight = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        bias = jax.random.uniform(rngs.params(), shape[-1:], jnp.float32, -bound, bound)
        self.w = layers.param(weight, (None, None, None, "vision_embed"))
        self.b = layers.param(bias, ("vision_embed",))

    def __call__(self, pixels: Float[Array, "B T height width 3"]) -> Float[Array, "B P E"]:
        weight = self.w[...].astype(pixels.dtype)
        clips, frames, height, width, channels = pixels.shape
        side = weight.shape[0]
        cut = pixels.reshape(clips, frames, height // side, side, width // side, side, channels)
        squares = cut.transpose(0, 1, 2, 4, 3, 5, 6).reshape(clips, -1, side * side * channels)
        return squares @ weight.reshape(-1, weight.shape[-1]) + self.b[...].astype(pixels.dtype)


def through(blocks: Any, x: T, *, remat: bool, branches: Float[Array, "Z 2 B"] | None = None) -> T:
    """`x`, patches or a tuple with patches, after every block of a stacked module. With `remat` each is computed again
    in the backward pass. A block gets its row of `branches` where they are given."""

    def spread(x: Any) -> Any:
        return jax.tree.map(lambda a: shard(a, "clips", None, None) if a.ndim == 3 else a, x)

    def step(x: Any, layer: tuple[Any, Array | None]) -> tuple[Any, None]:
        block, branch = layer
        return spread(block(x) if branch is None else block(x, branch)), None

    x = spread(x)
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if remat else step, x, (blocks, branches))[0]


def branches(keys: UInt32[Array, "N K"], rate: float, num_blocks: int, each: int = 1) -> Float[Array, "Z 2 B"]:
    """What both branches of every block are multiplied by, for `each` samples of every clip: 0 where one is dropped.

    Stochastic depth (`DropPath` in the reference): a branch is dropped with a rate that rises from 0 in the first block
    to `rate` in the last, and counts 1 / (1 - its rate) otherwise. All of it follows from the clip's own key.
    """
    keep = (1 - np.linspace(0, rate, num_blocks))[:, None].astype(np.float32)

    def draw(key: Array) -> Array:
        return jax.random.uniform(jax.random.wrap_key_data(key), (each, num_blocks, 2))

    drawn = jax.vmap(draw)(keys).reshape(-1, num_blocks, 2)
    return jnp.where(drawn < keep, 1 / keep, np.float32(0)).transpose(1, 2, 0)


def survive(x: Float[Array, "B Q E"], branch: Float[Array, " B"] | None) -> Float[Array, "B Q E"]:
    """A branch as it is added: whole, or dropped for some samples."""
    return x if branch is None else x * branch[:, None, None].astype(x.dtype)


def check_rate(rate: float) -> None:
    """A rate of stochastic depth lies in [0, 1).

    Raises:
      ValueError: it does not.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"vision.drop_path is {rate}; it must be at least 0 and below 1")


def stretch(table: Float[ndarray, "T Y X E"], frames: int, rows: int, cols: int) -> Float[ndarray, "t y x E"]:
    """A table of learned positions for another clip: bicubic within a frame, linear along time."""
    for axis, length, kernel in ((2, cols, cubic), (1, rows, cubic), (0, frames, linear)):
        if table.shape[axis] != length:
            table = resample(table, axis, length, kernel)
    return table


def stretching(old: int, new: int) -> Float[ndarray, "new old"]:
    """The matrix that stretches one side of a grid, for positions that are parameters (bicubic)."""
    return resample(np.eye(old, dtype=np.float32), 0, new, cubic)


def resample(
    table: np.ndarray, axis: int, length: int, kernel: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Stretch one axis to `length` (`torch.nn.functional.interpolate`, align_corners False), the border repeated."""
    old = table.shape[axis]
    where = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * np.float32(old / length) - np.float32(0.5)
    offsets, weights = kernel(where - np.floor(where))
    out: np.ndarray | None = None
    for offset, weight in zip(offsets, weights, strict=True):
        taken = np.take(table, np.clip(np.floor(where).astype(int) + offset, 0, old - 1), axis)
        weight = weight.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(table.ndim)])
        # One rounding for each multiply and add, like the fused instruction the recorded tables come from.
        out = taken * weight if out is None else (taken.astype(np.float64) * weight + out).astype(np.float32)
    assert out is not None
    return out


def linear(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the neighbours of a place `t` behind one, and their weights."""
    return np.array([1, 0]), np.stack([t, 1 - t])


def cubic(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's bicubic weights: a = -0.75 (`jax.image.resize` has -0.5)."""
    a = -0.75

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return np.array([0, -1, 1, 2]), np.stack([near(t), far(t + 1), near(1 - t), far(2 - t)])
