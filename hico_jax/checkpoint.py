"""Save and restore a run: parameters, optimizer, step, data position and configuration, in one commit.

A checkpoint is `<workdir>/checkpoints/<step>/` with three items: `params` and `optimizer` are plain nested
dicts of arrays whose names do not depend on NNX or on what was frozen; `meta` is JSON. Orbax writes it beside
the training and renames it into place, so a killed save leaves nothing that looks finished. Orbax does not
notice a flipped bit, so every array carries a digest of ours that a restore checks, and `meta` one of its own.

In: trees with shardings. Out: the same trees, on the same or on another mesh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    skipped: tuple[str, ...] = ()  # newer checkpoints that were passed over, each with the reason


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(self, workdir: str, config: CheckpointConfig) -> None:
        folder = epath.Path(workdir) / FOLDER
        self.folder = folder if "://" in workdir else folder.absolute()  # Orbax reads no relative path
        self._manager = ocp.CheckpointManager(
            self.folder,
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
                meta=ocp.args.JsonSave(seal(meta)),
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
        restored = _newest(self.folder, reversed(self.steps()), params, optimizer)
        self._set_aside(step for step in self.steps() if step > restored.meta["step"])
        return restored

    def _set_aside(self, damaged: Iterable[int]) -> None:
        """Rename damaged checkpoints, or this run could not save those steps again."""
        if damaged := list(damaged):
            for step in damaged if jax.process_index() == 0 else ():
                (self.folder / str(step)).rename(self.folder / f"damaged-{step}-{time.time_ns()}")
            _barrier("set aside")
            self._manager.reload()

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


class DamagedError(Exception):
    """A checkpoint that cannot be read or whose arrays are not what was written."""


def latest_step(workdir: str) -> int | None:
    """The newest committed step of a run, read from disk; None when it has none."""
    return max(_committed(workdir), default=None)


def _committed(workdir: str) -> list[int]:
    folder = epath.Path(workdir) / FOLDER
    if not workdir or not folder.is_dir():
        return []
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / META).exists()]


def load_params(workdir: str, params: Any) -> Restored:
    """The parameters alone of a run's newest sound checkpoint: how a stage begins from its parent.

    Resolutions may differ, since position tables are constants and not parameters.

    Raises:
      ValueError: the run has no checkpoint, all are damaged, or its parameters are not the ones asked for.
    """
    steps = sorted(_committed(workdir), reverse=True)
    if not steps:
        raise ValueError(f"{workdir} holds no checkpoint. Train that stage first, or change init.parent.")
    return _newest(epath.Path(workdir).absolute() / FOLDER, steps, params, None)


class Stored:
    """The parameters of one committed checkpoint: on disk, and one at a time in memory."""

    def __init__(self, folder: epath.Path) -> None:
        self.folder, self.meta = folder, _read_meta(folder)
        first = f"{PARAMS}/"
        self.arrays = {n.removeprefix(first): a for n, a in self.meta["arrays"].items() if n.startswith(first)}

    def read(self, *names: str) -> dict[str, np.ndarray]:
        """Some of them by slash path, on the host, whatever mesh wrote them.

        Raises:
          DamagedError: one cannot be read, or is not what was written.
        """
        wanted = nest(dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)))
        args = ocp.args.PyTreeRestore(nest(dict.fromkeys(names, 0)), restore_args=wanted, partial_restore=True)
        found = flatten(_read(self.folder, PARAMS, args))
        for name, told in manifest(found).items():
            if self.arrays[name]["digest"] != told["digest"]:
                raise DamagedError(f"{self.folder} is damaged: {PARAMS}/{name} is not what was written")
        return found


def stored(workdir: str) -> Iterator[Stored]:
    """A run's checkpoints, newest first; those whose JSON is damaged are passed over."""
    for step in sorted(_committed(workdir), reverse=True):
        try:
            yield Stored(epath.Path(workdir).absolute() / FOLDER / str(step))
        except DamagedError as error:
            logging.warning("%s; trying the checkpoint before it", error)


