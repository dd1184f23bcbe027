"""InternViT: the tower of the InternVL HiCo models. Each frame alone, then four patches become one wide one.

In: normalized pixels of clips `[B T height width 3]`. Out: patches `[B P E]`, frame by frame, row by row, each the
four neighbours of a 2 x 2 square side by side (E is four times the width inside).
Next: hico_jax/models/compress/tome.py
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.models import layers
from hico_jax.models.attention import attend
from hico_jax.models.vision import patches
from hico_jax.shapes import Array, Float, UInt32

SQUARE = 2  # side of the square of patches that become one


@dataclasses.dataclass(frozen=True)
class InternViTConfig:
    """Sizes of an InternViT tower."""

    arch: ClassVar[str] = "internvit"

    image_px: int = 448  # side of a frame, for which the positions were learned; others are taken too
    patch_px: int = 14
    width: int = 1024  # inside the tower
    mlp_dim: int = 4096
    num_blocks: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-6
    merge_heads: int = 32  # the reference takes the language model's number of heads
    frames_per_clip: int = 4  # that are merged together
    remat: bool = False  # compute each block again in the backward pass instead of keeping its activations
    drop_path: float = 0.1  # the last block's rate of stochastic depth, in training only, frozen or not

    def __post_init__(self) -> None:
        patches.check_rate(self.drop_path)
        side = self.patch_px * SQUARE
        if self.image_px % side:
            raise ValueError(
                f"vision.image_px is {self.image_px}, not a multiple of {side} (two patches); "
                f"use {self.image_px // side * side} for example"
            )
        if self.width % self.num_heads or self.embed_dim % self.merge_heads:
            raise ValueError(
                f"vision.width is {self.width}; it must be a multiple of num_heads {self.num_heads}, and four times it "
                f"one of merge_heads {self.merge_heads}"
            )

    @property
    def embed_dim(self) -> int:
        return self.width * SQUARE**2

    @property
    def patches_per_frame(self) -> int:
        return (self.image_px // self.patch_px // SQUARE) ** 2

    def build(self, *, rngs: nnx.Rngs) -> InternViT:
        """The tower with random weights."""
        return InternViT(self, rngs=rngs)


VARIANTS = {
    "internvit-300m": InternViTConfig(),
    "tiny": InternViTConfig(
        image_px=56, width=16, mlp_dim=32, num_blocks=2, num_heads=2, merge_heads=4
    ),
}  # fmt: skip


class InternViT(nnx.Module):
    """The tower (`InternVisionModel` and `pixel_shuffle` in the reference). No norm after the last block."""

    def __init__(self, config: InternViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        grid = config.image_px // config.patch_px
        axes = (None, "vision_embed")
        self.patch = patches.PatchEmbed(config.patch_px, config.width, rngs=rngs)
        self.cls = layers.param(layers.normal(rngs, (1, config.width), 1.0), axes)
        self.positions = layers.param(layers.normal(rngs, (1 + grid**2, config.width), 1.0), axes)
        self.blocks = layers.stack(lambda r: Block(config, rngs=r), config.num_blocks, rngs)

    def __call__(
        self, pixels: Float[Array, "B T height width 3"], keys: UInt32[Array, "B K"] | None = None
    ) -> Float[Array, "B P E"]:
        """Patches of every clip.

        A random key for each clip makes it a training pass: branches are dropped, frame by frame (stochastic depth).

        Raises:
          ValueError: a side of the frames is not an even number of patches.
        """
        clips, frames, *size = pixels.shape[:4]
        side = self.config.patch_px * SQUARE
        if any(px % side for px in size):
            raise ValueError(
                f"frames are {size[0]} x {size[1]} pixels but the tower takes multiples of {side}. "
                "Resize them or change vision.image_px."
            )
        rows, cols = (px // self.config.patch_px for px in size)
        config = self.config
        branches = None if keys is None else patches.branches(keys, config.drop_path, config.num_blocks, frames)
        x = self.states(pixels.reshape(clips * frames, 1, *pixels.shape[2:]), branches)[:, 1:]
        x = pixel_shuffle(x.reshape(-1, rows, cols, x.shape[-1]))
        return x.reshape(clips, -1, x.shape[-1])

    def states(
        self, pixels: Float[Array, "B 1 height width 3"], branches: Float[Array, "Z 2 B"] | None = None
    ) -> Float[Array, "B Q W"]:
        """The class token and every patch of each frame after the last block (`last_hidden_state`)."""
        config = self.config
        rows, cols = (px // config.patch_px for px in pixels.shape[2:4])
        x = self.patch(pixels)
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self._table(rows, cols).astype(x.dtype)
        return patches.through(self.blocks, x, remat=config.remat, branches=branches)

    def _table(self, rows: int, cols: int) -> Float[Array, "Q W"]:
        """The learned positions, stretched (bicubic, float32) to frames of another size."""
        table, grid = self.positions[...], self.config.image_px // self.config.patch_px
        if (rows, cols) == (grid, grid):
            return table
        places = table[1:].astype(jnp.float32).reshape(grid, grid, -1)
        down, across = patches.stretching(grid, rows), patches.stretching(grid, cols)
        # Exact products: the table is small, and TF32 would move every patch.
        places = jnp.einsum("yY,YXW,xX->yxW", down, places, across, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([table[:1], places.reshape(rows * cols, -1).astype(table.dtype)])


class Block(nnx.Module):
    """Pre-norm attention and MLP, each scaled channel by channel before it is added."""

    def __init__(self, config: InternViTConfig, *, rngs: nnx.Rngs) -> None:
        dim = config.width
        self.norm1 = layers.LayerNorm(dim, eps=config.norm_eps, axis="vision_embed")
        self.attn = Attention(config, rngs=rngs)
        self.scale1 = layers.param(jnp.ones(dim), ("vision_embed",))
        self.norm2 = layers.LayerNorm(dim, eps=config.norm_eps, axis="vision_embed")
        self.up = layers.Linear(dim, config.mlp_dim, ("vision_embed", "mlp"), rngs=rngs, stddev=0.02)
        self.down = layers.Linear(config.mlp_dim, dim, ("mlp", "vision_embed"), rngs=rngs, stddev=0.02)
        self.scale2 = layers.param(jnp.ones(dim), ("vision_embed",))

    def __call__(
        self, x: Float[Array, "B Q W"], branches: Float[Array, "2 B"] | tuple[None, None] = (None, None)
    ) -> Float[Array, "B Q W"]:
        x = x + patches.survive(self.attn(self.norm1(x)) * self.scale1[...].astype(x.dtype), branches[0])
        y = self.down(layers.gelu(self.up(self.norm2(x)))) * self.scale2[...].astype(x.dtype)
        return x + patches.survive(y, branches[1])


class Attention(nnx.Module):
    """All patches of a frame see each other; queries, keys and values have biases."""

    def __init__(self, config: InternViTConfig, *, rngs: nnx.Rngs) -> None:
        dim, heads = config.width, config.num_heads
        head_dim = dim // heads
        qkv = layers.normal(rngs, (dim, 3, heads, head_dim), 0.02)
        self.wqkv = layers.param(qkv, ("vision_embed", None, "heads", "head_dim"))
        self.qkv_bias = layers.param(jnp.zeros((3, heads, head_dim)), (None, "heads", "head_dim"))
        self.wo = layers.param(layers.normal(rngs, (heads, head_dim, dim), 0.02), ("heads", "head_dim", "vision_embed"))
        self.o_bias = layers.param(jnp.zeros(dim), ("vision_embed",))

    def __call__(self, x: Float[Array, "B Q W"]) -> Float[Array, "B Q W"]:
        dtype = x.dtype
        bias = self.qkv_bias[...].astype(dtype)[:, None, None]
        q, k, v = jnp.einsum("BPE,EcHd->cBPHd", x, self.wqkv[...].astype(dtype)) + bias
        seen = attend(q, k, v, causal=False)
        return jnp.einsum("BPHd,HdE->BPE", seen, self.wo[...].astype(dtype)) + self.o_bias[...].astype(dtype)


def pixel_shuffle(x: Float[Array, "B height width C"]) -> Float[Array, "B h w E"]:
    """Each 2 x 2 square of patches side by side, the upper two first (`pixel_shuffle`, version "v2")."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height // SQUARE, SQUARE, width // SQUARE, SQUARE, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, height // SQUARE, width // SQUARE, -1)


