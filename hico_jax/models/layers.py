"""Small modules everything is made of. Parameters carry logical axes; weights follow the activation's dtype.

A layer computes in the dtype of its input: weights are cast at use, so one set of float32 master weights
serves float32 and bfloat16 runs. Norms, rotary angles and softmax are float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.kernels import decode, norm
from hico_jax.parallel.sharding import ring
from hico_jax.shapes import Array, Float, Int

Axes = Sequence[str | None]
T = TypeVar("T")


def param(value: jax.Array, axes: Axes) -> nnx.Param:
    """A parameter whose last dims carry `axes`. Leading dims (stacked layers) need no name."""
    assert len(axes) == value.ndim, (axes, value.shape)
    return nnx.Param(value, axes=tuple(axes))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> jax.Array:
    """Random numbers of a normal distribution, in float32."""
    return jax.random.normal(rngs.params(), shape, jnp.float32) * stddev


def xavier_uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Random numbers between bounds that keep the variance through a layer (Glorot), in float32."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def inputs(axes: tuple[str | None, ...]) -> int:
    """How many of a weight's dims are multiplied with: all but the last where heads are joined again, else the first.

    Example:
      >>> inputs(("embed", "heads", "head_dim")), inputs(("heads", "head_dim", "embed")), inputs(("embed", "mlp"))
      (1, 2, 1)
    """
    return len(axes) - 1 if len(axes) > 2 and axes[-1] in ("embed", "vision_embed") else 1


def stack(make: Callable[[nnx.Rngs], T], num_layers: int, rngs: nnx.Rngs) -> T:
    """`num_layers` copies of a module as one module whose parameters have a leading layer dim."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def layer_slice(blocks: T, start: int, stop: int) -> T:
    """Layers `start` to `stop` of a stacked module."""
    return jax.tree.map(lambda p: p[start:stop], blocks)


