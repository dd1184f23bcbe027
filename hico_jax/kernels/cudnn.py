"""The ring's step on an NVIDIA GPU: cuDNN's flash attention, forward and backward.

`jax.nn.dot_product_attention` can return its log-sum-exp, but its gradient drops the cotangent of it in silence, and it
offers no backward pass under another log-sum-exp than its own. So the two primitives behind it are bound here:
the backward one takes the global output and log-sum-exp of the ring.

cuDNN runs unmasked and causal steps fast and any other mask slowly. A step of the ring is full or a causal square; only
where it meets two segments of a packed row, XLA's blockwise kernel runs instead, chosen step by step on the device.
Padding needs no mask: it stands at the end of a row, where no real query looks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hico_jax.kernels import ring
from hico_jax.kernels.blockwise import SAVED
from hico_jax.shapes import Array, Float


def fits(width: int, length: int) -> bool:
    """Whether cuDNN takes heads of this width and rows of this many tokens on each device."""
    return width % 8 == 0 and width <= 128 and length >= 256


def _options(q: Array, causal: bool) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """Operands that are not used, and the attributes of both primitives."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    empty = jnp.zeros(0, q.dtype)
    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    return (empty,) * 7, {
        "scale": q.shape[-1] ** -0.5, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False),
        "mask_type": mask, "layout": fused.AttentionLayout.BTNH.value, "sliding_window_length": None,
    }  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(
    q: Float[Array, "B L H d"], k: Float[Array, "B S K d"], v: Float[Array, "B S K d"], causal: bool
) -> Float[Array, "B L H d"]:
    """`softmax(q k / sqrt(d)) v` without a mask, or causal with as many keys as queries.

    The output and its log-sum-exp have the name `blockwise.SAVED`, so that a recomputing caller may keep them; JAX's
    own wrapper has no such name and computes attention again.
    """
    return _flash(q, k, v, causal, is_training=False)[0]


def _flash(q: Array, k: Array, v: Array, causal: bool, is_training: bool = True) -> list[Array]:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    unused, options = _options(q, causal)
    return fused._dot_product_attention_fwd_p_wrapper.bind(q, k, v, *unused, **options, is_training=is_training)


def _attention_fwd(q: Array, k: Array, v: Array, causal: bool) -> tuple[Array, tuple[Array, ...]]:
    out, lse = (checkpoint_name(a, SAVED) for a in _flash(q, k, v, causal))
    return out, (q, k, v, out, lse)


def _attention_bwd(causal: bool, saved: tuple[Array, ...], d_out: Array) -> tuple[Array, ...]:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    q, k, v, out, lse = saved
    unused, options = _options(q, causal)
    return tuple(fused._dot_product_attention_bwd_p_wrapper.bind(q, k, v, *unused, lse, out, d_out, **options)[:3])


attention.defvjp(_attention_fwd, _attention_bwd)


def _one_segment(q_segments: Array, k_segments: Array) -> Array:
    """Whether all that is not padding belongs to one segment."""
    both = jnp.concatenate([q_segments, k_segments], 1)
    top = both.max(1, keepdims=True)
    return ((both == top) | (both == 0)).all()


def forward(
    q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, positions: Array | None
) -> tuple[Array, Array]:
    """One step of the ring (`ring.Backend`)."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def flash(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        unused, options = _options(q, positions is not None)
        out, lse = fused._dot_product_attention_fwd_p_wrapper.bind(q, k, v, *unused, **options, is_training=True)
        return out.astype(jnp.float32), jnp.swapaxes(lse.reshape(q.shape[0], q.shape[2], q.shape[1]), 1, 2)

    def blocks(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return ring.BLOCKWISE.forward(q, k, v, q_segments, k_segments, positions)

    return jax.lax.cond(_one_segment(q_segments, k_segments), flash, blocks, q, k, v)


def backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array,
    q_segments: Array, k_segments: Array, positions: Array | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of one step of the ring (`ring.Backend`)."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def flash(q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array) -> tuple[Array, ...]:
        unused, options = _options(q, positions is not None)
        stats = jnp.swapaxes(lse, 1, 2)
        grads = fused._dot_product_attention_bwd_p_wrapper.bind(
            q, k, v, *unused, stats, out.astype(q.dtype), d_out.astype(q.dtype), **options
        )
        return tuple(g.astype(jnp.float32) for g in grads[:3])

    def blocks(q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array) -> tuple[Array, ...]:
        return ring.BLOCKWISE.backward(q, k, v, out, lse, d_out, q_segments, k_segments, positions)

    found = jax.lax.cond(_one_segment(q_segments, k_segments), flash, blocks, q, k, v, out, lse, d_out)
    return found[0], found[1], found[2]


BACKEND = ring.Backend(forward, backward)
