"""LayerNorm, alone and behind the sum it follows. On an NVIDIA GPU sum and norm are one pass over memory.

XLA makes four kernels of them, each reading the stream again: a third of the tower's time beside its products. The
kernel (Pallas, compiled by Triton) holds a few tokens in registers. Elsewhere the same arithmetic is left to the
compiler.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hico_jax.kernels.decode import _params, runs
from hico_jax.shapes import Array, Float

TOKENS = 4  # of one program
ENABLED = True  # benchmarks compare


def layer_norm(
    x: Float[Array, "*lead D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*lead D"]:
    """Mean and variance over the last dim, in float32, in two passes: a variance of raw squares loses digits."""
    return _norm(x.astype(jnp.float32), scale, bias, eps).astype(x.dtype)


def _norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return y * scale.astype(jnp.float32) + bias.astype(jnp.float32)


def add_and_norm(
    x: Float[Array, "*lead D"], update: Float[Array, "*lead D"], offset: Float[Array, " D"],
    scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float,
) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead D"]]:  # fmt: skip
    """`x + update + offset`, and the norm of that."""
    if ENABLED and runs(x) and fits(math.prod(x.shape[:-1]), x.shape[-1]):
        both: Any = _kernel(*(a.reshape(-1, a.shape[-1]) for a in (x, update)), offset, scale, bias, eps)
        return both[0].reshape(x.shape), both[1].reshape(x.shape)
    total = x + (update + offset.astype(x.dtype))
    return total, layer_norm(total, scale, bias, eps)


def fits(tokens: int, width: int) -> bool:
    """Whether the kernel takes them: a width that is a power of two, and whole programs."""
    return tokens % TOKENS == 0 and width & (width - 1) == 0 and 32 <= width <= 4096


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kernel(x: Array, update: Array, offset: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, Array]:
    (tokens, width), dtype = x.shape, x.dtype
    interpret = jax.default_backend() == "cpu"

    def kernel(x_ref: Any, u_ref: Any, o_ref: Any, s_ref: Any, b_ref: Any, total_ref: Any, normed_ref: Any) -> None:
        here = pl.ds(pl.program_id(0) * TOKENS, TOKENS)
        wide = lambda a: a.astype(jnp.float32)
        total = (wide(x_ref[here, :]) + (wide(u_ref[here, :]) + wide(o_ref[:])[None])).astype(dtype)
        total_ref[here, :] = total
        x = wide(total)
        centred = x - (x.sum(1) * (1 / width))[:, None]
        spread = jnp.square(centred).sum(1) * (1 / width) + eps
        y = centred * jax.lax.rsqrt(spread)[:, None]
        normed_ref[here, :] = (y * wide(s_ref[:])[None] + wide(b_ref[:])[None]).astype(dtype)

    return pl.pallas_call(
        kernel, grid=(tokens // TOKENS,), out_shape=(jax.ShapeDtypeStruct(x.shape, dtype),) * 2,
        compiler_params=None if interpret else _params(4, 1), interpret=interpret, name="add_and_norm",
    )(x, update, offset.astype(dtype), scale, bias)  # fmt: skip


def _kernel_fwd(x: Array, update: Array, offset: Array, scale: Array, bias: Array, eps: float) -> tuple[Any, Any]:
    both: Any = _kernel(x, update, offset, scale, bias, eps)
    return both, (both[0], offset, scale, bias)


def _kernel_bwd(eps: float, saved: Any, d_out: tuple[Array, Array]) -> tuple[Array, ...]:
    total, offset, scale, bias = saved
    _, pull = jax.vjp(lambda x, s, b: layer_norm(x, s, b, eps), total, scale, bias)
    d_total, d_scale, d_bias = pull(d_out[1])
    d_total = d_total + d_out[0]
    d_offset = d_total.sum(0, dtype=jnp.float32).astype(offset.dtype)
    return d_total, d_total, d_offset, d_scale, d_bias


_kernel.defvjp(_kernel_fwd, _kernel_bwd)
