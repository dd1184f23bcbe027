"""One token against stacked weights and a stacked cache, on an NVIDIA GPU: every byte is read once, nothing is copied.

Decoding reads all weights and all keys for each token, so memory is its roof. XLA would first copy a layer's weights
and keys out of their stacks, which triples the traffic; these kernels (Pallas, compiled by Triton) take the
stack and the layer's number. Elsewhere, and for many rows, plain products of the layer's slice run. Weights that
are held for decoding (`packed.py`) take norms, biases, gates and residuals into their kernels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hico_jax.kernels import packed
from hico_jax.kernels.packed import Packed
from hico_jax.shapes import Array, Bool, Float, Int

PLATFORM = "gpu"  # where the kernels run; tests set another
MOST_ROWS = 4  # more are a matrix product
MATRIX = 1 << 14  # fewer numbers of a layer are a vector, and cheap to copy
KEYS, QUERIES = 64, 16  # of a step of attention; tensor cores take no fewer than 16 queries
ATTENTION_PROGRAMS = 264
JOINED_PARTS = 32  # of a step of what joins them
_LOW = -1e30


def runs(x: Array) -> bool:
    """Whether the kernels run here: a GPU, half precision, one device."""
    return _here() and x.dtype == jnp.bfloat16


def _here() -> bool:
    return jax.default_backend() == PLATFORM and jax.sharding.get_abstract_mesh().empty


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
    """A layer's array inside the stack of all layers. `contract` takes it where it takes an array."""

    def __init__(self, stack: Any, layer: Array) -> None:
        self.stack, self.layer = stack, layer

    def __getitem__(self, _: Any) -> Stacked:
        return self

    def astype(self, dtype: Any) -> Stacked:
        """The same: it is made only where nothing needs a cast."""
        assert dtype == self.stack.dtype, (dtype, self.stack.dtype)
        return self


class Normed(NamedTuple):
    """What a norm would make of `x`, left to the product that reads it."""

    x: Array
    scale: Stacked
    eps: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


def layer_of(blocks: Any, layer: Array, x: Float[Array, "B 1 D"]) -> Any:
    """Layer number `layer` of stacked modules; its matrices stay in the stack where the kernels can read them there."""
    fused = _fused(blocks)
    few = x.shape[0] <= MOST_ROWS and (_here() if fused else runs(x))

    def one(stack: Any) -> Any:
        if few and not _is_packed(stack) and not fused:
            few_bytes = stack.ndim <= 2 or stack.size // stack.shape[0] < MATRIX
            return stack[layer] if few_bytes or stack.dtype != x.dtype else Stacked(stack, layer)
        return Stacked(stack, layer) if few and fused else stack[layer]

    return jax.tree.map(one, blocks, is_leaf=_is_packed)


def widened(blocks: Any, x: Float[Array, "B 1 D"]) -> Float[Array, "B 1 D"]:
    """The tokens as the layers' kernels like them best: float32 between products with 8-bit words."""
    words = any(p.scale is not None for p in _packs(blocks))
    return x.astype(jnp.float32) if words and _here() and x.shape[0] <= MOST_ROWS and _fused(blocks) else x


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _packs(blocks: Any) -> list[Packed]:
    return [p for p in jax.tree.leaves(blocks, is_leaf=_is_packed) if _is_packed(p)]


def _fused(blocks: Any) -> bool:
    """Whether the matrices are packed, and in sizes that the kernels take."""
    return bool(found := _packs(blocks)) and all(packed.cut_of([p]) is not None for p in found)


def contract(pattern: str, x: Any, weight: Any, add: Array | None = None, dtype: Any = None) -> Array:
    """`einsum(pattern, x, weight) + add`, the weight a matrix or `Stacked`, in the type of `x` or a wider one."""
    if _is_packed(weight) and _here() and x.shape[0] <= MOST_ROWS and x.shape[1] == 1 and _fused(weight):
        weight = Stacked(jax.tree.map(lambda a: a[None], weight), jnp.zeros((), jnp.int32))  # it is in no stack
    if _held(weight):
        (out,) = _packed(x, (weight,), add=add, dtype=dtype)
        return out
    (out,) = _contract_all(pattern, x, (weight,), dtype)
    return out if add is None else add + out


def contract_all(pattern: str, x: Any, weights: Sequence[Any], biases: Sequence[Any] = ()) -> list[Array]:
    """`contract` for several weights of one input, and their biases: one kernel where it reads them out of stacks."""
    if _held(weights[0]):
        return _packed(x, weights, biases=biases)
    out = _contract_all(pattern, x, weights)
    return [a + b.astype(x.dtype) for a, b in zip(out, biases, strict=True)] if biases else out


