"""Problems for context-parallel attention, their float64 solution, and the sharded program under test."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from hico_jax.kernels import ring
from hico_jax.parallel import zigzag

AXIS = "sequence"


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn problem. Rows are in natural order; `real` tokens come before padding."""

    size: int
    strategy: str
    rows: int
    chunk: int
    heads: int
    kv_heads: int
    width: int
    splits: tuple[tuple[int, ...], ...]  # segment lengths of each row

    @property
    def length(self) -> int:
        return 2 * self.size * self.chunk

    def split(self, seed: int) -> Case:
        """The same problem with other segments and padding, drawn."""
        rng, splits = np.random.default_rng(seed), []
        for _ in range(self.rows):
            left, parts = self.length, []
            while left and len(parts) < 4:
                parts.append(int(rng.integers(1, left + 1)))
                left -= parts[-1]
            splits.append(tuple(parts))
        return dataclasses.replace(self, splits=tuple(splits))

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        rng = np.random.default_rng(self.length)
        shape = (self.rows, self.length)
        x = {
            "q": rng.normal(size=(*shape, self.heads, self.width)),
            "k": rng.normal(size=(*shape, self.kv_heads, self.width)),
            "v": rng.normal(size=(*shape, self.kv_heads, self.width)),
            "d_out": rng.normal(size=(*shape, self.heads, self.width)),
        }
        positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for b, parts in enumerate(self.splits):
            at = 0
            for s, n in enumerate(parts):
                segments[b, at : at + n] = s + 1
                # Positions rise with jumps, as skipping and dropping leave them.
                positions[b, at : at + n] = np.cumsum(rng.integers(1, 4, n))
                at += n
        return x, {"positions": positions, "segments": segments}


def oracle(x: dict[str, np.ndarray], where: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Softmax attention and its gradient, written out in float64."""
    q, k, v, d_out = (x[n] for n in ("q", "k", "v", "d_out"))
    groups = q.shape[2] // k.shape[2]
    keys, values = k.repeat(groups, 2), v.repeat(groups, 2)
    p, s = where["positions"], where["segments"]
    mask = (s[:, :, None] == s[:, None, :]) & (s[:, :, None] > 0) & (p[:, None, :] <= p[:, :, None])
    scores = np.einsum("blhd,bshd->bhls", q, keys) / math.sqrt(q.shape[-1])
    weights = np.exp(
        np.where(mask[:, None], scores, -np.inf) - np.where(mask[:, None], scores, -1e9).max(-1)[..., None]
    )
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    d_weights = np.einsum("blhd,bshd->bhls", d_out, values)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])

    def grouped(a: np.ndarray) -> np.ndarray:
        return a.reshape(*a.shape[:2], k.shape[2], groups, -1).sum(3)

    return {
        "out": np.einsum("bhls,bshd->blhd", weights, values),
        "q": np.einsum("bhls,bshd->blhd", d_scores, keys),
        "k": grouped(np.einsum("bhls,blhd->bshd", d_scores, q)),
        "v": grouped(np.einsum("bhls,blhd->bshd", weights, d_out)),
    }


def program(size: int, strategy: str, backend: ring.Backend = ring.BLOCKWISE) -> Any:
    """Gradients and output of the sharded function, as one jitted program of global arrays."""
    mesh = jax.make_mesh((size,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])
    part = PartitionSpec(None, AXIS)
    local = functools.partial(ring.attention, axis=AXIS, size=size, strategy=strategy, backend=backend)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(part,) * 5, out_specs=part, check_vma=False)

    def loss(q: Any, k: Any, v: Any, positions: Any, segments: Any, d_out: Any) -> Any:
        out = sharded(q, k, v, positions, segments)
        return (out.astype(jnp.float32) * d_out).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def dealt(case: Case, dtype: Any = np.float32) -> tuple[list[np.ndarray], np.ndarray]:
    x, where = case.arrays()
    places = zigzag.order(case.length, case.size)
    arrays = [x[n][:, places].astype(dtype) for n in ("q", "k", "v")]
    return [
        *arrays,
        *(where[n][:, places] for n in ("positions", "segments")),
        x["d_out"][:, places].astype(np.float32),
    ], places
