"""The ring's step on a TPU: JAX's splash attention, forward and backward, with the log-sum-exp handed in and out.

Splash attention is public, but only its forward pass returns the log-sum-exp, and its gradient is that of one whole
attention. A ring needs the backward kernels under the *global* output and log-sum-exp, so the module's own functions
are called; `requirements.txt` holds JAX to versions where they are as used here, and tests would notice.

Its mask metadata list blocks, one by one, in Python: seconds for a square of 32,768 tokens, hours for a million. The
ring's steps are full or one local causal square, so only those two are ever listed, for the tokens of one device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hico_jax.kernels import ring
from hico_jax.shapes import Array

BLOCKS = (1024, 512, 256, 128)
MOST_PARTIAL_SUMS = 8  # key blocks up to which one kernel computes all gradients, at the price of as many copies of d_q


class _Kernel(NamedTuple):
    """Mask metadata and tile sizes of one shape."""

    forward: Any
    d_q: Any
    d_kv: Any
    function: Any
    sizes: Any


def fits(width: int, length: int) -> bool:
    """Whether the kernels take heads of this width and rows of this many tokens on each device."""
    return width % 64 == 0 and length % (2 * BLOCKS[-1]) == 0


@functools.lru_cache(maxsize=32)
def _kernel(queries: int, keys: int, causal: bool) -> _Kernel:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos

    q, k = (next(b for b in BLOCKS if n % b == 0) for n in (queries, keys))
    memory = next(b for b in (2048, *BLOCKS) if keys % b == 0)
    fused = keys // memory <= MOST_PARTIAL_SUMS
    sizes = kernels.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k,
        block_q_dkv=q, block_kv_dkv=memory if fused else k, block_kv_dkv_compute=min(k, 512),
        block_q_dq=None if fused else q, block_kv_dq=None if fused else k, use_fused_bwd_kernel=fused,
    )  # fmt: skip
    mask = masks.MultiHeadMask(
        [(masks.CausalMask if causal else masks.FullMask)((queries, keys))]
    )  # all heads share it
    once = {"downcast_smem_data": True, "head_shards": 1, "q_seq_shards": 1}
    forward, function = infos.process_mask(mask, (q, k), **once)
    d_q = None if fused else infos.process_mask(mask, (q, k), **once)[0]
    d_kv, _ = infos.process_mask_dkv(mask, (q, sizes.block_kv_dkv), shrink_grid=not fused, **once)
    return _Kernel(forward, d_q, d_kv, function, sizes)


def _arrays(info: Any) -> Any:
    return jax.tree.map(jnp.asarray, info)


def _heads_first(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


def _scaled(q: Array) -> Array:
    return _heads_first((q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype))


def forward(
    q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, positions: Array | None,
    *, interpret: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """One step of the ring (`ring.Backend`)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    kernel = _kernel(q.shape[1], k.shape[1], positions is not None)
    # Segments do not change from layer to layer: without this, what the kernel makes of them (128 copies) is made once
    # for all layers and kept, 5 GiB of it over 256 devices.
    q, q_segments, k_segments = jax.lax.optimization_barrier((q, q_segments, k_segments))

    def row(q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array) -> tuple[Array, Array]:
        out, (lse,) = kernels._splash_attention_forward(  # pyright: ignore
            _arrays(kernel.forward), q, k, v, kernels.SegmentIds(q_segments, k_segments), sinks=None,
            mask_value=kernels.DEFAULT_MASK_VALUE, is_mqa=False, block_sizes=kernel.sizes,
            residual_checkpoint_name=None, save_residuals=True, mask_function=kernel.function, interpret=interpret,
        )  # fmt: skip
        return out, lse

    out, lse = jax.vmap(row)(_scaled(q), _heads_first(k), _heads_first(v), q_segments, k_segments)
    return _heads_first(out), _heads_first(lse)


def backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array,
    q_segments: Array, k_segments: Array, positions: Array | None, *, interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of one step of the ring (`ring.Backend`)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    kernel = _kernel(q.shape[1], k.shape[1], positions is not None)

    def row(q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array, qs: Array, ks: Array) -> tuple:
        saved = (q, k, v, kernels.SegmentIds(qs, ks), None, out, lse, _arrays(kernel.d_q), _arrays(kernel.d_kv))
        backward: Any = kernels._splash_attention_bwd
        options = (False, kernels.DEFAULT_MASK_VALUE, False, kernel.sizes, None, kernel.function, None, interpret)
        return backward(*options, saved, d_out)[3:6]

    k, v, out, lse, d_out = (_heads_first(a) for a in (k, v, out, lse, d_out))
    d_q, d_k, d_v = jax.vmap(row)(_scaled(q), k, v, out, lse, d_out, q_segments, k_segments)
    d_q = _heads_first(d_q).astype(jnp.float32) * q.shape[-1] ** -0.5
    return d_q, _heads_first(d_k), _heads_first(d_v)


BACKEND = ring.Backend(forward, backward)
INTERPRETED = ring.Backend(
    functools.partial(forward, interpret=True), functools.partial(backward, interpret=True)
)  # the same kernels on any machine, slowly
