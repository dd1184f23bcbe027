"""Save and restore a run: parameters, optimizer, step, data position and configuration, in one commit.

A checkpoint is `<workdir>/checkpoints/<step>/` with three items: `params` and `optimizer` are plain nested
dicts of arrays whose names do not depend on NNX or on what was frozen; `meta` is JSON. Orbax writes it beside
the training and renames it into place, so a killed save leaves nothing that looks finished. Orbax does not
notice a flipped bit, so every array carries a digest of ours that a restore checks.

In: trees with shardings. Out: the same trees, on the same or on another mesh.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx

from hico_jax.config import CheckpointConfig

FOLDER = "checkpoints"
PARAMS, OPTIMIZER, META = "params", "optimizer", "meta"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    params: Any  # nested dict of arrays
    optimizer: Any  # nested dict of arrays; None when only parameters were asked for
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(self, workdir: str, config: CheckpointConfig) -> None:
        self.folder = epath.Path(workdir) / FOLDER
        self._manager = ocp.CheckpointManager(
            self.folder.absolute() if "://" not in workdir else self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                enable_async_checkpointing=config.asynchronous,
                cleanup_tmp_directories=True,  # what a killed save left behind
            ),
        )

    def save(self, step: int, params: Any, optimizer: Any, meta: Mapping[str, Any]) -> None:
        """Start saving; the arrays are copied before this returns, so their buffers may be donated."""
        if step in self._manager.all_steps():
            return
        meta = {**meta, "step": step, "arrays": manifest({PARAMS: params, OPTIMIZER: optimizer})}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, params: Any, optimizer: Any) -> Restored:
        """The newest checkpoint whose arrays match their digests; a damaged one is named and passed over.

        Raises:
          ValueError: every checkpoint is damaged, or its arrays are not the ones asked for.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = _restore(self.folder / str(step), params, optimizer)
            except DamagedError as error:
                logging.warning("%s; trying the checkpoint before it", error)
                damaged[step] = str(error)
                continue
            self._set_aside(damaged)
            return restored
        raise ValueError(f"no usable checkpoint in {self.folder}: {'; '.join(damaged.values()) or 'there is none'}")

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Rename damaged checkpoints, or this run could not save those steps again."""
        for step in steps:
            if jax.process_index() == 0:
                (self.folder / str(step)).rename(self.folder / f"damaged-{step}-{time.time_ns()}")
        self._manager.reload()

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


class DamagedError(Exception):
    """A checkpoint that cannot be read or whose arrays are not what was written."""


def latest_step(workdir: str) -> int | None:
    """The newest committed step of a run, read from disk; None when it has none."""
    folder = epath.Path(workdir) / FOLDER
    if not workdir or not folder.is_dir():
        return None
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / META).exists()]
    return max(steps, default=None)


def load_params(workdir: str, params: Any) -> Restored:
    """The parameters alone of a run's newest checkpoint: how a stage begins from its parent.

    Resolutions may differ, since position tables are constants and not parameters.

    Raises:
      ValueError: the run has no checkpoint, it is damaged, or its parameters are not the ones asked for.
    """
    step = latest_step(workdir)
    if step is None:
        raise ValueError(f"{workdir} holds no checkpoint. Train that stage first, or change init.parent.")
    try:
        return _restore(epath.Path(workdir).absolute() / FOLDER / str(step), params, None)
    except DamagedError as error:
        raise ValueError(str(error)) from None


def read_meta(workdir: str) -> dict[str, Any]:
    """The JSON of a run's newest checkpoint: step, data position, configuration.

    Raises:
      ValueError: the run has no checkpoint.
    """
    step = latest_step(workdir)
    if step is None:
        raise ValueError(f"{workdir} holds no checkpoint")
    return _read(epath.Path(workdir).absolute() / FOLDER / str(step), META, ocp.args.JsonRestore())


def _restore(folder: epath.Path, params: Any, optimizer: Any) -> Restored:
    wanted = {PARAMS: params} | ({OPTIMIZER: optimizer} if optimizer is not None else {})
    meta = _read(folder, META, ocp.args.JsonRestore())
    written = {name: a for name, a in meta["arrays"].items() if name.split("/")[0] in wanted}
    have = {name: jax.ShapeDtypeStruct(a["shape"], a["dtype"]) for name, a in written.items()}
    problems = mismatches(have, flatten(wanted))
    if problems:
        raise ValueError(f"{folder} does not fit this model:\n  " + "\n  ".join(problems))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # or the saved mesh would be asked for again
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or here), wanted)
    arrays = {name: _read(folder, name, ocp.args.StandardRestore(tree)) for name, tree in placed.items()}
    for name, found in manifest(arrays).items():
        if written[name]["digest"] != found["digest"]:
            raise DamagedError(f"{folder} is damaged: {name} is not what was written")
    return Restored(arrays[PARAMS], arrays.get(OPTIMIZER), meta)


def _read(folder: epath.Path, name: str, args: Any) -> Any:
    handler = ocp.JsonCheckpointHandler() if name == META else ocp.StandardCheckpointHandler()
    try:
        with ocp.Checkpointer(handler) as reader:
            return reader.restore(folder / name, args=args)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise DamagedError(f"{folder} is damaged: {name} cannot be read ({type(error).__name__})") from error


def mismatches(have: Mapping[str, Any], want: Mapping[str, Any], limit: int = 20) -> list[str]:
    """One line for every array that is absent, unexpected or of another shape, with path, found and expected."""
    lines = [f"{name}: absent, expected {_shape(want[name])}" for name in want if name not in have]
    lines += [f"{name}: found {_shape(have[name])}, expected nothing" for name in have if name not in want]
    lines += [
        f"{name}: found {_shape(have[name])}, expected {_shape(want[name])}"
        for name in want
        if name in have and tuple(have[name].shape) != tuple(want[name].shape)
    ]
    return lines[:limit] + ([f"and {len(lines) - limit} more"] if len(lines) > limit else [])


def _shape(array: Any) -> str:
    return f"{'x'.join(str(n) for n in array.shape) or 'scalar'} {array.dtype}"


def to_dict(tree: Any) -> dict[str, Any]:
    """Any tree (NNX state, optax state) as nested dicts of arrays, named by the path."""
    return nest(flatten(tree))


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from slash paths.

    Example:
      >>> nest({"a/b": 1, "a/c": 2})
      {'a': {'b': 1, 'c': 2}}
    """
    nested: dict[str, Any] = {}
    for name, leaf in arrays.items():
        *parents, last = name.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    return nested


