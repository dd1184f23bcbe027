"""The language model's matrices held for decoding: in 8 bits, or in half precision output by output.

Quantized by qwix: one scale for each output of each layer, the nearest of 255 steps. Norms, biases, keys and values
keep their precision, and so do the tower and the projector, which run once for a film.

In: a model ready to answer. Out: the same with packed weights (`kernels/packed.py`); it neither trains nor exports.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hico_jax.kernels import packed
from hico_jax.kernels.packed import Packed
from hico_jax.models.layers import inputs

KINDS = ("int8", "rows")  # 8 bits; half precision, held output by output


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter is a matrix: `[*lead *inputs *outputs]`."""

    lead: tuple[int, ...]  # layers
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    turned: bool = False  # an embedding that is the unembedding: outputs first

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Layout:
        """Of a parameter whose last dims carry `axes`."""
        lead, dims = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
        if axes[0] == "vocab":
            return cls(lead, dims[1:], dims[:1], turned=True)
        count = inputs(axes)
        return cls(lead, dims[:count], dims[count:])


def pack(value: jax.Array, layout: Layout, kind: str) -> Packed:
    """A parameter packed, a layer at a time: the rounding of one layer is in memory at once."""
    values, scale = _pack(value, layout=layout, kind=kind)
    return Packed(values, scale, layout.inputs, layout.outputs)


@functools.partial(jax.jit, static_argnames=("layout", "kind"))
def _pack(value: jax.Array, *, layout: Layout, kind: str) -> tuple[jax.Array, jax.Array | None]:
    flat = value.T if layout.turned else value
    flat = flat.reshape(-1, math.prod(layout.inputs), math.prod(layout.outputs))
    if kind == "rows":
        return jnp.swapaxes(flat, 1, 2).reshape(*layout.lead, *flat.shape[:0:-1]), None
    import qwix

    def one(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = qwix.quantize(matrix.astype(jnp.float32), "int8", channelwise_axes=[1])
        return packed.words(found.qvalue.T), found.scale[0]

    values, scale = jax.lax.map(one, flat)
    return values.reshape(*layout.lead, *values.shape[1:]), scale.reshape(*layout.lead, -1)


def shape_of(value: Any, layout: Layout, kind: str) -> Packed:
    """What `pack` gives, as shapes."""
    rows, width = math.prod(layout.outputs), math.prod(layout.inputs)
    if kind == "rows":
        return Packed(
            jax.ShapeDtypeStruct((*layout.lead, rows, width), value.dtype), None, layout.inputs, layout.outputs
        )
    values = jax.ShapeDtypeStruct((*layout.lead, rows, width // packed.BYTES), jnp.int32)
    scale = jax.ShapeDtypeStruct((*layout.lead, rows), jnp.float32)
    return Packed(values, scale, layout.inputs, layout.outputs)


def quantized(model: Any, kind: str = "int8", pack: Callable[[Any, Layout, str], Packed] = pack) -> Any:
    """A whole model, or its language model alone, with packed matrices.

    Not packed are an embedding that is not the unembedding as well, an unembedding that the kernels do not take (an odd
    number of outputs), and in half precision either of them.

    Raises:
      ValueError: an unknown kind, or rows that do not divide into words.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; it must be one of {', '.join(KINDS)}")
    llm = getattr(model, "llm", model)
    head = "embedding" if llm.unembedding is None else "unembedding"
    graph, state = nnx.split(llm)

    def one(path: Any, variable: Any) -> Any:
        axes, value = variable.get_metadata("axes"), variable.get_value()
        if len(axes) < 2 or "embed" not in axes or isinstance(value, Packed):
            return variable
        layout = Layout.of(tuple(value.shape), axes)
        if "vocab" in axes:
            named = any(getattr(p, "key", getattr(p, "name", "")) == head for p in path)
            if kind == "rows" or not named or packed.cut_of([shape_of(value, layout, kind)]) is None:
                return variable
        return variable.replace(pack(value, layout, kind))

    state = jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    llm = nnx.merge(graph, state)
    if not hasattr(model, "llm"):
        return llm
    model.llm = llm
    return model
