"""One table joins logical axes to mesh axes; parameters and activations both read it.

Model code names logical axes only (`layers.param(value, axes)`, `shard(x, "batch", "length", "embed")`).
Changing a parallelism edits `RULES`, never a model.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "clips": ("data", "fsdp", "sequence", "tensor"),  # encoding and merging are local to a clip
    # weights (and, where a mesh axis is still free, activations)
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "vision_embed": ("fsdp",),
}


def spec(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The partition of an array whose last `len(axes)` dims carry `axes`; leading dims (stacked layers) stay whole.

    A mesh axis is used once, by the first dim that asks; a dim it does not divide stays whole.

    Raises:
      KeyError: an axis that `RULES` does not know.
    """
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = [None] * (len(shape) - len(axes))
    for dim, axis in zip(shape[len(shape) - len(axes) :], axes, strict=True):
        if axis is not None and axis not in RULES:
            raise KeyError(f"axis {axis!r} is not in parallel.sharding.RULES ({', '.join(RULES)})")
        chosen: list[str] = []
        whole = dim
        for mesh_axis in RULES[axis] if axis else ():
            size = sizes.get(mesh_axis, 1)
            if size > 1 and mesh_axis not in used and whole % size == 0:
                chosen.append(mesh_axis)
                whole //= size
        used.update(chosen)
        parts.append(tuple(chosen) or None)
    return PartitionSpec(*parts)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to lay `x` out by `axes`. Does nothing when no mesh is in context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, dict(mesh.shape)))


def shardings(variables: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of a model or state (concrete or abstract), by its own axes."""
    sizes = dict(mesh.shape)

    def one(variable: nnx.Variable) -> NamedSharding:
        value = variable.get_value()
        return NamedSharding(mesh, spec(value.shape, variable.get_metadata("axes"), sizes))

    return jax.tree.map(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Rows over `batch`; token arrays also over `length`; pixels over `batch` only (clips spread inside the model)."""
    sizes = dict(mesh.shape)

    def one(leaf: Any) -> NamedSharding:
        axes = ("batch", "length") if len(leaf.shape) == 2 else ("batch",) + (None,) * (len(leaf.shape) - 1)
        return NamedSharding(mesh, spec(leaf.shape, axes, sizes))

    return jax.tree.map(one, batch)