def in_slices(f: Callable[[Array], Array], x: Float[Array, "B L D"], most: int = 65_536) -> Float[Array, "B L D"]:
    """`f`, which treats tokens one by one, for at most `most` tokens of a device's part of the row at a time.

    The backward pass computes a slice again, so the wide middle of an MLP exists for one slice only. Of a row over
    several devices a slice takes every n-th token: then each device slices its own part.
    """
    rows, length, dim = x.shape
    shards = ring()
    least = -(-length // (most * shards))
    count = next((n for n in range(least, 4 * least) if length % (n * shards) == 0), 1)
    if count == 1:
        return f(x)
    if shards == 1:  # neighbours lie together, so nothing is copied
        out = jax.lax.map(jax.checkpoint(f), jnp.moveaxis(x.reshape(rows, count, -1, dim), 1, 0))
        return jnp.moveaxis(out, 0, 1).reshape(x.shape)
    slices = jnp.moveaxis(x.reshape(rows, -1, count, dim), 2, 0)
    out = jax.lax.map(jax.checkpoint(f), slices)
    return jnp.moveaxis(out, 0, 2).reshape(x.shape)


class Linear(nnx.Module):
    """`x @ w (+ b)`, with `w: [in, out]`."""

    def __init__(
        self, in_dim: int, out_dim: int, axes: Axes, *, rngs: nnx.Rngs, bias: bool = True, stddev: float | None = None
    ) -> None:
        value = (
            xavier_uniform(rngs, (in_dim, out_dim), in_dim, out_dim)
            if stddev is None
            else normal(rngs, (in_dim, out_dim), stddev)
        )
        self.w = param(value, axes)
        self.b = param(jnp.zeros(out_dim), (axes[-1],)) if bias else None

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        y = x @ self.w[...].astype(x.dtype)
        return y if self.b is None else y + self.b[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean and variance over the last dim, in float32."""

    def __init__(self, dim: int, *, eps: float, axis: str | None = None) -> None:
        self.scale = param(jnp.ones(dim), (axis,))
        self.bias = param(jnp.zeros(dim), (axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return norm.layer_norm(x, self.scale[...], self.bias[...], self.eps)

    def after(
        self, x: Float[Array, "*lead D"], update: Float[Array, "*lead D"], bias: Float[Array, " D"]
    ) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead D"]]:
        """`x + update + bias` and its norm, in one pass over memory where a kernel runs."""
        return norm.add_and_norm(x, update, bias, self.scale[...], self.bias[...], self.eps)


class RMSNorm(nnx.Module):
    """Root mean square in float32, cast back, then the weight (the order of the reference)."""

    def __init__(self, dim: int, *, eps: float, axis: str | None = None) -> None:
        self.scale = param(jnp.ones(dim), (axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)

    def ahead(self, x: Float[Array, "*lead D"]) -> Any:
        """The norm for a product that reads it: left to that product's kernel where it does both."""
        scale = self.scale[...]
        return decode.Normed(x, scale, self.eps) if isinstance(scale, decode.Stacked) else self(x)


@jax.custom_jvp
def gelu(x: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
    """The exact (erf) form in float32, as PyTorch; the tanh form is not what the checkpoints were trained with.

    `jax.nn.gelu` writes it with erfc, which takes a GPU longer than to read and write the numbers.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _below(x32)).astype(x.dtype)


def _below(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (d_x,) = primals, tangents
    x32 = x.astype(jnp.float32)
    slope = _below(x32) + x32 * jnp.exp(-0.5 * jnp.square(x32)) / math.sqrt(2 * math.pi)
    return gelu(x), d_x * slope.astype(x.dtype)  # one number a place is kept, in the type of x


ROPE_KINDS = ("default", "yarn", "dynamic")


def rotary_angles(
    positions: Int[Array, "B L"],
    head_dim: int,
    theta: float,
    *,
    kind: str = "default",
    factor: float = 1.0,
    original: int = 32768,
) -> tuple[Float[Array, "B L d"], Float[Array, "B L d"]]:
    """cos and sin of the rotary angles in float32, halves duplicated ([x1 | x2] layout).

    The frequencies are rounded to float32 where the reference rounds them: one unit in their last place turns
    the angle of position 32,000 by 0.001.

    Args:
      kind: "yarn" (arXiv 2309.00071) slows low frequencies by `factor` and scales cos and sin, at every length.
        "dynamic" (`InternLM2DynamicNTKScalingRotaryEmbedding`) raises theta for rows longer than `original`, by the
        row's own length: a decoding step has its own theta, and keys in a cache keep the rotation they had.
      original: positions the model was trained on.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1) / np.power(theta, exponent.astype(np.float64)).astype(np.float32)
    scale = np.float32(1)
    if kind == "yarn":
        inverse, scale = yarn(inverse, theta, factor, original), np.float32(0.1 * math.log(factor) + 1)
    angles = positions[..., None].astype(jnp.float32) * inverse
    if kind == "dynamic":
        length = positions.max(axis=1, keepdims=True).astype(jnp.float32) + 1
        stretch = jnp.maximum(length * np.float32(factor / original) - np.float32(factor - 1), np.float32(1))
        power = -np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim - 2)
        angles = angles * jnp.exp(jnp.log(stretch)[..., None] * power)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def yarn(
    inverse: Float[np.ndarray, " f"], theta: float, factor: float, original: int, fast: float = 32.0, slow: float = 1.0
) -> Float[np.ndarray, " f"]:
    """Frequencies of YaRN: those that turn `fast` times within `original` positions stay, those below `slow` divide
    by `factor`, the others lie between (`_compute_yarn_parameters` of transformers)."""
    width = 2 * len(inverse)

    def place(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(place(fast)), 0), min(math.ceil(place(slow)), width - 1)
    ramp = np.clip((np.arange(len(inverse), dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (inverse / np.float32(factor) * ramp + inverse * (1 - ramp)).astype(np.float32)


def rotate(
    x: Float[Array, "B L H d"], cos: Float[Array, "B L d"], sin: Float[Array, "B L d"]
) -> Float[Array, "B L H d"]:
    """Apply rotary positions: `x cos + [-x2 | x1] sin`, in float32."""
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def num_params(model: Any) -> int:
    """How many numbers a model (concrete or abstract) holds."""
    return sum(int(math.prod(leaf.shape)) for leaf in jax.tree.leaves(model))
