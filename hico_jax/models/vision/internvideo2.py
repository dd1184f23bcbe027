"""InternVideo2: the video tower of the 1-billion-parameter models. Learned positions, a class token, no final norm.

In: normalized pixels of clips `[B T height width 3]`. Out: patches `[B P E]`, frame by frame, row by row; the class
token helps them through the blocks and then goes.
Next: hico_jax/models/compress/tome.py
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.models import layers
from hico_jax.models.attention import attend
from hico_jax.models.vision import patches
from hico_jax.shapes import Array, Float, UInt32, ndarray


@dataclasses.dataclass(frozen=True)
class InternVideo2Config:
    """Sizes of an InternVideo2 tower."""

    arch: ClassVar[str] = "internvideo2"

    image_px: int = 224  # side of a frame
    patch_px: int = 14
    embed_dim: int = 1408
    num_blocks: int = 39  # that exist: the reference builds one fewer than its nominal depth of 40
    num_heads: int = 16
    mlp_ratio: float = 48 / 11
    frames_per_clip: int = 4
    image_positions: bool = True  # images have a table of their own; otherwise the mean of the clip's over time
    remat: bool = False  # compute each block again in the backward pass instead of keeping its activations
    drop_path: float = 0.25  # the last block's rate of stochastic depth, in training only, frozen or not

    def __post_init__(self) -> None:
        patches.check_grid(self.image_px, self.patch_px)
        patches.check_rate(self.drop_path)
        if self.embed_dim % self.num_heads or self.embed_dim % 16:
            raise ValueError(
                f"vision.embed_dim is {self.embed_dim}; it must be a multiple of 16 and of num_heads {self.num_heads}"
            )

    @property
    def patches_per_frame(self) -> int:
        return (self.image_px // self.patch_px) ** 2

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def merge_heads(self) -> int:
        return self.num_heads

    def build(self, *, rngs: nnx.Rngs) -> InternVideo2:
        """The tower with random weights."""
        return InternVideo2(self, rngs=rngs)


VARIANTS = {
    "internvideo2-1b": InternVideo2Config(),
    "tiny": InternVideo2Config(image_px=28, embed_dim=32, num_blocks=2, num_heads=2),
}


class InternVideo2(nnx.Module):
    """The tower (`PretrainVisionTransformer_clean` in the reference, with `x_vis_only`)."""

    def __init__(self, config: InternVideo2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, grid = config.embed_dim, config.image_px // config.patch_px
        axes = (None, "vision_embed")
        self.patch = patches.PatchEmbed(config.patch_px, width, rngs=rngs)
        self.cls = layers.param(layers.normal(rngs, (1, width), 0.02), axes)
        self.positions = layers.param(jnp.asarray(sincos(width, grid, config.frames_per_clip)), axes)
        self.image_positions = (
            layers.param(jnp.asarray(sincos(width, grid, 1)), axes) if config.image_positions else None
        )
        self.blocks = layers.stack(lambda r: Block(config, rngs=r), config.num_blocks, rngs)

    def __call__(
        self, pixels: Float[Array, "B T height width 3"], keys: UInt32[Array, "B K"] | None = None
    ) -> Float[Array, "B P E"]:
        """Patches of every clip. A clip of one frame is an image and has positions of its own.

        A random key for each clip makes it a training pass: branches are dropped (stochastic depth).

        Raises:
          ValueError: frames are not of the configured size, or not as many as the positions are for.
        """
        config, (frames, *size) = self.config, pixels.shape[1:4]
        if size != [config.image_px, config.image_px] or frames not in (1, config.frames_per_clip):
            raise ValueError(
                f"clips are {frames} frames of {size[0]} x {size[1]} pixels but the tower takes "
                f"{config.frames_per_clip} (or one: an image) of {config.image_px} x {config.image_px}. "
                "Resize them or change vision.image_px."
            )
        x = self.patch(pixels)
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self._table(frames).astype(x.dtype)
        branches = None if keys is None else patches.branches(keys, config.drop_path, config.num_blocks)
        return patches.through(self.blocks, x, remat=config.remat, branches=branches)[:, 1:]

    def _table(self, frames: int) -> Float[Array, "Q E"]:
        table = self.positions[...]
        if frames == self.config.frames_per_clip:
            return table
        if self.image_positions is not None:
            return self.image_positions[...]
        of_clip = table[1:].reshape(self.config.frames_per_clip, -1, table.shape[-1])
        return jnp.concatenate([table[:1], of_clip.mean(0)])


class Block(nnx.Module):
    """Pre-norm attention and MLP, each scaled channel by channel before it is added."""

    def __init__(self, config: InternVideo2Config, *, rngs: nnx.Rngs) -> None:
        dim, mlp_dim = config.embed_dim, config.mlp_dim
        self.norm1 = layers.RMSNorm(dim, eps=1e-6, axis="vision_embed")
        self.attn = Attention(config, rngs=rngs)
        self.scale1 = layers.param(jnp.full(dim, 1e-5), ("vision_embed",))
        self.norm2 = layers.RMSNorm(dim, eps=1e-6, axis="vision_embed")
        self.up = layers.Linear(dim, mlp_dim, ("vision_embed", "mlp"), rngs=rngs, stddev=0.02)
        self.down = layers.Linear(mlp_dim, dim, ("mlp", "vision_embed"), rngs=rngs, stddev=0.02)
        self.scale2 = layers.param(jnp.full(dim, 1e-5), ("vision_embed",))

    def __call__(
        self, x: Float[Array, "B Q E"], branches: Float[Array, "2 B"] | tuple[None, None] = (None, None)
    ) -> Float[Array, "B Q E"]:
        x = x + patches.survive(scaled(self.attn(self.norm1(x)), self.scale1), branches[0])
        y = scaled(self.down(layers.gelu(self.up(self.norm2(x)))), self.scale2)
        return x + patches.survive(y, branches[1])


def scaled(x: Float[Array, "B Q E"], scale: nnx.Param) -> Float[Array, "B Q E"]:
    """`x * scale`, multiplied in float32 (the reference leaves autocast for it)."""
    return (x.astype(jnp.float32) * scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """All patches of a clip see each other; queries and keys are normed over all heads together."""

    def __init__(self, config: InternVideo2Config, *, rngs: nnx.Rngs) -> None:
        dim, heads = config.embed_dim, config.num_heads
        width = dim // heads
        qkv = layers.normal(rngs, (dim, 3, heads, width), 0.02)
        self.wqkv = layers.param(qkv, ("vision_embed", None, "heads", "head_dim"))
        self.q_norm = layers.RMSNorm(dim, eps=1e-6, axis="vision_embed")
        self.k_norm = layers.RMSNorm(dim, eps=1e-6, axis="vision_embed")
        self.wo = layers.param(layers.normal(rngs, (heads, width, dim), 0.02), ("heads", "head_dim", "vision_embed"))
        self.o_bias = layers.param(jnp.zeros(dim), ("vision_embed",))

    def __call__(self, x: Float[Array, "B Q E"]) -> Float[Array, "B Q E"]:
        dtype = x.dtype
        q, k, v = jnp.einsum("BPE,EcHd->cBPHd", x, self.wqkv[...].astype(dtype))
        q = self.q_norm(q.reshape(x.shape)).reshape(q.shape)
        k = self.k_norm(k.reshape(x.shape)).reshape(k.shape)
        seen = attend(q, k, v, causal=False)
        return jnp.einsum("BPHd,HdE->BPE", seen, self.wo[...].astype(dtype)) + self.o_bias[...].astype(dtype)


def sincos(embed_dim: int, grid: int, frames: int, *, cls: bool = True) -> Float[ndarray, "Q E"]:
    """Positions to start from: a quarter of the width counts frames, the rest columns and rows.

    `get_3d_sincos_pos_embed` in the reference.
    """

    def code(width: int, places: np.ndarray) -> np.ndarray:
        speed = 1 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
        angles = places.reshape(-1)[:, None].astype(np.float64) * speed
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    of_time, of_space = embed_dim // 4, embed_dim // 4 * 3
    column, row = np.meshgrid(np.arange(grid), np.arange(grid))
    space = np.concatenate([code(of_space // 2, column), code(of_space // 2, row)], axis=1)
    time = code(of_time, np.arange(frames))
    table = np.concatenate([time.repeat(grid**2, 0), np.tile(space, (frames, 1))], axis=1)
    return np.concatenate([np.zeros((int(cls), embed_dim)), table]).astype(np.float32)


def stretch_positions(
    table: Float[ndarray, "Q E"], old: tuple[int, int], new: tuple[int, int]
) -> Float[ndarray, "R E"]:
    """A learned table, class row first, for another (frames, grid) (`interpolate_pos_embed_internvideo2`)."""
    (frames, grid), (to_frames, to_grid) = old, new
    places = table[1:].reshape(frames, grid, grid, table.shape[-1])
    return np.concatenate(
        [table[:1], patches.stretch(places, to_frames, to_grid, to_grid).reshape(-1, table.shape[-1])]
    )


_TOWER = "model.vision_tower.vision_tower"
_BLOCK = f"{_TOWER}.blocks.{{i}}"
TORCH_NAMES = (
    Rule(f"{_TOWER}.cls_token", "vision/cls", "1 Q E -> (1 Q) E"),
    Rule(f"{_TOWER}.pos_embed", "vision/positions", "1 Q E -> (1 Q) E"),
    Rule(f"{_TOWER}.img_pos_embed", "vision/image_positions", "1 Q E -> (1 Q) E", optional=True),
    Rule(f"{_TOWER}.patch_embed.proj.weight", "vision/patch/w", "E c 1 y x -> y x (1 c) E"),
    Rule(f"{_TOWER}.patch_embed.proj.bias", "vision/patch/b"),
    Rule(f"{_BLOCK}.norm1.weight", "vision/blocks/norm1/scale"),
    Rule(f"{_BLOCK}.attn.qkv.weight", "vision/blocks/attn/wqkv", "(3 H d) E -> E 3 H d"),
    Rule(f"{_BLOCK}.attn.q_norm.weight", "vision/blocks/attn/q_norm/scale"),
    Rule(f"{_BLOCK}.attn.k_norm.weight", "vision/blocks/attn/k_norm/scale"),
    Rule(f"{_BLOCK}.attn.proj.weight", "vision/blocks/attn/wo", "E (H d) -> H d E"),
    Rule(f"{_BLOCK}.attn.proj.bias", "vision/blocks/attn/o_bias"),
    Rule(f"{_BLOCK}.ls1.weight", "vision/blocks/scale1"),
    Rule(f"{_BLOCK}.norm2.weight", "vision/blocks/norm2/scale"),
    Rule(f"{_BLOCK}.mlp.fc1.weight", "vision/blocks/up/w", "F E -> E F"),
    Rule(f"{_BLOCK}.mlp.fc1.bias", "vision/blocks/up/b"),
    Rule(f"{_BLOCK}.mlp.fc2.weight", "vision/blocks/down/w", "E F -> F E"),
    Rule(f"{_BLOCK}.mlp.fc2.bias", "vision/blocks/down/b"),
    Rule(f"{_BLOCK}.ls2.weight", "vision/blocks/scale2"),
)