_BLOCK = "vision_model.encoder.layers.{i}"
TORCH_NAMES = (
    Rule("vision_model.embeddings.class_embedding", "vision/cls", "1 Q E -> (1 Q) E"),
    Rule("vision_model.embeddings.position_embedding", "vision/positions", "1 Q E -> (1 Q) E"),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/w", "E c y x -> y x c E"),
    Rule("vision_model.embeddings.patch_embedding.bias", "vision/patch/b"),
    Rule(f"{_BLOCK}.ls1", "vision/blocks/scale1"),
    Rule(f"{_BLOCK}.ls2", "vision/blocks/scale2"),
    Rule(f"{_BLOCK}.attn.qkv.weight", "vision/blocks/attn/wqkv", "(3 H d) E -> E 3 H d"),
    Rule(f"{_BLOCK}.attn.qkv.bias", "vision/blocks/attn/qkv_bias", "(3 H d) -> 3 H d"),
    Rule(f"{_BLOCK}.attn.proj.weight", "vision/blocks/attn/wo", "E (H d) -> H d E"),
    Rule(f"{_BLOCK}.attn.proj.bias", "vision/blocks/attn/o_bias"),
    Rule(f"{_BLOCK}.mlp.fc1.weight", "vision/blocks/up/w", "F E -> E F"),
    Rule(f"{_BLOCK}.mlp.fc1.bias", "vision/blocks/up/b"),
    Rule(f"{_BLOCK}.mlp.fc2.weight", "vision/blocks/down/w", "E F -> F E"),
    Rule(f"{_BLOCK}.mlp.fc2.bias", "vision/blocks/down/b"),
    Rule(f"{_BLOCK}.norm1.weight", "vision/blocks/norm1/scale"),
    Rule(f"{_BLOCK}.norm1.bias", "vision/blocks/norm1/bias"),
    Rule(f"{_BLOCK}.norm2.weight", "vision/blocks/norm2/scale"),
    Rule(f"{_BLOCK}.norm2.bias", "vision/blocks/norm2/bias"),
)
