"""The story: encode clips, merge tokens, project them, splice them into the text, decode.

In: a `Batch`. Out: a `Stream` of hidden states with their targets (never logits: `losses.py` and
`generate.py` multiply by the unembedding where they need it).
Next: hico_jax/models/vision/umt.py
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.batch import Batch, DropSchedule, Geometry
from hico_jax.models.llm.decoder import Stream
from hico_jax.models.projector import KINDS, Projector
from hico_jax.parallel import sharding, spread
from hico_jax.parallel.sharding import shard
from hico_jax.shapes import Array, Float, Int, UInt8, UInt32

PIXEL_MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in [0, 1]
PIXEL_STD = (0.229, 0.224, 0.225)


class VisionConfig(Protocol):
    """What a tower's configuration tells the rest of the house."""

    @property
    def image_px(self) -> int: ...
    @property
    def frames_per_clip(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def merge_heads(self) -> int: ...  # heads over which a compressor averages patches before comparing them
    def build(self, *, rngs: nnx.Rngs) -> Any: ...


class CompressorConfig(Protocol):
    """What a compressor's configuration tells the rest of the house."""

    @property
    def tokens_per_frame(self) -> int: ...
    @property
    def tokens_per_image(self) -> int: ...
    def build(self, *, num_heads: int) -> Any: ...


class LanguageConfig(Protocol):
    """What a language model's configuration tells the rest of the house."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    def build(self, *, rngs: nnx.Rngs) -> Any: ...


@dataclasses.dataclass(frozen=True)
class HiCoConfig:
    """A whole model: tower, compressor, language model, and the numbers that join them."""

    vision: Any  # a VisionConfig registered in registry.VISION
    compressor: Any  # a CompressorConfig registered in registry.COMPRESSOR
    llm: Any  # a LanguageConfig registered in registry.LLM
    drop: DropSchedule = dataclasses.field(default_factory=DropSchedule)  # video-level compression; off, as released
    max_length: int = 32768  # longest row after visual expansion (`tokenizer_model_max_length`)
    dtype: str = "bfloat16"  # of activations; "float32" for parity
    projector: str = "mlp"  # or "norm_mlp", which the InternVL models have (`projector.py`)

    def __post_init__(self) -> None:
        if self.projector not in KINDS:
            raise ValueError(f"model.projector is {self.projector!r}; it must be one of {', '.join(KINDS)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"model.dtype is {self.dtype!r}; it must be 'bfloat16' or 'float32'")
        if self.drop.num_stages and self.drop.layers[-1] >= self.llm.num_layers:
            raise ValueError(
                f"drop.layers is {self.drop.layers} but the language model has {self.llm.num_layers} layers; "
                f"the last entry must be below {self.llm.num_layers}"
            )

    def geometry(self) -> Geometry:
        """What the host needs to lay out rows for this model."""
        return Geometry(
            image_px=self.vision.image_px,
            frames_per_clip=self.vision.frames_per_clip,
            tokens_per_clip=self.compressor.tokens_per_frame * self.vision.frames_per_clip,
            tokens_per_image=self.compressor.tokens_per_image,
            max_length=self.max_length,
            drop=self.drop,
        )

    def build(self, *, rngs: nnx.Rngs) -> HiCo:
        """The model with random weights. Wrap in `nnx.eval_shape` for an abstract one."""
        return HiCo(self, rngs=rngs)


class HiCo(nnx.Module):
    """A video ViT, token merging, a projector and a language model (`LlavaQwenForCausalLM` in the reference)."""

    def __init__(self, config: HiCoConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vision = config.vision.build(rngs=rngs)
        self.compressor = config.compressor.build(num_heads=config.vision.merge_heads)
        self.projector = Projector(
            config.vision.embed_dim, config.llm.embed_dim, normed=config.projector == "norm_mlp", rngs=rngs
        )
        self.llm = config.llm.build(rngs=rngs)

    def __call__(self, batch: Batch, keys: UInt32[Array, "B K"] | None = None) -> Stream:
        """Hidden states of every token still alive after the last layer, in row order.

        A random key for each row makes it a training pass of the tower (stochastic depth, where the tower has it).
        """
        visual = self.encode(batch.clips, batch.images, keys)
        stream, _ = self.llm(self.splice(batch, visual), batch.drop, schedule=self.config.drop)
        return stream

    def encode(
        self,
        clips: UInt8[Array, "B N T height width 3"] | Float[Array, "B N T height width 3"],
        images: UInt8[Array, "B I height width 3"] | Float[Array, "B I height width 3"],
        keys: UInt32[Array, "B K"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Visual tokens of each row, clips first, then image tiles: S = N * tokens_per_clip + I * tokens_per_image."""
        geometry = self.config.geometry()
        if getattr(self.config.vision, "drop_path", 0) == 0:
            keys = None
        tokens = self._encode(clips, geometry.tokens_per_clip, clip_keys(keys, 0, clips.shape[1]))
        tiles = self._encode(images[:, :, None], geometry.tokens_per_image, clip_keys(keys, 1, images.shape[1]))
        return jnp.concatenate([tokens, tiles], axis=1)

    def _encode(self, clips: Array, num_tokens: int, keys: Array | None) -> Float[Array, "B S D"]:
        rows, num_clips = clips.shape[:2]
        dtype = jnp.dtype(self.config.dtype)
        if num_clips == 0:
            return jnp.zeros((rows, 0, self.config.llm.embed_dim), dtype)

        def some(parts: Any, some_clips: tuple[Array, Array | None]) -> Float[Array, "N M D"]:
            (vision, compressor, projector), (clips, keys) = parts, some_clips
            pixels = normalize(clips, dtype)
            patches = vision(pixels) if keys is None else vision(pixels, keys)  # N P E
            return projector(compressor(patches, num_tokens, clips.shape[1]))  # N M D

        flat = clips.reshape(-1, *clips.shape[2:])
        projected = spread.each_clip(some, (self.vision, self.compressor, self.projector), (flat, keys))
        return projected.reshape(rows, num_clips * num_tokens, -1)

    def splice(self, batch: Batch, visual: Float[Array, "B S D"]) -> Stream:
        """Text embeddings with each visual token put where the host said it sits."""
        x = self.llm.embed(batch.tokens).astype(visual.dtype)
        return Stream.begin(splice(x, visual, batch.slots), batch)


def clip_keys(keys: UInt32[Array, "B K"] | None, kind: int, count: int) -> UInt32[Array, "N K"] | None:
    """A key for each of the first `count` clips (kind 0) or tiles (kind 1) of every row, by its number in the row.

    Neither the mesh, nor micro-batches, nor how far the batch is padded change a clip's key.
    """
    if keys is None:
        return None

    def of_row(data: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(data), kind)
        return jax.vmap(lambda n: jax.random.key_data(jax.random.fold_in(key, n)))(jnp.arange(count))

    return jax.vmap(of_row)(keys).reshape(-1, keys.shape[-1])


def splice(
    text: Float[Array, "B L D"], visual: Float[Array, "B S D"], slots: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """`visual[b, slots[b, l]]` where a slot is given, the text embedding elsewhere."""
    if visual.shape[1] == 0:
        return text
    if sharding.ring() > 1:
        return spread.fetch(visual, slots, text)
    placed = jnp.take_along_axis(visual, jnp.maximum(slots, 0)[..., None], axis=1)
    return shard(jnp.where(slots[..., None] >= 0, placed, text), "batch", "length", None)


def normalize(pixels: Array, dtype: Any) -> Float[Array, "*lead 3"]:
    """uint8 RGB to the tower's range: x / 255, minus mean, over std. Floats are in it already and only cast.

    float32 is looked up, because it must equal the reference's host arithmetic bit for bit and compilers turn a
    division into a product and fuse it. In bfloat16 their difference rounds away (tests check all values), and
    arithmetic spares a TPU the gather.
    """
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        return pixels.astype(dtype)
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.asarray(PIXELS)[pixels.astype(jnp.int32), jnp.arange(3, dtype=jnp.int32)]
    scaled = pixels.astype(jnp.float32) * np.float32(1 / 255)
    return ((scaled - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)).astype(dtype)


def _pixels() -> np.ndarray:
    """[256, 3]: what the reference makes of every byte in every channel."""
    scaled = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)
    return (scaled - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)


PIXELS = _pixels()