def from_dict(nested: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `to_dict`: arrays of `nested` put where `like` has them; `nested` may hold more."""
    arrays = flatten(nested)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_variable)
    return jax.tree.unflatten(
        treedef, [v.replace(arrays[_name(path)]) if _is_variable(v) else arrays[_name(path)] for path, v in leaves]
    )


def flatten(tree: Any) -> dict[str, Any]:
    """Arrays of a tree by slash path; variables are opened."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)
    return {_name(path): v.get_value() if _is_variable(v) else v for path, v in leaves}


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _name(path: Any) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def manifest(trees: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, type and digest of every array, by slash path.

    A digest is two 32-bit sums of the array's bits weighted by position; any single flipped bit changes the
    first. It is computed where the array lives: nothing is gathered.
    """
    arrays = flatten(trees)
    sums = jax.device_get(_digests(list(arrays.values())))
    return {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": [int(n) for n in digest]}
        for (name, a), digest in zip(arrays.items(), sums, strict=True)
    }


@jax.jit
def _digests(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_digest(a) for a in arrays]


def _digest(x: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = (x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    odd = 2 * place + 1  # an odd factor keeps every bit of what it multiplies
    mixed = (bits ^ (bits >> 15)) * (odd * jnp.uint32(2654435761))
    return jnp.stack([(bits * odd).sum(dtype=jnp.uint32), mixed.sum(dtype=jnp.uint32)])
