"""Matrices held output by output for decoding: a program reads whole rows, so that nothing is left to be summed up.

Stored `[inputs, outputs]`, a matrix needs many programs per output to fill a GPU, and a second kernel for their sums;
held the other way, one kernel does the norm before a product, the product, and the bias, gate or residual behind it.
Weights are half precision, or 8 bits with a float32 scale for each output, four to a word. Words hold numbers a
quarter of a row apart: then neighbouring words meet neighbouring inputs, and threads need not exchange them.

In: vectors of a few tokens, and stacks of all layers. Out: their products with one layer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hico_jax.shapes import Array, Float, Int, Int8

BYTES = 4  # 8-bit numbers in a word
_BIAS = 0x80  # added to each, so that a word's bytes need no sign
_MAGIC = 0x4B000000  # the bits of 2^23 as float32: an integer below 2^23 in its last bits is added to it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """What a parameter holds in place of its matrix; indexing the layers keeps it packed, `astype` unpacks it."""

    values: Any  # half precision [... O I], or words int32 [... O I/4]
    scale: Any  # Float[... O], or None in half precision
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # the dims that are summed over
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, key: Any) -> Packed:
        return self if key is Ellipsis else jax.tree.map(lambda a: a[key], self)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], *self.inputs, *self.outputs)

    def astype(self, dtype: Any) -> Array:
        """The matrix as it was before packing, but for what 8 bits lost."""
        rows = self.rows(dtype)
        return jnp.swapaxes(rows, -1, -2).reshape(*rows.shape[:-2], *self.inputs, *self.outputs)

    def rows(self, dtype: Any) -> Float[Array, "*lead O I"]:
        """Output by output, unpacked."""
        if self.scale is None:
            return self.values.astype(dtype)
        return (unpacked(self.values).astype(jnp.float32) * self.scale[..., None]).astype(dtype)

    def take(self, index: Int[Array, "*lead"], dtype: Any) -> Float[Array, "*lead I"]:
        """Rows by number: the packed form of an embedding."""
        return self[index].rows(dtype)


def words(numbers: Int8[Array, "*lead I"]) -> Int[Array, "*lead I/4"]:
    """Four 8-bit numbers to a word, a quarter of the row apart.

    Raises:
      ValueError: the row does not divide by four.
    """
    *lead, size = numbers.shape
    if size % BYTES:
        raise ValueError(f"{size} numbers do not divide by {BYTES}; only rows of whole words can be packed")
    each = (numbers.astype(jnp.int32) + _BIAS).reshape(*lead, BYTES, size // BYTES)
    shifts = 8 * jnp.arange(BYTES, dtype=jnp.int32)[:, None]
    return jnp.bitwise_or.reduce(jnp.left_shift(each, shifts), axis=-2)


def unpacked(packed: Int[Array, "*lead W"]) -> Int8[Array, "*lead 4*W"]:
    """The numbers of `words`."""
    *lead, size = packed.shape
    shifts = 8 * jnp.arange(BYTES, dtype=jnp.int32)[:, None]
    each = jnp.bitwise_and(jax.lax.shift_right_logical(*jnp.broadcast_arrays(packed[..., None, :], shifts)), 255)
    return (each - _BIAS).astype(jnp.int8).reshape(*lead, BYTES * size)


class Cut(NamedTuple):
    """How a product is cut. More threads than `across`: else the compiler sends the inputs through shared memory."""

    rows: int  # outputs of a program, at least one for each warp
    across: int  # words (numbers, in half precision) of a row that are read at a time
    ahead: int  # so many such reads are under way before the first is used
    warps: int


UNDER_WAY = 8  # loads of a thread
# Outputs of a program, numbers read at a time, warps; and how many programs it must make at least. 528 are four for
# each of 132 multiprocessors.
CUTS = (((16, 128, 8), 528), ((8, 128, 8), 128), ((4, 64, 4), 0), ((4, 32, 4), 0))


def cut_of(packs: Sequence[Packed], gated: bool = False) -> Cut | None:
    """How to cut matrices that share their input; None where they do not divide, and plain products have to do."""
    width, outer = packs[0].values.shape[-1], [p.values.shape[-2] for p in packs]
    total = outer[0] if gated else sum(outer)
    for (rows, across, warps), least in CUTS:
        if total // rows >= least and width % across == 0 and all(n % rows == 0 for n in outer):
            most, steps = UNDER_WAY * warps // (rows * (2 if gated else 1)), width // across
            # A loop of two rounds or more, or few steps: reading ahead without end would fill all registers.
            return Cut(rows, across, steps if steps <= min(4, most) else max(1, min(most, steps // 2)), warps)
    return None


class Norm(NamedTuple):
    """The root mean square norm in front of a product."""

    gain: Any  # Float[N I], of all layers
    eps: float


def product(
    x: Float[Array, "B I"], packs: Sequence[Packed], layer: Int[Array, ""], *, norm: Norm | None = None,
    biases: Sequence[Float[Array, "N _"]] = (), add: Float[Array, "B O"] | None = None, gated: bool = False,
    dtype: Any = jnp.float32, cut: Cut | None = None, interpret: bool = False,
) -> list[Float[Array, "B _"]]:  # fmt: skip
    """`norm(x) @ pack[layer] + bias + add` for each pack; `gated`: `silu` of the first times the second. Float32 sums.

    The packs hold stacks of layers. `add` is for one matrix.
    """
    cut = cut or cut_of(packs, gated)
    assert cut is not None, [p.shape for p in packs]
    rows, across, ahead, warps = cut
    (batch, inner), outer = x.shape, [p.values.shape[-2] for p in packs]
    scaled = packs[0].scale is not None
    each = BYTES if scaled else 1  # numbers in what is read as one
    part = inner // each
    whole, rest = divmod(part // across, ahead)
    assert part % across == 0, (inner, across)
    total = outer[0] if gated else sum(outer)
    bounds = [0, *itertools.accumulate(n // rows for n in outer)]

    def kernel(*refs: Any) -> None:
        given = iter(refs)
        layer, x_ref = next(given)[0], next(given)
        gain_ref = next(given) if norm is not None else None
        add_ref = next(given) if add is not None else None
        matrices = [
            (next(given), next(given) if scaled else None, next(given) if biases else None) for _ in packs
        ]  # fmt: skip
        out_ref = next(given)
        place = pl.program_id(0)

        def products(of: Sequence[Any], first: int) -> list[list[Array]]:
            """Of these matrices, by token: the sums of the program's outputs."""
            down = pl.ds((place - first) * rows, rows)

            def read(i: Any) -> list[Array]:
                return [w_ref[layer, down, pl.ds(i * across, across)] for w_ref, _, _ in of]

            def use(i: Any, tiles: Sequence[Array], carry: Any) -> Any:
                sums, squares = carry
                for k in range(each):
                    numbers = [_number(tile, k) if scaled else tile.astype(jnp.float32) for tile in tiles]
                    here = pl.ds(k * part + i * across, across)
                    inputs = [x_ref[b, here].astype(jnp.float32) for b in range(batch)]
                    if gain_ref is not None:
                        squares = [s + v * v for s, v in zip(squares, inputs, strict=True)]
                        gain = gain_ref[layer, here].astype(jnp.float32)
                        inputs = [v * gain for v in inputs]
                    sums = [
                        [s + n * v[None] for s, v in zip(of_one, inputs, strict=True)]
                        for of_one, n in zip(sums, numbers, strict=True)
                    ]
                return sums, squares

            def some(first: Any, count: int, carry: Any) -> Any:
                tiles = [read(first + j) for j in range(count)]
                for j in range(count):
                    carry = use(first + j, tiles[j], carry)
                return carry

            zeros = lambda *shape: [jnp.zeros(shape, jnp.float32) for _ in range(batch)]
            carry = [zeros(rows, across) for _ in of], zeros(across) if norm is not None else []
            if whole > 1:
                carry = jax.lax.fori_loop(0, whole, lambda i, carry: some(i * ahead, ahead, carry), carry)
            elif whole:
                carry = some(0, ahead, carry)
            if rest:
                carry = some(whole * ahead, rest, carry)
            sums, squares = carry
            out = []
            for (_, s_ref, b_ref), of_one in zip(of, sums, strict=True):
                found = [s.sum(1) for s in of_one]
                if s_ref is not None:
                    scale = s_ref[layer, down]
                    found = [f * scale for f in found]
                if norm is not None:
                    found = [
                        f * jax.lax.rsqrt(s.sum() * (1 / inner) + norm.eps) for f, s in zip(found, squares, strict=True)
                    ]
                if b_ref is not None:
                    bias = b_ref[layer, down].astype(jnp.float32)
                    found = [f + bias for f in found]
                out.append(found)
            return out

        here = pl.ds(place * rows, rows)

        def write(found: Sequence[Array]) -> None:
            for b, f in enumerate(found):
                f = f if add_ref is None else f + add_ref[b, here].astype(jnp.float32)
                out_ref[b, here] = f.astype(dtype)

        def one(matrix: Any, first: int) -> None:
            write(products([matrix], first)[0])

        if gated:
            gate, up = products(matrices, 0)
            write([g / (1 + jnp.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
        elif len(matrices) == 1:
            one(matrices[0], 0)
        else:
            for matrix, first, last in zip(matrices, bounds, bounds[1:], strict=False):
                pl.when((place >= first) & (place < last))(functools.partial(one, matrix, first))

    arrays: list[Any] = [layer.reshape(1), x]
    arrays += [] if norm is None else [norm.gain]
    arrays += [] if add is None else [add]
    for i, p in enumerate(packs):
        arrays += [p.values, *([p.scale] if scaled else []), *([biases[i]] if biases else [])]
    out = pl.pallas_call(
        kernel, grid=(total // rows,), out_shape=jax.ShapeDtypeStruct((batch, total), dtype),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret, name="packed_gated" if gated else f"packed_product_{len(packs)}",
    )(*arrays)  # fmt: skip
    return [out] if gated else jnp.split(out, [n * rows for n in bounds[1:-1]], axis=1)


def _number(word: Int[Array, "R W"], k: int) -> Float[Array, "R W"]:
    """Number `k` of each word: its byte becomes the last bits of a float32, two operations where a cast is slow."""
    byte = jax.lax.shift_right_logical(word, jnp.full_like(word, 8 * k)) if k else word
    bits = jnp.bitwise_or(jnp.bitwise_and(byte, 255), _MAGIC)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) - jnp.float32(2**23 + _BIAS)


def size(packs: Sequence[Packed]) -> int:
    """Bytes of all of them."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(list(packs)))
