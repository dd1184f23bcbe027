"""One token against stacked weights and a stacked cache, on an NVIDIA GPU: every byte is read once, nothing is copied.

Decoding reads all weights and all keys for each token, so memory is its roof. XLA would first copy a layer's weights
and keys out of their stacks, which triples the traffic; these kernels (Pallas, compiled by Triton) take the
stack and the layer's number. Elsewhere, and for many rows, plain products of the layer's slice run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hico_jax.shapes import Array, Bool, Float, Int

PLATFORM = "gpu"  # where the kernels run; tests set another
MOST_ROWS = 4  # more are a matrix product
MATRIX = 1 << 14  # fewer numbers of a layer are a vector, and cheap to copy
KEYS, QUERIES = 64, 16  # of a step of attention; tensor cores take no fewer than 16 queries
ATTENTION_PROGRAMS = 264
_LOW = -1e30


def runs(x: Array) -> bool:
    """Whether the kernels run here: a GPU, half precision, one device."""
    return jax.default_backend() == PLATFORM and x.dtype == jnp.bfloat16 and jax.sharding.get_abstract_mesh().empty


class Tiles(NamedTuple):
    """How a product is cut."""

    columns: int = 256  # of a tile of weights: neighbours in memory
    depth: int = 32  # rows of a tile
    programs: int = 528  # at least: four for each of 132 multiprocessors
    warps: int = 4
    stages: int = 4


TILES, SMALL_TILES = Tiles(), Tiles(columns=128)
WIDE = 64  # tiles side by side, from which on wide ones pay
JOINED = True  # several products of one input as one kernel; benchmarks compare


class Stacked:
    """A layer's matrix inside the stack of all layers. `contract` takes it where it takes a matrix."""

    def __init__(self, stack: Array, layer: Array) -> None:
        self.stack, self.layer = stack, layer

    def __getitem__(self, _: Any) -> Stacked:
        return self

    def astype(self, dtype: Any) -> Stacked:
        """The same: it is made only where nothing needs a cast."""
        assert dtype == self.stack.dtype, (dtype, self.stack.dtype)
        return self


def layer_of(blocks: Any, layer: Array, x: Float[Array, "B 1 D"]) -> Any:
    """Layer number `layer` of stacked modules; its matrices stay in the stack where the kernels can read them there."""
    few = runs(x) and x.shape[0] <= MOST_ROWS

    def one(stack: Array) -> Any:
        matrix = stack.ndim > 2 and stack.size // stack.shape[0] >= MATRIX
        return Stacked(stack, layer) if few and matrix and stack.dtype == x.dtype else stack[layer]

    return jax.tree.map(one, blocks)


def contract(pattern: str, x: Array, weight: Any) -> Array:
    """`einsum(pattern, x, weight)`, the weight a matrix or `Stacked`, in the type of `x`."""
    return contract_all(pattern, x, (weight,))[0]


def contract_all(pattern: str, x: Array, weights: Sequence[Any]) -> list[Array]:
    """`contract` for several weights of one input: one kernel where it reads them out of the stacks."""
    if not all(isinstance(weight, Stacked) for weight in weights):
        return [jnp.einsum(pattern, x, weight.astype(x.dtype)) for weight in weights]
    ours, theirs = pattern.split("->")[0].split(",")
    summed = sum(axis in ours for axis in theirs)
    inner = math.prod(weights[0].stack.shape[1 : 1 + summed])
    flat = [weight.stack.reshape(weight.stack.shape[0], inner, -1) for weight in weights]
    if tiles_of(inner, [f.shape[2] for f in flat]) is None:
        return [jnp.einsum(pattern, x, weight.stack[weight.layer]) for weight in weights]
    if not JOINED and len(weights) > 1:
        return [contract(pattern, x, weight) for weight in weights]
    out = product(x.reshape(-1, inner), flat, weights[0].layer, interpret=jax.default_backend() == "cpu")
    kept = [(*x.shape[:2], *weight.stack.shape[1 + summed :]) for weight in weights]
    return [part.astype(x.dtype).reshape(shape) for part, shape in zip(out, kept, strict=True)]


def tiles_of(inner: int, outer: Sequence[int]) -> Tiles | None:
    """How to cut matrices of these shapes into whole tiles: wide ones where many of them lie side by side.

    Elsewhere wide tiles mean more parts to be summed up, which cost more than they gave (docs/speed.md).
    """
    for tiles in (TILES, SMALL_TILES):
        many = sum(outer) // tiles.columns >= WIDE
        if inner % tiles.depth == 0 and all(n % tiles.columns == 0 for n in outer) and (many or tiles != TILES):
            return tiles
    return None


