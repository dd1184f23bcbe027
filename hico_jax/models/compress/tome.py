"""Clip-level compression: merge the patches of a clip, pair by pair, down to a few tokens.

In: patches of clips or image tiles `[B P E]`. Out: `[B M E]`, weighted means of similar patches. No parameters;
clips never meet, so any sharding over clips stays local.
Next: hico_jax/models/projector.py
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hico_jax.convert.rules import Rule
from hico_jax.shapes import Array, Float, Int

EXACT = jax.lax.Precision.HIGHEST  # a score rounded to bfloat16 or TF32 pairs other tokens


@dataclasses.dataclass(frozen=True)
class ToMeConfig:
    """How many tokens remain, and in which precision similarity is judged."""

    arch: ClassVar[str] = "tome"

    tokens_per_frame: int = 16  # of a video clip: a clip keeps frames * this
    tokens_per_image: int = 64  # of an image tile
    scope: str = "clip"  # "frame" merges each frame alone, so that nothing is merged along time
    faithful_dtype: bool = False  # round as the reference does when it merges in bfloat16; float32 otherwise

    def __post_init__(self) -> None:
        if self.tokens_per_frame < 1 or self.tokens_per_image < 1:
            raise ValueError(
                f"compressor.tokens_per_frame is {self.tokens_per_frame} and tokens_per_image {self.tokens_per_image}; "
                "both must be at least 1"
            )
        if self.scope not in ("clip", "frame"):
            raise ValueError(f"compressor.scope is {self.scope!r}; it must be 'clip' or 'frame'")

    def build(self, *, num_heads: int) -> ToMe:
        """The compressor for a tower of `num_heads` heads."""
        return ToMe(self, num_heads)


VARIANTS = {
    "tome16": ToMeConfig(),
    "tome64": ToMeConfig(tokens_per_frame=64),
    "nano": ToMeConfig(tokens_per_frame=4, tokens_per_image=16),
    "tiny": ToMeConfig(tokens_per_frame=1, tokens_per_image=2),
}

TORCH_NAMES: tuple[Rule, ...] = ()


class ToMe(nnx.Module):
    """Token merging (`ToMe16_mlp_hd64.merge_tokens` in the reference, after arXiv 2210.09461)."""

    def __init__(self, config: ToMeConfig, num_heads: int) -> None:
        self.num_heads = num_heads
        self.scope, self.faithful_dtype = config.scope, config.faithful_dtype

    def __call__(self, patches: Float[Array, "B P E"], num_tokens: int, num_frames: int = 1) -> Float[Array, "B M E"]:
        parts = num_frames if self.scope == "frame" else 1
        x = patches.reshape(-1, patches.shape[1] // parts, patches.shape[2])
        merged = merge(x, num_tokens // parts, self.num_heads, faithful_dtype=self.faithful_dtype)
        return merged.reshape(patches.shape[0], -1, patches.shape[2])


class Match(NamedTuple):
    """Who merges with whom in one step. A token is *even* or *odd* by its place in the current sequence.

    Even tokens whose `rank` is below the number merged join their `destination`; the others stay.
    """

    destination: Int[Array, "B A"]  # the odd token (0, 1, ...) each even token is most like
    rank: Int[Array, "B A"]  # place of each even token by falling similarity; ties: the lower index first


@flax.struct.dataclass
class Trace:
    """How a merge went."""

    sizes: Float[Array, "B M"]  # patches in each output token
    steps: tuple[Match, ...]  # one per entry of `merge_schedule`


def merge_schedule(num_patches: int, num_tokens: int) -> tuple[int, ...]:
    """How many tokens leave at each step: half of them while that is too few, then exactly the rest.

    Raises:
      ValueError: there are fewer patches than tokens to keep.

    Example:
      >>> merge_schedule(784, 64)
      (392, 196, 98, 34)
    """
    if not 1 <= num_tokens <= num_patches:
        raise ValueError(
            f"cannot merge {num_patches} patches into {num_tokens} tokens. Lower compressor.tokens_per_frame or "
            "compressor.tokens_per_image, or use larger images."
        )
    steps: list[int] = []
    while num_patches > num_tokens:
        steps.append(min(num_patches - num_tokens, num_patches // 2))
        num_patches -= steps[-1]
    return tuple(steps)


def merge(
    x: Float[Array, "B P E"], num_tokens: int, num_heads: int, *, faithful_dtype: bool = False, form: str | None = None
) -> Float[Array, "B M E"]:
    """Merge each row of `x` into `num_tokens` tokens. Gradients flow through values, never through the choice.

    `form` is "onehot" (matrix products only, for accelerators), "gather" (for CPU) or None (by platform).
    """
    return merge_with_trace(x, num_tokens, num_heads, faithful_dtype=faithful_dtype, form=form)[0]


def merge_with_trace(
    x: Float[Array, "B P E"], num_tokens: int, num_heads: int, *, faithful_dtype: bool = False, form: str | None = None
) -> tuple[Float[Array, "B M E"], Trace]:
    """`merge`, and who merged with whom. Order: tokens left over by falling similarity, then odd tokens in place."""
    dtype = x.dtype
    grid = dtype if faithful_dtype else jnp.dtype(jnp.float32)
    # What made `x` stays out of the one-hot product: XLA's Triton code for GPUs (JAX 0.11.2) aborts on both together.
    x = jax.lax.optimization_barrier(x)
    sizes: jax.Array | None = None  # None: every token is one patch
    steps: list[Match] = []
    for num_merged in merge_schedule(x.shape[1], num_tokens):
        found = match(metric(x, num_heads, grid), num_merged, grid)
        x, sizes = combine(x, sizes, found, num_merged, grid=grid, form=form)
        steps.append(found)
    sizes = jnp.ones(x.shape[:2], jnp.float32) if sizes is None else sizes
    return x.astype(dtype), Trace(sizes=sizes, steps=tuple(steps))


def metric(x: Float[Array, "B P E"], num_heads: int, grid: jnp.dtype) -> Float[Array, "B P d"]:
    """What similarity is measured on: the mean over heads."""
    x = jax.lax.stop_gradient(x)
    return _round(x.astype(jnp.float32).reshape(*x.shape[:2], num_heads, -1).mean(2), grid)


def match(features: Float[Array, "B P d"], num_merged: int, grid: jnp.dtype) -> Match:
    """Pair each even token with the odd token of largest cosine (`bipartite_soft_matching` in the reference).

    A token of zeros is equally unlike all others (the reference divides by zero there).
    """
    assert 0 < num_merged <= features.shape[1] // 2, (num_merged, features.shape)
    norm = _round(jnp.sqrt(jnp.square(features).sum(-1, keepdims=True)), grid)
    unit = _round(features / jnp.where(norm > 0, norm, 1), grid)
    scores = _round(jnp.einsum("BAd,BSd->BAS", _even(unit), _odd(unit), precision=EXACT), grid)
    best = scores.max(-1)
    index = jnp.arange(best.shape[1])
    # Ranks come from comparing all pairs: no sort, which accelerators serialize.
    ahead = (best[:, None, :] > best[:, :, None]) | (
        (best[:, None, :] == best[:, :, None]) & (index[None, :] < index[:, None])
    )
    return Match(destination=jnp.argmax(scores, -1), rank=ahead.sum(-1, dtype=jnp.int32))


def combine(
    x: Float[Array, "B P E"],
    sizes: Float[Array, "B P"] | None,
    found: Match,
    num_merged: int,
    *,
    grid: jnp.dtype,
    form: str | None = None,
) -> tuple[Float[Array, "B Q E"], Float[Array, "B Q"]]:
    """Replace merged tokens by means weighted by size (`merge_wavg` in the reference); `sizes` None: all are 1.

    Raises:
      ValueError: `form` is not "onehot", "gather" or None.
    """
    forms = {"onehot": _add_onehot, "gather": _add_gather}
    if form is not None and form not in forms:
        raise ValueError(f"form is {form!r}; it must be 'onehot', 'gather' or None")
    weighted = x if sizes is None else _round(x * sizes[..., None], grid)
    sizes = jnp.ones(x.shape[:2], jnp.float32) if sizes is None else sizes

    def add(weighted: jax.Array, sizes: jax.Array, found: Match) -> tuple[jax.Array, jax.Array]:
        if form is not None:
            return forms[form](weighted, sizes, found, num_merged)
        cpu, default = (lambda *args, f=f: f(*args, num_merged) for f in (_add_gather, _add_onehot))
        return jax.lax.platform_dependent(weighted, sizes, found, cpu=cpu, default=default)

    # The backward pass builds the one-hot matrices again: keeping them would cost P^2 / 4 numbers a step.
    total, count = jax.checkpoint(add)(weighted, sizes, found)
    total, count = _round(total, grid), _round(count, grid)
    return _round(total / count[..., None], grid), count


def _add_onehot(
    x: Float[Array, "B P E"], sizes: Float[Array, "B P"], found: Match, num_merged: int
) -> tuple[Float[Array, "B Q E"], Float[Array, "B Q"]]:
    even, odd = _even(x), _odd(x)
    places = jnp.arange(odd.shape[1], dtype=found.destination.dtype)
    joins = found.destination[:, :, None] == places
    if num_merged < even.shape[1]:
        joins &= (found.rank < num_merged)[:, :, None]
    total = odd.astype(jnp.float32) + _select("BAS,BAE->BSE", joins, even)
    count = _odd(sizes) + _select("BAS,BA->BS", joins, _even(sizes))
    if num_merged == even.shape[1]:
        return total, count
    ranks = jnp.arange(num_merged, even.shape[1], dtype=found.rank.dtype)
    stays = found.rank[:, None, :] == ranks[:, None]
    return (
        jnp.concatenate([_select("BUA,BAE->BUE", stays, even), total], 1),
        jnp.concatenate([_select("BUA,BA->BU", stays, _even(sizes)), count], 1),
    )


def _add_gather(
    x: Float[Array, "B P E"], sizes: Float[Array, "B P"], found: Match, num_merged: int
) -> tuple[Float[Array, "B Q E"], Float[Array, "B Q"]]:
    def row(x: jax.Array, sizes: jax.Array, destination: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
        even, odd, even_sizes, odd_sizes = x[::2], x[1::2], sizes[::2], sizes[1::2]
        if num_merged == len(even):  # all of them: no order is needed
            return odd.at[destination].add(even), odd_sizes.at[destination].add(even_sizes)
        order = jnp.argsort(rank)
        gone, left = order[:num_merged], order[num_merged:]
        total = odd.at[destination[gone]].add(even[gone])
        count = odd_sizes.at[destination[gone]].add(even_sizes[gone])
        return jnp.concatenate([even[left], total]), jnp.concatenate([even_sizes[left], count])

    return jax.vmap(row)(x.astype(jnp.float32), sizes, *found)


def _select(pattern: str, chosen: jax.Array, x: jax.Array) -> jax.Array:
    # 1 and 0 are exact in any dtype, so bfloat16 patches keep their cheap product and lose nothing.
    return jnp.einsum(pattern, chosen.astype(x.dtype), x, precision=EXACT, preferred_element_type=jnp.float32)


def _even(x: jax.Array) -> jax.Array:
    return jax.lax.slice_in_dim(x, 0, x.shape[1], stride=2, axis=1)


def _odd(x: jax.Array) -> jax.Array:
    return jax.lax.slice_in_dim(x, 1, x.shape[1], stride=2, axis=1)


def _round(x: jax.Array, grid: jnp.dtype) -> jax.Array:
    """Float32 values rounded to what `grid` can hold. XLA may drop a cast there and back, but not this."""
    if grid == jnp.float32:
        return x.astype(jnp.float32)
    info = jnp.finfo(grid)
    return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)
