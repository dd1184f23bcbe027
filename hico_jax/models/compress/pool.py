"""Average pooling: means over windows of each frame, over the clip's frames too, or over squares of two by two.

In: patches of clips or image tiles `[B P E]`. Out: `[B M E]`. No parameters.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.models.compress import grid
from hico_jax.shapes import Array, Float

KINDS = ("space", "time", "2x2")


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How many tokens remain, and what is averaged.

    "space": windows of each frame. "time": the frames of a clip first, so that a token keeps a finer place and loses
    its time. "2x2": squares of each frame, again and again until the number is reached, which must then be exact.
    """

    arch: ClassVar[str] = "pool"

    tokens_per_frame: int = 16
    tokens_per_image: int = 64
    kind: str = "space"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"compressor.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")

    def build(self, *, num_heads: int) -> Pool:
        """The compressor; heads do not matter."""
        del num_heads
        return Pool(self.kind)


VARIANTS = {
    "space16": PoolConfig(),
    "time16": PoolConfig(kind="time"),
    "2x2": PoolConfig(49, 49, "2x2"),
    "nano": PoolConfig(4, 16),
    "tiny": PoolConfig(1, 2),
}
TORCH_NAMES: tuple[Rule, ...] = ()


class Pool(nnx.Module):
    """Means of neighbours."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, patches: Float[Array, "B P E"], num_tokens: int, num_frames: int = 1) -> Float[Array, "B M E"]:
        per_frame, kept = grid.check(patches.shape[1], num_tokens, num_frames)
        x = patches.reshape(patches.shape[0], num_frames, per_frame, -1)
        edge = grid.side(per_frame)
        if self.kind == "time":
            # As few moments as hold the tokens: one, unless a single frame has fewer patches.
            moments = next(t for t in range(1, num_frames + 1) if num_tokens % t == 0 and num_tokens // t <= per_frame)
            return grid.pool(x, moments, *grid.shape(num_tokens // moments, edge))
        if self.kind == "2x2":
            reached = edge
            while reached * reached > kept:
                reached = -(-reached // 2)
            if reached * reached != kept:
                raise ValueError(
                    f"squares of 2 x 2 make no {kept} tokens of {edge} x {edge} patches; set compressor."
                    f"tokens_per_frame and tokens_per_image to {reached * reached}, for example"
                )
            return grid.pool(x, num_frames, reached, reached)
        return grid.pool(x, num_frames, *grid.shape(kept, edge))
