"""The contract between host and device: what one batch is, and the numbers both sides agree on.

`data_pipeline` ends in a `Batch`; the models begin with one. The host has decided which frames are seen,
where every token sits, what is a target and how many visual tokens each deeper layer keeps; the device
only gathers. Shapes are static.

In: rows from `data_pipeline/layout.py`. Out: the pytree that `models/hico.py` reads.
Next: hico_jax/models/hico.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

DROP_KINDS = ("none", "uniform", "attention", "uniform0_attention", "uniform1_attention")


@dataclasses.dataclass(frozen=True)
class DropSchedule:
    """Video-level compression: after which decoder layers visual tokens leave, and how many stay.

    `layers[s]` layers have run when stage `s` drops (the reference's `llm_compress_layer_list`);
    `ratios[s + 1]` of the row's visual tokens remain after it (`llm_image_token_ratio_list`). An attention stage keeps
    the best of the whole row; with `shares` above 1 the row is cut into so many equal parts and each keeps the best of
    its own, as many as its share of the visual tokens.

    Raises:
      ValueError: unknown kind, layers not increasing, ratios not one longer than layers or not falling, no share.
    """

    kind: str = "none"  # one of DROP_KINDS
    layers: tuple[int, ...] = ()
    ratios: tuple[float, ...] = (1.0,)  # ratios[0] is 1
    shares: int = 1  # parts of a row that attention stages choose in; over n devices 1, or a multiple of 2 n

    def __post_init__(self) -> None:
        if self.kind not in DROP_KINDS:
            raise ValueError(f"drop.kind is {self.kind!r}; it must be one of {', '.join(DROP_KINDS)}")
        if self.shares < 1:
            raise ValueError(f"drop.shares is {self.shares}; it must be 1 (the best of the whole row) or more")
        if self.kind == "none":
            return
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1:
            raise ValueError(f"drop.layers is {self.layers}; give increasing layer counts, the first at least 1")
        if len(self.ratios) != len(self.layers) + 1 or self.ratios[0] != 1.0:
            raise ValueError(
                f"drop.ratios is {self.ratios} for {len(self.layers)} layers; give one more ratio than layers, "
                "the first 1.0"
            )
        if any(b > a or b < 0 for a, b in zip(self.ratios, self.ratios[1:], strict=False)):
            raise ValueError(f"drop.ratios is {self.ratios}; ratios must not rise and must lie in [0, 1]")

    @property
    def num_stages(self) -> int:
        return 0 if self.kind == "none" else len(self.layers)

    @property
    def num_uniform(self) -> int:
        """How many of the first stages choose evenly; the rest choose by attention."""
        fixed = {"uniform": self.num_stages, "uniform0_attention": 1, "uniform1_attention": 2}
        return min(fixed.get(self.kind, 0), self.num_stages)

    def kept(self, num_visual: int) -> tuple[int, ...]:
        """Visual tokens alive after each stage: `int(N * ratio)` in Python floats, as the reference counts.

        Example:
          >>> DropSchedule("uniform", (4, 18), (1.0, 0.75, 0.25)).kept(1024)
          (768, 256)
        """
        return tuple(int(num_visual * r) for r in self.ratios[1:]) if self.num_stages else ()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the host must know of a model to lay out its rows. Made by `HiCoConfig.geometry()`."""

    image_px: int  # side of every frame and tile
    frames_per_clip: int  # 4 in every released model
    tokens_per_clip: int  # visual tokens of a clip after merging
    tokens_per_image: int  # visual tokens of one image tile after merging
    max_length: int  # longest row after visual expansion (`tokenizer_model_max_length`)
    drop: DropSchedule = DropSchedule()


@flax.struct.dataclass
class DropPlan:
    """Video-level compression of one batch, decided on the host as far as it can be.

    Uniform stages depend on counts alone, so the host says how many of them each token survives. Attention
    stages choose on the device, but how many stay is fixed here. `lengths` are the static row lengths after
    each stage: the longest row's text plus its kept visual tokens, rounded up by the host.
    """

    survives: Any  # Int8[B L]: uniform stages this token survives (text and padding: 127)
    keep: Any  # Int[B R stages]: visual tokens kept by segment r + 1 of the row after each stage
    labelled: Any  # Bool[B L]: this token is itself a target (training queries start where this turns on)
    lengths: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    num_queries: int = flax.struct.field(pytree_node=False, default=0)  # 0: the last token asks (inference)


@flax.struct.dataclass
class Batch:
    """What the host hands to the device. No decision is left to make.

    A visual token's slot counts the row's clips first (`clip * tokens_per_clip + i`), then its image tiles.
    `targets[j]` is the token that position `j` must predict (already shifted) and `weights[j]` its loss
    weight. Every token of a run of visual tokens carries the target of the token after the run, so that the
    last one alive can predict it whichever tokens are dropped; only the last one counts.
    """

    tokens: Any  # Int[B L]: text ids; 0 where a visual token sits
    slots: Any  # Int[B L]: which visual token of this row sits here; -1 for text and padding
    positions: Any  # Int[B L]: rotary position inside its segment
    segments: Any  # Int[B L]: 0 is padding; attention never crosses segments
    targets: Any  # Int[B L]
    weights: Any  # Float[B L]
    clips: Any  # UInt8[B N T height width 3]; N may be 0
    images: Any  # UInt8[B I height width 3]; I may be 0
    drop: DropPlan | None = None
    ring: int = flax.struct.field(pytree_node=False, default=1)  # devices the tokens are dealt to (parallel/zigzag.py)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape

    @classmethod
    def fake(
        cls,
        geometry: Geometry,
        *,
        rows: int = 2,
        clips: int = 2,
        images: int = 0,
        text: int = 12,
        vocab: int = 64,
        seed: int = 0,
    ) -> Batch:
        """A well-formed random batch for tests: four text tokens, the visual tokens, then the other text.

        The second half of the text after the visual tokens is supervised. Has no drop plan; see
        `data_pipeline.layout.plan_drop`.
        """
        rng = np.random.default_rng(seed)
        num_visual = clips * geometry.tokens_per_clip + images * geometry.tokens_per_image
        length = text + num_visual
        slots = np.full((rows, length), -1, np.int32)
        slots[:, 4 : 4 + num_visual] = np.arange(num_visual)
        tokens = np.where(slots < 0, rng.integers(3, vocab, (rows, length)), 0).astype(np.int32)
        targets = np.concatenate([tokens[:, 1:], np.zeros((rows, 1), np.int32)], axis=1)
        weights = np.zeros((rows, length), np.float32)
        weights[:, -(text // 2) : -1] = 1.0
        px = geometry.image_px
        return cls(
            tokens=tokens,
            slots=slots,
            positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
            segments=np.ones((rows, length), np.int32),
            targets=targets,
            weights=weights,
            clips=rng.integers(0, 256, (rows, clips, geometry.frames_per_clip, px, px, 3), dtype=np.uint8),
            images=rng.integers(0, 256, (rows, images, px, px, 3), dtype=np.uint8),
        )


def abstract(batch: Batch) -> Batch:
    """The batch with every array replaced by its shape and type."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
