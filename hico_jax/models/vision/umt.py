"""UMT: the video tower of the released 224 and 448 pixel models. Space and time attend together within a clip.

In: normalized pixels of clips `[B T height width 3]`. Out: patches `[B P E]`, frame by frame, row by row.
Next: hico_jax/models/compress/tome.py
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.models import layers
from hico_jax.models.attention import attend
from hico_jax.models.vision import patches
from hico_jax.shapes import Array, Float, ndarray


@dataclasses.dataclass(frozen=True)
class UMTConfig:
    """Sizes of a UMT tower."""

    arch: ClassVar[str] = "umt"

    image_px: int = 224  # side of a frame
    patch_px: int = 16
    embed_dim: int = 1024
    num_blocks: int = 23  # that exist: the reference builds one fewer than its nominal depth of 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    frames_per_clip: int = 4
    pretrain_grid: int = 14  # side of the grid of patches whose positions were learned in pre-training
    pretrain_frames: int = 4
    remat: bool = False  # compute each block again in the backward pass instead of keeping its activations

    def __post_init__(self) -> None:
        patches.check_grid(self.image_px, self.patch_px)
        if self.embed_dim % self.num_heads or self.embed_dim % 2:
            raise ValueError(f"vision.embed_dim is {self.embed_dim}; it must be even and a multiple of num_heads")

    @property
    def patches_per_frame(self) -> int:
        return (self.image_px // self.patch_px) ** 2

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def merge_heads(self) -> int:
        return self.num_heads

    def build(self, *, rngs: nnx.Rngs) -> UMT:
        """The tower with random weights."""
        return UMT(self, rngs=rngs)


_NANO = UMTConfig(image_px=64, embed_dim=96, num_blocks=2, num_heads=4, pretrain_grid=4)
_HICO_NANO = UMTConfig(image_px=80, patch_px=8, embed_dim=192, num_blocks=6, num_heads=3, pretrain_grid=10)
VARIANTS = {
    "umt-large": UMTConfig(),
    "umt-hd-large": UMTConfig(image_px=448),
    "nano": _NANO,
    "nano-hd": dataclasses.replace(_NANO, image_px=80),
    "hico-nano": _HICO_NANO,
    "hico-nano-hd": dataclasses.replace(_HICO_NANO, image_px=112),  # 196 patches a frame, as 224 pixels give UMT-L
    "tiny": UMTConfig(image_px=32, embed_dim=32, num_blocks=2, num_heads=2, pretrain_grid=2),
}


# A sum is left to the norm behind it, which reads it anyway: the stream, what is to be added, and a bias to be added.
Carry = tuple[Float[Array, "B P E"], Float[Array, "B P E"], Float[Array, " E"]]


class UMT(nnx.Module):
    """The tower (`PretrainVisionTransformer` in the reference). No class token; a final norm of its own epsilon."""

    def __init__(self, config: UMTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch = patches.PatchEmbed(config.patch_px, config.embed_dim, rngs=rngs)
        self.blocks = layers.stack(lambda r: Block(config, rngs=r), config.num_blocks, rngs)
        self.norm = layers.LayerNorm(config.embed_dim, eps=1e-12, axis="vision_embed")

    def __call__(self, pixels: Float[Array, "B T height width 3"]) -> Float[Array, "B P E"]:
        """Patches of every clip. A clip of one frame is an image and has positions of its own.

        Raises:
          ValueError: frames are not of the configured size.
        """
        config, (frames, *size) = self.config, pixels.shape[1:4]
        if size != [config.image_px, config.image_px]:
            raise ValueError(
                f"frames are {size[0]} x {size[1]} pixels but the tower takes {config.image_px} x {config.image_px}. "
                "Resize them or change vision.image_px."
            )
        table = positions(
            config.embed_dim, config.image_px // config.patch_px, frames, config.pretrain_grid, config.pretrain_frames
        )
        x = self.patch(pixels)
        x = x + jnp.asarray(table, x.dtype)
        start = (x, jnp.zeros_like(x), jnp.zeros(config.embed_dim, x.dtype))
        return self.norm.after(*patches.through(self.blocks, start, remat=config.remat))[1]


class Block(nnx.Module):
    """Pre-norm attention and MLP. No dropout, no layer scale."""

    def __init__(self, config: UMTConfig, *, rngs: nnx.Rngs) -> None:
        dim, mlp_dim = config.embed_dim, config.mlp_dim
        self.norm1 = layers.LayerNorm(dim, eps=1e-6, axis="vision_embed")
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = layers.LayerNorm(dim, eps=1e-6, axis="vision_embed")
        self.up = layers.Linear(dim, mlp_dim, ("vision_embed", "mlp"), rngs=rngs)
        self.down = layers.Linear(mlp_dim, dim, ("mlp", "vision_embed"), rngs=rngs)

    def __call__(self, stream: Carry) -> Carry:
        """The stream's sum through the block, whose own last sum is left to be done."""
        x, normed = self.norm1.after(*stream)
        x, normed = self.norm2.after(x, *self.attn(normed))
        middle = layers.gelu(self.up(normed))
        assert self.down.b is not None
        return x, middle @ self.down.w[...].astype(x.dtype), self.down.b[...].astype(x.dtype)