def read_meta(workdir: str) -> dict[str, Any]:
    """The JSON of a run's newest checkpoint whose JSON is sound: step, data position, configuration.

    Raises:
      ValueError: the run has no such checkpoint.
    """
    reasons = []
    for step in sorted(_committed(workdir), reverse=True):
        try:
            return _read_meta(epath.Path(workdir).absolute() / FOLDER / str(step))
        except DamagedError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons) or f"{workdir} holds no checkpoint")


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON with a digest of its text, so that a flipped digit in it is noticed."""
    body = json.loads(json.dumps(meta))  # as it will be read: tuples are lists, keys are text
    return {"body": body, "sha256": _sha256(body)}


def _sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _newest(folder: epath.Path, steps: Iterable[int], params: Any, optimizer: Any) -> Restored:
    """The first of `steps` whose arrays and JSON match their digests."""
    reasons: list[str] = []
    for step in steps:
        found, reason = None, ""
        try:
            found = _restore(folder / str(step), params, optimizer)
        except DamagedError as error:
            reason = str(error)
        if _everywhere(found is not None) and found is not None:
            return dataclasses.replace(found, skipped=tuple(reasons))
        reasons.append(reason or f"{folder / str(step)} is damaged for another process")
        logging.warning("%s; trying the checkpoint before it", reasons[-1])
    raise ValueError(f"no usable checkpoint in {folder}: {'; '.join(reasons) or 'there is none'}")


def _everywhere(ok: bool) -> bool:
    """Whether it is so for every process: all must go on from the same step."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())  # a NumPy value: not one of the mesh


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _restore(folder: epath.Path, params: Any, optimizer: Any) -> Restored:
    wanted = {PARAMS: params} | ({OPTIMIZER: optimizer} if optimizer is not None else {})
    meta = _read_meta(folder)
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


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    sealed = _read(folder, META, ocp.args.JsonRestore())
    body = sealed.get("body") if isinstance(sealed, dict) else None
    if not isinstance(body, dict) or sealed.get("sha256") != _sha256(body):
        raise DamagedError(f"{folder} is damaged: {META} is not what was written")
    if str(body["step"]) != folder.name:
        raise DamagedError(f"{folder} is damaged: it holds step {body['step']}")
    return body


def _read(folder: epath.Path, name: str, args: Any) -> Any:
    partly = isinstance(args, ocp.args.PyTreeRestore)
    handler = ocp.PyTreeCheckpointHandler() if partly else ocp.StandardCheckpointHandler()
    handler = ocp.JsonCheckpointHandler() if name == META else handler
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

    def put(path: Any, leaf: Any) -> Any:
        name = path_of(path)
        if not _is_variable(leaf):
            return arrays[name]
        return leaf.replace(jax.tree_util.tree_map_with_path(lambda p, _: arrays[_join(name, p)], leaf.get_value()))

    return jax.tree_util.tree_map_with_path(put, like, is_leaf=_is_variable)


def flatten(tree: Any) -> dict[str, Any]:
    """Arrays of a tree by slash path; variables are opened, also those that hold several arrays (quantized weights)."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
        value = leaf.get_value() if _is_variable(leaf) else leaf
        found |= {_join(path_of(path), inner): a for inner, a in jax.tree_util.tree_leaves_with_path(value)}
    return found


def _join(name: str, inner: Any) -> str:
    return f"{name}/{path_of(inner)}" if inner else name


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def path_of(path: Any) -> str:
    """A tree path as slashes."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def manifest(trees: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, type and digest of every array, by slash path.

    A digest is two 32-bit sums of the array's bits weighted by position; any single flipped bit changes the
    first. It is computed where the array lives: nothing is gathered. Where that is this process's own memory NumPy
    does it, because compiling takes longer than a small model's sums.
    """
    arrays = flatten(trees)
    values = list(arrays.values())
    here = all(map(_is_here, values))
    sums = [_digest_here(np.asarray(a)) for a in values] if here else jax.device_get(_digests(values))
    return {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": [int(n) for n in digest]}
        for (name, a), digest in zip(arrays.items(), sums, strict=True)
    }


def _is_here(array: Any) -> bool:
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable and {d.platform for d in array.devices()} == {"cpu"}


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


def _digest_here(x: np.ndarray) -> tuple[np.uint32, np.uint32]:
    """`_digest` in NumPy."""
    bits = np.ascontiguousarray(x).reshape(-1)
    bits = (bits if x.dtype == np.bool_ else bits.view(f"u{x.dtype.itemsize}")).astype(np.uint32)
    odd = 2 * np.arange(bits.size, dtype=np.uint32) + np.uint32(1)
    mixed = (bits ^ (bits >> np.uint32(15))) * (odd * np.uint32(2654435761))
    return (bits * odd).sum(dtype=np.uint32), mixed.sum(dtype=np.uint32)
