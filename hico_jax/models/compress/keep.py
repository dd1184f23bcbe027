"""No compression: every patch is a token. What all others are measured against.

In: patches `[B P E]`. Out: the same.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """Numbers that must be the tower's own: (image_px / patch_px) squared, of a frame and of an image."""

    arch: ClassVar[str] = "none"

    tokens_per_frame: int = 196
    tokens_per_image: int = 196

    def build(self, *, num_heads: int) -> Keep:
        """The compressor; heads do not matter."""
        del num_heads
        return Keep()


VARIANTS = {
    "umt224": KeepConfig(),
    "umt448": KeepConfig(784, 784),
    "nano": KeepConfig(16, 16),
    "tiny": KeepConfig(4, 4),
}
TORCH_NAMES: tuple[Rule, ...] = ()


class Keep(nnx.Module):
    """The identity."""

    def __call__(self, patches: Float[Array, "B P E"], num_tokens: int, num_frames: int = 1) -> Float[Array, "B P E"]:
        if num_tokens != patches.shape[1]:
            raise ValueError(
                f"compressor 'none' was told of {num_tokens} tokens but the tower gives {patches.shape[1]} patches in "
                f"{num_frames} frames; set tokens_per_frame and tokens_per_image to the patches of one frame"
            )
        return patches
