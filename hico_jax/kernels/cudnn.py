"""The ring's step on an NVIDIA GPU: cuDNN's flash attention, forward and backward.

`jax.nn.dot_product_attention` can return its log-sum-exp, but its gradient drops the cotangent of it in silence, and it
offers no backward pass under another log-sum-exp than its own. So the two primitives behind it are bound here:
the backward one takes the global output and log-sum-exp of the ring.

cuDNN runs unmasked and causal steps fast and any other mask slowly. A step of the ring is full or a causal square; only
where it meets two segments of a packed row, XLA's blockwise kernel runs instead, chosen step by step on the device.
Padding needs no mask: it stands at the end of a row, where no real query looks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hico_jax.kernels import ring
from hico_jax.shapes import Array


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
