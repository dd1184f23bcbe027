"""One table joins logical axes to mesh axes; parameters and activations both read it.

Model code names logical axes only (`layers.param(value, axes)`, `shard(x, "batch", "length", "embed")`).
Changing a parallelism edits `RULES`, never a model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hico_jax.shapes import Bool, Int

SEQUENCE = "sequence"  # the mesh axis over which one row is split
ROW = ("sequence", "tensor")  # the mesh axes over which a row's clips are shared out

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("slice", "data", "fsdp"),
    "length": (SEQUENCE,),
    "clips": ("slice", "data", "fsdp", *ROW),  # encoding and merging are local to a clip
    "row_clips": ROW,  # what "clips" leaves of one row
    # weights (and, where a mesh axis is still free, activations); gathered for use, layer by layer
    "embed": ("fsdp", SEQUENCE),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "vision_embed": ("fsdp", SEQUENCE),
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


def sizes() -> dict[str, int]:
    """Sizes of the mesh axes that the compiler lays out; empty without a mesh, and inside `local`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else {name: mesh.shape[name] for name in mesh.auto_axes}


def count() -> int:
    """How many devices the compiler lays out; 1 without a mesh, and inside `local`."""
    return math.prod(sizes().values())


def ring() -> int:
    """Over how many devices one row is split."""
    return sizes().get(SEQUENCE, 1)


def platform() -> str:
    """Where the program will run: of the mesh in context, else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else getattr(mesh, "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to lay `x` out by `axes`. Does nothing when no mesh is in context."""
    found = sizes()
    if count() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, found))


def split_over(dim: int, axis: str) -> tuple[str, ...]:
    """The mesh axes over which a dim of this size is split when it carries `axis`."""
    (part,) = spec((dim,), (axis,), sizes())
    return () if part is None else part if isinstance(part, tuple) else (part,)