def gated(pattern: str, x: Any, gate: Any, up: Any) -> Array:
    """`silu(contract(x, gate)) * contract(x, up)`."""
    if _held(gate):
        (out,) = _packed(x, (gate, up), gated=True)
        return out
    of_gate, of_up = _contract_all(pattern, x, (gate, up))
    return jax.nn.silu(of_gate) * of_up


def _held(weight: Any) -> bool:
    return isinstance(weight, Stacked) and _is_packed(weight.stack)


def _packed(
    x: Any, weights: Sequence[Any], *, biases: Sequence[Any] = (), add: Array | None = None, gated: bool = False,
    dtype: Any = None,
) -> list[Array]:  # fmt: skip
    norm = packed.Norm(x.scale.stack, x.eps) if isinstance(x, Normed) else None
    x = x.x if isinstance(x, Normed) else x
    packs, layer, lead = [w.stack for w in weights], weights[0].layer, x.shape[:2]
    flat = x.reshape(lead[0], -1)
    wide = flat.astype(jnp.float32) if packs[0].scale is not None else flat
    if dtype is None:
        dtype = add.dtype if add is not None else wide.dtype
    out = packed.product(
        wide, packs, layer, norm=norm, biases=[b.stack.reshape(b.stack.shape[0], -1) for b in biases],
        add=None if add is None else add.reshape(lead[0], -1), gated=gated, dtype=dtype,
        interpret=jax.default_backend() == "cpu",
    )  # fmt: skip
    return [part.reshape(*lead, *pack.outputs) for part, pack in zip(out, packs, strict=False)]


def _contract_all(pattern: str, x: Array, weights: Sequence[Any], dtype: Any = None) -> list[Array]:
    if not all(isinstance(weight, Stacked) for weight in weights):
        kind = {} if dtype is None else {"preferred_element_type": dtype}
        return [jnp.einsum(pattern, x, weight.astype(x.dtype), **kind) for weight in weights]
    ours, theirs = pattern.split("->")[0].split(",")
    summed = sum(axis in ours for axis in theirs)
    inner = math.prod(weights[0].stack.shape[1 : 1 + summed])
    flat = [weight.stack.reshape(weight.stack.shape[0], inner, -1) for weight in weights]
    if tiles_of(inner, [f.shape[2] for f in flat]) is None:
        return [jnp.einsum(pattern, x, weight.stack[weight.layer]) for weight in weights]
    if not JOINED and len(weights) > 1:
        return [_contract_all(pattern, x, (weight,))[0] for weight in weights]
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

    shape = (rows, kv_heads, pl.next_power_of_2(max(splits, JOINED_PARTS)))  # what is beyond the parts is not read
    acc, stats = pl.pallas_call(
        kernel, grid=(rows, kv_heads, splits),
        out_shape=(
            jax.ShapeDtypeStruct((*shape, QUERIES, width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, 2, QUERIES), jnp.float32),
        ),
        compiler_params=None if interpret else _params(4, 3), interpret=interpret,
        name="decode_attention",
    )(layer.reshape(1), q, k, v, visible.astype(jnp.int8))  # fmt: skip
    return _joined(acc, stats, splits, heads, interpret)


def _joined(
    acc: Float[Array, "B K N Q d"], stats: Float[Array, "B K N 2 Q"], parts: int, heads: int, interpret: bool
) -> Float[Array, "B H d"]:
    """The parts' softmaxes as one, a program for each head."""
    rows, kv_heads, every, _, width = acc.shape
    group, some = heads // kv_heads, JOINED_PARTS

    def kernel(acc_ref: Any, stats_ref: Any, out_ref: Any) -> None:
        row, head = pl.program_id(0), pl.program_id(1)
        kv_head, query = head // group, head % group

        def stat(which: int, first: int, count: int, other: float) -> Array:
            inside = first + jnp.arange(count) < parts
            at = stats_ref.at[row, kv_head, pl.ds(first, count), np.int32(which), query]
            return plgpu.load(at, mask=inside, other=other)

        tops = stat(1, 0, every, _LOW)
        top = tops.max()
        total = (stat(0, 0, every, 0.0) * jnp.exp(tops - top)).sum()
        out = jnp.zeros(width, jnp.float32)
        for first in range(0, parts, some):
            inside = first + jnp.arange(some) < parts
            at = acc_ref.at[row, kv_head, pl.ds(first, some), query, :]
            part = plgpu.load(at, mask=inside[:, None], other=0.0)
            out += (part * jnp.exp(stat(1, first, some, _LOW) - top)[:, None]).sum(0)
        out_ref[row, head, :] = out / total

    return pl.pallas_call(
        kernel, grid=(rows, heads), out_shape=jax.ShapeDtypeStruct((rows, heads, width), jnp.float32),
        compiler_params=None if interpret else _params(4, 1), interpret=interpret, name="decode_attention_join",
    )(acc, stats)  # fmt: skip