def product(
    x: Float[Array, "B D"],
    stacks: Sequence[Float[Array, "N D _"]],
    layer: Int[Array, ""],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> list[Float[Array, "B _"]]:
    """`x @ stack[layer]` in float32 for each stack."""
    (rows, inner), outer = x.shape, [stack.shape[2] for stack in stacks]
    tiles = tiles or tiles_of(inner, outer)
    assert tiles is not None, (inner, outer)
    columns, depth, programs, warps, stages = tiles
    steps = inner // depth
    bounds = [0, *itertools.accumulate(n // columns for n in outer)]  # programs across of each stack
    across = bounds[-1]
    splits = next((n for n in range(1, steps + 1) if steps % n == 0 and n * across >= programs), steps)
    each = steps // splits

    def kernel(layer_ref: Any, x_ref: Any, *refs: Any) -> None:
        *w_refs, out_ref = refs
        place, part = pl.program_id(0), pl.program_id(1)
        layer = layer_ref[0]

        def one(w_ref: Any, first: int) -> None:
            these = pl.ds((place - first) * columns, columns)

            def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                down = pl.ds((part * each + i) * depth, depth)
                tile = w_ref[layer, down, these].astype(jnp.float32)
                return tuple(s + tile * x_ref[b, down].astype(jnp.float32)[:, None] for b, s in enumerate(sums))

            sums = tuple(jnp.zeros((depth, columns), jnp.float32) for _ in range(rows))
            for b, s in enumerate(jax.lax.fori_loop(0, each, step, sums)):
                out_ref[part, b, pl.ds(place * columns, columns)] = s.sum(0)

        if len(w_refs) == 1:
            one(w_refs[0], 0)
            return
        for w_ref, first, last in zip(w_refs, bounds, bounds[1:], strict=False):
            pl.when((place >= first) & (place < last))(functools.partial(one, w_ref, first))

    parts = pl.pallas_call(
        kernel, grid=(across, splits), out_shape=jax.ShapeDtypeStruct((splits, rows, sum(outer)), jnp.float32),
        compiler_params=None if interpret else _params(warps, stages), interpret=interpret,
        name="decode_product" if len(stacks) == 1 else f"decode_products_{len(stacks)}",
    )(layer.reshape(1), x, *stacks)  # fmt: skip
    return jnp.split(parts.sum(0), [n * columns for n in bounds[1:-1]], axis=1)


def _params(warps: int, stages: int) -> Any:
    return plgpu.CompilerParams(num_warps=warps, num_stages=stages)


def attention(
    q: Float[Array, "B H d"],
    k: Float[Array, "N B K S d"],
    v: Float[Array, "N B K S d"],
    layer: Int[Array, ""],
    visible: Bool[Array, "B S"],
    *,
    interpret: bool = False,
) -> Float[Array, "B H d"]:
    """`softmax(q k[layer] / sqrt(d)) v[layer]` over the visible keys, float32. Each row must see at least one key."""
    rows, heads, width = q.shape
    kv_heads, keys = k.shape[2:4]
    group = heads // kv_heads
    assert group <= QUERIES, (heads, kv_heads)
    splits = max(1, min(-(-ATTENTION_PROGRAMS // (rows * kv_heads)), -(-keys // KEYS)))
    each = -(-keys // (splits * KEYS))

    def kernel(layer_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, seen_ref: Any, out_ref: Any, stats_ref: Any) -> None:
        row, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        layer = layer_ref[0]
        ours = jnp.arange(QUERIES)
        at_most = jnp.minimum(head * group + ours, heads - 1)  # beyond the group: someone else's, thrown away below
        queries = q_ref[row, at_most, :]

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, top, acc = carry
            first = (part * each + i) * KEYS
            inside = first + jnp.arange(KEYS) < keys
            at = pl.ds(first, KEYS)
            seen = plgpu.load(seen_ref.at[row, at], mask=inside, other=0) != 0
            k_block = plgpu.load(k_ref.at[layer, row, head, at], mask=inside[:, None], other=0.0)
            v_block = plgpu.load(v_ref.at[layer, row, head, at], mask=inside[:, None], other=0.0)
            scores = plgpu.dot(queries, k_block.T) * (1 / math.sqrt(width))
            scores = jnp.where(seen[None], scores, _LOW)
            new_top = jnp.maximum(top, scores.max(1))
            weights = jnp.where(seen[None], jnp.exp(scores - new_top[:, None]), 0.0)
            scale = jnp.exp(top - new_top)
            acc = acc * scale[:, None] + plgpu.dot(weights.astype(v_block.dtype), v_block)
            return total * scale + weights.sum(1), new_top, acc

        start = (
            jnp.zeros(QUERIES, jnp.float32), jnp.full(QUERIES, _LOW, jnp.float32),
            jnp.zeros((QUERIES, width), jnp.float32),
        )  # fmt: skip
        total, top, acc = jax.lax.fori_loop(0, each, step, start)
        out_ref[row, head, part] = acc
        stats_ref[row, head, part, 0] = total
        stats_ref[row, head, part, 1] = top

    shape = (rows, kv_heads, splits)
    acc, stats = pl.pallas_call(
        kernel, grid=shape,
        out_shape=(
            jax.ShapeDtypeStruct((*shape, QUERIES, width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, 2, QUERIES), jnp.float32),
        ),
        compiler_params=None if interpret else _params(4, 3), interpret=interpret,
        name="decode_attention",
    )(layer.reshape(1), q, k, v, visible.astype(jnp.int8))  # fmt: skip
    total, top = stats[..., 0, :], stats[..., 1, :]
    scale = jnp.exp(top - top.max(2, keepdims=True))
    out = (acc * scale[..., None]).sum(2) / (total * scale).sum(2)[..., None]
    return out[:, :, :group].reshape(rows, heads, width)