def local(
    f: Callable[..., Any],
    *args: Any,
    axes: tuple[tuple[str | None, ...], ...],
    out: tuple[str | None, ...] = (),
    outs: tuple[tuple[str | None, ...], ...] | None = None,
) -> Any:
    """`f` on every device's own part of the arguments; inside, mesh axes are there for collectives.

    `axes[i]` names the first dims of every array in `args[i]`; what has no name is whole on every device. All results
    carry `out`, or each of a tuple its own of `outs`. An axis must be split the same way in all arguments.
    """
    parts: dict[str | None, tuple[str, ...]] = {None: ()}
    for arg, names in zip(args, axes, strict=True):
        for leaf in jax.tree.leaves(arg):
            for dim, name in zip(leaf.shape, names, strict=False):
                if name is not None:
                    found = split_over(dim, name)
                    assert parts.setdefault(name, found) == found, (name, dim, found, parts[name])

    def of(names: tuple[str | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(parts[name] or None for name in names))

    in_specs = tuple(
        jax.tree.map(lambda leaf, names=names: of(names[: leaf.ndim]), arg)
        for arg, names in zip(args, axes, strict=True)
    )
    out_specs = of(out) if outs is None else tuple(of(names) for names in outs)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def gathered(module: Any, dtype: Any) -> Any:
    """A module whose matrices are whole along all but the tensor axis, cast to `dtype` before they travel.

    Said explicitly, so that the compiler never moves activations to weights; gradients go back to where weights live.
    """
    found = sizes()
    if count() == 1:
        return module
    leaves, structure = jax.tree.flatten(module)
    variables = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def one(leaf: jax.Array, variable: Any) -> jax.Array:
        axes = variable.get_metadata("axes")
        if len(axes) < 2:
            return leaf
        home = spec(leaf.shape, axes, found)
        away = spec(leaf.shape, axes, {"tensor": found.get("tensor", 1)})
        return _moved(home, away, leaf.astype(dtype)) if home != away else leaf

    return jax.tree.unflatten(structure, [one(a, v) for a, v in zip(leaves, variables, strict=True)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(home: PartitionSpec, away: PartitionSpec, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, away)


def _moved_fwd(home: PartitionSpec, away: PartitionSpec, x: jax.Array) -> tuple[jax.Array, None]:
    return _moved(home, away, x), None


def _moved_bwd(home: PartitionSpec, away: PartitionSpec, _: None, d_x: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(d_x, home),)


_moved.defvjp(_moved_fwd, _moved_bwd)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding. Of a split row, each device looks all tokens up in its columns, then columns go home."""
    x = shard(table[shard(tokens, "batch", None)], "batch", None, "embed") if ring() > 1 else table[tokens]
    return shard(x, "batch", "length", None)


def shardings(variables: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of a model or state (concrete or abstract), by its own axes."""
    found = dict(mesh.shape)

    def one(variable: nnx.Variable) -> NamedSharding:
        value = variable.get_value()
        return NamedSharding(mesh, spec(value.shape, variable.get_metadata("axes"), found))

    return jax.tree.map(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def rows_of(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process brings: its number, and how many shares there are.

    Processes whose devices hold parts of the same rows bring the same rows: one share for all of them. 16 hosts of 4
    chips with `sequence=64` are all (0, 1); with `fsdp=64` host 3 is (3, 16).
    """
    shares, mine = _mine(mesh)
    return shares.index(mine), len(shares)


def row_parts(mesh: Mesh) -> int:
    """Into how many parts a batch's rows are split: slice x data x fsdp."""
    return math.prod(mesh.shape[name] for name in mesh.axis_names if name in RULES["batch"])


def _mine(mesh: Mesh) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    owners = np.array([device.process_index for device in mesh.devices.flat])
    owners = owners.reshape(row_parts(mesh), -1)  # these axes are first
    shares = row_shares(owners)
    return shares, next(s for s in shares if (owners[s[0]] == jax.process_index()).any())


def row_shares(owners: Int[np.ndarray, "P d"]) -> list[tuple[int, ...]]:
    """Parts of a batch that go together to some process. `owners` are the processes of each part's devices.

    Raises:
      ValueError: processes hold rows that overlap in part.

    Example:
      >>> row_shares(np.array([[0, 0], [0, 0], [1, 1], [1, 1]])), row_shares(np.array([[0, 1], [0, 1]]))
      ([(0, 1), (2, 3)], [(0, 1)])
    """
    shares = sorted({tuple(np.flatnonzero((owners == p).any(1)).tolist()) for p in np.unique(owners)})
    if sum(map(len, shares)) != len(owners) or len({len(s) for s in shares}) != 1:
        raise ValueError(
            "the mesh gives processes rows that overlap in part; let data x fsdp, or sequence x tensor, be a multiple "
            "of the devices of a process"
        )
    return shares


@dataclasses.dataclass(frozen=True)
class ClipShare:
    """Which of a row's clips this process's devices hold: as `batch_shardings` lays them out, in plain numbers."""

    sizes: tuple[int, ...]  # of the axes of `ROW`
    mine: tuple[tuple[int, ...], ...]  # this process's places on them

    def __call__(self, count: int) -> Bool[np.ndarray, " N"]:
        """Of a row with room for `count` clips."""
        sizes: dict[str, int] = dict(zip(ROW, self.sizes, strict=True))
        part = spec((count,), ("row_clips",), sizes)[0] or ()
        axes = [ROW.index(name) for name in ((part,) if isinstance(part, str) else part)]
        blocks = np.zeros([self.sizes[axis] for axis in axes], bool)
        for place in self.mine:
            blocks[tuple(place[axis] for axis in axes)] = True
        return np.repeat(blocks.reshape(-1), count // blocks.size)


def clip_share(mesh: Mesh) -> tuple[ClipShare, tuple[int, ...]] | None:
    """This process's share of the clips of its rows, and the processes of these rows; None if it has them alone."""
    sizes = tuple(mesh.shape[name] for name in ROW)  # these axes are last
    owners = np.array([device.process_index for device in mesh.devices.flat]).reshape(-1, *sizes)
    of_rows = owners[list(_mine(mesh)[1])]
    processes = tuple(np.unique(of_rows).tolist())
    if len(processes) == 1:
        return None
    places = np.argwhere((of_rows == jax.process_index()).any(0))
    return ClipShare(sizes, tuple(map(tuple, places.tolist()))), processes


def rows_filled(batch: Any, mesh: Mesh, parts: int = 1) -> Any:
    """This process's rows, as many as `put` can split in each of `parts` micro-batches: the last one again, unheard.

    In: a `Batch` on the host. Copies have weight 0 in the loss, and are ordinary rows to every kernel, which rows of
    padding alone are not. They stand at the end: each micro-batch keeps the rows it has on one device.
    """
    rows = batch.tokens.shape[0]
    missing = -rows % (len(_mine(mesh)[1]) * parts)
    if not missing:
        return batch
    filled = jax.tree.map(lambda a: np.concatenate([a, np.repeat(np.asarray(a)[-1:], missing, 0)]), batch)
    filled.weights[rows:] = 0
    return filled


def put(batch: Any, mesh: Mesh) -> Any:
    """This process's rows (`rows_of`) as part of the global batch, on the devices.

    Raises:
      ValueError: rows that do not divide over the mesh: every device would compute all of them.
    """
    shares, mine = _mine(mesh)
    count, parts = len(shares), len(shares) * len(mine)

    def one(a: Any) -> jax.ShapeDtypeStruct:
        if a.shape[0] * count % parts:
            raise ValueError(
                f"{a.shape[0] * count} rows cannot be split over slice x data x fsdp = {parts} of the mesh; make "
                f"data.batch_size a multiple of {parts}, or raise mesh.sequence so that devices share rows"
            )
        return jax.ShapeDtypeStruct((a.shape[0] * count, *a.shape[1:]), a.dtype)

    def placed(a: Any, like: Any, place: NamedSharding) -> jax.Array:
        local, each = np.asarray(a), like.shape[0] // parts

        def part(where: Any) -> np.ndarray:
            if count == 1:
                return local[where]
            number = where[0].indices(like.shape[0])[0] // each  # a device's rows are those of one part
            at = mine.index(number) * each
            return local[(slice(at, at + each), *where[1:])]

        return jax.make_array_from_callback(like.shape, place, part)

    whole = jax.tree.map(one, batch)
    return jax.tree.map(placed, batch, whole, batch_shardings(whole, mesh))


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Rows over `batch`; token arrays also over `length`; pixels also over the devices that share a row's clips."""
    found = dict(mesh.shape)

    def one(leaf: Any) -> NamedSharding:
        pixels = ("batch", "row_clips" if len(leaf.shape) > 3 else None)
        axes = ("batch", "length") if len(leaf.shape) == 2 else pixels + (None,) * (len(leaf.shape) - 2)
        return NamedSharding(mesh, spec(leaf.shape, axes, found))

    return jax.tree.map(one, batch)
