"""Which kernel computes a step of the ring on this platform. Every one is tested against `reference.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hico_jax.kernels import cudnn, ring, splash


def pick(dtype: Any, width: int, length: int, platform: str | None = None) -> ring.Backend:
    """The fastest kernel that fits heads of `width` numbers and `length` tokens of a row on each device.

    `platform` is where the program will run; None is JAX's default, which is not so when compiling ahead of time.
    """
    platform = platform or jax.default_backend()
    half = dtype in (jnp.bfloat16, jnp.float16)
    if platform == "tpu" and splash.fits(width, length):
        return splash.BACKEND
    if platform in ("gpu", "cuda") and half and cudnn.fits(width, length):
        return cudnn.BACKEND
    return ring.BLOCKWISE