class Attention(nnx.Module):
    """All patches of a clip see each other. Queries and values have a bias, keys have none."""

    def __init__(self, config: UMTConfig, *, rngs: nnx.Rngs) -> None:
        dim, heads = config.embed_dim, config.num_heads
        head_dim = dim // heads
        qkv = layers.xavier_uniform(rngs, (dim, 3, heads, head_dim), dim, 3 * dim)
        out = layers.xavier_uniform(rngs, (heads, head_dim, dim), dim, dim)
        self.wqkv = layers.param(qkv, ("vision_embed", None, "heads", "head_dim"))
        self.q_bias = layers.param(jnp.zeros((heads, head_dim)), ("heads", "head_dim"))
        self.v_bias = layers.param(jnp.zeros((heads, head_dim)), ("heads", "head_dim"))
        self.wo = layers.param(out, ("heads", "head_dim", "vision_embed"))
        self.o_bias = layers.param(jnp.zeros(dim), ("vision_embed",))

    def __call__(self, x: Float[Array, "B P E"]) -> tuple[Float[Array, "B P E"], Float[Array, " E"]]:
        """What attention adds to the stream, and the bias that belongs to it."""
        dtype = x.dtype
        weights, wo = self.wqkv[...].astype(dtype), self.wo[...].astype(dtype)
        # Three products: the parts of one would have to be copied apart for the attention kernel.
        q, k, v = (jnp.einsum("BPE,EHd->BPHd", x, weights[:, i]) for i in range(3))
        seen = attend(q + self.q_bias[...].astype(dtype), k, v, causal=False)
        # Weights of attention add up to 1, so the values' bias may as well be added behind it, once for all patches.
        bias = jnp.einsum("Hd,HdE->E", self.v_bias[...].astype(dtype), wo, preferred_element_type=jnp.float32)
        bias = bias + self.o_bias[...].astype(jnp.float32)
        return jnp.einsum("BPHd,HdE->BPE", seen, wo), bias.astype(dtype)


@functools.cache
def positions(
    embed_dim: int, grid: int, frames: int, pretrain_grid: int = 14, pretrain_frames: int = 4
) -> Float[ndarray, "P E"]:
    """The constant table of positions: one sinusoid over the flat patch index of the pre-training clip.

    A larger image stretches each frame of it (bicubic), another number of frames stretches time (linear). One
    frame is an image: it takes the first frame's positions, unstretched in time
    (`get_sinusoid_encoding_table` and `get_sinusoid_encoding_table2` in the reference).
    """
    base_frames = 1 if frames == 1 else pretrain_frames
    channel = np.arange(embed_dim) // 2 * 2
    angles = np.arange(base_frames * pretrain_grid**2)[:, None] / np.power(10000, channel / embed_dim)
    table = np.where(np.arange(embed_dim) % 2 == 0, np.sin(angles), np.cos(angles)).astype(np.float32)
    table = table.reshape(base_frames, pretrain_grid, pretrain_grid, embed_dim)
    if grid != pretrain_grid:
        for axis in (2, 1):  # along the width first, as the reference rounds
            table = patches.resample(table, axis, grid, patches.cubic)
    if frames != base_frames:
        table = patches.resample(table, 0, frames, patches.linear)
    table = table.reshape(-1, embed_dim)
    table.setflags(write=False)
    return table


_TOWER = "model.vision_tower.vision_tower.encoder"
_BLOCK = f"{_TOWER}.blocks.{{i}}"
TORCH_NAMES = (
    Rule(f"{_TOWER}.patch_embed.proj.weight", "vision/patch/w", "E c 1 y x -> y x (1 c) E"),
    Rule(f"{_TOWER}.patch_embed.proj.bias", "vision/patch/b"),
    Rule(f"{_BLOCK}.norm1.weight", "vision/blocks/norm1/scale"),
    Rule(f"{_BLOCK}.norm1.bias", "vision/blocks/norm1/bias"),
    Rule(f"{_BLOCK}.attn.qkv.weight", "vision/blocks/attn/wqkv", "(3 H d) E -> E 3 H d"),
    Rule(f"{_BLOCK}.attn.q_bias", "vision/blocks/attn/q_bias", "(H d) -> H d"),
    Rule(f"{_BLOCK}.attn.v_bias", "vision/blocks/attn/v_bias", "(H d) -> H d"),
    Rule(f"{_BLOCK}.attn.proj.weight", "vision/blocks/attn/wo", "E (H d) -> H d E"),
    Rule(f"{_BLOCK}.attn.proj.bias", "vision/blocks/attn/o_bias"),
    Rule(f"{_BLOCK}.norm2.weight", "vision/blocks/norm2/scale"),
    Rule(f"{_BLOCK}.norm2.bias", "vision/blocks/norm2/bias"),
    Rule(f"{_BLOCK}.mlp.fc1.weight", "vision/blocks/up/w", "F E -> E F"),
    Rule(f"{_BLOCK}.mlp.fc1.bias", "vision/blocks/up/b"),
    Rule(f"{_BLOCK}.mlp.fc2.weight", "vision/blocks/down/w", "E F -> F E"),
    Rule(f"{_BLOCK}.mlp.fc2.bias", "vision/blocks/down/b"),
    Rule(f"{_TOWER}.vision_layernorm.weight", "vision/norm/scale"),
    Rule(f"{_TOWER}.vision_layernorm.bias", "vision/norm/bias"),
)
