"""Released weights to our parameters, checked against the model before anything is read.

In: a folder with `config.json` and safetensors, in the reference's layout or in ours (`native.py`). Out: the
configuration, the model, and the released `config.json` as it was, for export. Each tensor is read once and put
where it belongs; random weights never exist.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hico_jax import registry, weights
from hico_jax.convert import hf_config, native, safetensors_io, sources
from hico_jax.convert.rules import Rule, match
from hico_jax.models import projector
from hico_jax.models.hico import HiCo, HiCoConfig
from hico_jax.parallel.sharding import shardings

CONFIG = "config.json"


class Loaded(NamedTuple):
    """A model read from disk."""

    config: HiCoConfig
    model: HiCo
    raw: dict[str, Any]  # config.json as it was; give it to `export`


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    activations: str | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """Read a checkpoint of the reference, or one that `export` wrote.

    Args:
      dtype: of parameters; None keeps what the files have.
      activations: "bfloat16" or "float32"; None follows `config.json`.
      mesh: where to put the parameters; None is the default device.

    Raises:
      ValueError: a model that is not supported, a damaged file, or tensors that do not fit; lists all of them.
    """
    folder = weights.find(folder)
    raw = read_config(folder)
    ours = native.is_native(raw)
    if ours and not raw["whole"]:
        raise ValueError(f"{folder} holds a part of a model only; name it in init.weights, or convert a whole model")
    raw = raw["released"] if ours else raw
    config = hf_config.from_raw(raw, folder.resolve().name)
    if activations is not None:
        config = dataclasses.replace(config, dtype=activations)
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    wanted = by_path(state)
    places = by_path(shardings(state, mesh)) if mesh is not None else {}
    if ours:
        values = _native(folder, wanted, None, dtype, places)
        return Loaded(config, nnx.merge(graph, _fill(state, values)), raw)
    tensors = sources.open_any(folder)
    plan = plan_whole(wanted, tensors, rules(config), f"{folder} does not fit the model that its {CONFIG} describes")
    values = {path: _read(rule, tensors, leaf, dtype, places.get(path)) for path, (rule, leaf) in plan.items()}
    return Loaded(config, nnx.merge(graph, _fill(state, values)), raw)


def load_into(
    model: HiCo, files: Sequence[str | os.PathLike[str]], *, mesh: Mesh | None = None
) -> tuple[HiCo, tuple[str, ...]]:
    """The model with the parameters that `files` (or folders) hold, and their paths.

    Others keep their values, and all keep their dtype.

    Each may hold a part only: a language model, a tower, a projector; in the reference's layout or in ours. A later
    one wins.

    Raises:
      ValueError: a source with no tensor of this model, or with one that does not fit or is only partly there.
    """
    graph, state = nnx.split(model)
    wanted = by_path(state)
    places = by_path(shardings(state, mesh)) if mesh is not None else {}
    values: dict[str, jax.Array] = {}
    for file in files:
        path = pathlib.Path(file) / CONFIG
        if path.is_file() and native.is_native(read_config(path.parent)):
            dtypes = {name: str(leaf.dtype) for name, leaf in wanted.items()}
            values |= _native(path.parent, wanted, native.read(path.parent), dtypes, places)
            continue
        tensors = sources.open_any(file, vision=model.config.vision)
        for name, (rule, leaf) in plan_part(wanted, tensors, rules(model.config), f"{file}").items():
            values[name] = _read(rule, tensors, leaf, str(leaf.dtype), places.get(name))
    return nnx.merge(graph, _fill(state, values)), tuple(values)


def plan_whole(
    wanted: Mapping[str, Any], tensors: safetensors_io.Tensors, table: Sequence[Rule], what: str
) -> dict[str, tuple[Rule, Any]]:
    """Which rule and leaf each path takes from the tensors of a whole model.

    Raises:
      ValueError: something is missing, of another shape or type, or unknown; lists all of it.
    """
    plan, problems = _plan(wanted, tensors, table)
    _raise(problems + _absent(wanted, plan, table), what)
    return plan


def plan_part(
    wanted: Mapping[str, Any], tensors: safetensors_io.Tensors, table: Sequence[Rule], source: str
) -> dict[str, tuple[Rule, Any]]:
    """The same for tensors of which some may be missing, as long as each parameter is there with all its layers."""
    plan, problems = _plan(wanted, tensors, table)
    if not plan and not problems:
        problems = [f"none of its {len(tensors)} tensors is of this model"]
    _raise(problems, f"{source} does not fit the model")
    return plan


def _native(
    folder: pathlib.Path, wanted: Mapping[str, Any], part: safetensors_io.Tensors | None, dtype: Any, places: Any
) -> dict[str, jax.Array]:
    """Arrays of our own folder, each shard read from disk as it lies. `part` given: only what it holds is asked for."""
    tensors = native.read(folder) if part is None else part
    _raise(native.problems(wanted, tensors, wanted if part is None else tensors), f"{folder} does not fit the model")
    values = {}
    for path in tensors:
        array = tensors[path]
        kind = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        kind = jnp.dtype(kind) if kind else array.dtype
        place = places.get(path)
        if place is None:
            values[path] = jnp.asarray(np.array(array, kind))
        else:
            cut = lambda index, array=array, kind=kind: np.array(array[index], kind)
            values[path] = jax.make_array_from_callback(array.shape, place, cut)
    return values


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
      ValueError: it is absent or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that holds {CONFIG} and its weights, {weights.known()}")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not an object")
    return raw


def holds_weights(raw: Mapping[str, Any]) -> bool:
    """Whether this `config.json` is of weights, in the reference's layout or in ours; else it is of a run."""
    return "model_type" in raw or native.is_native(raw)


def rules(config: HiCoConfig) -> tuple[Rule, ...]:
    """The whole model's table: tower, projector, language model."""
    return (
        *registry.VISION[config.vision.arch].TORCH_NAMES,
        *registry.COMPRESSOR[config.compressor.arch].TORCH_NAMES,
        *projector.torch_names(config.projector),
        *registry.LLM[config.llm.arch].TORCH_NAMES,
    )


def by_path(state: Any) -> dict[str, Any]:
    """The leaves of a model's state by path, joined by `/`."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _path(keys: Iterable[Any]) -> str:
    return "/".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))


def _fill(state: Any, values: Mapping[str, jax.Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: values.get(_path(keys), leaf), state)


def _plan(
    wanted: Mapping[str, Any], tensors: safetensors_io.Tensors, table: Sequence[Rule]
) -> tuple[dict[str, tuple[Rule, Any]], list[str]]:
    """Which rule fills which path, and everything wrong with what is there."""
    found = match(tensors, table)
    plan: dict[str, tuple[Rule, Any]] = {}
    problems = [_problem(name, "-", tensors.entries[name].shape, None) for name in tensors if name not in found]
    for rule in table:
        present = {name for name, (other, _) in found.items() if other is rule}
        leaf = wanted.get(rule.path)
        if leaf is None:  # tied embeddings are sometimes stored twice; other tensors have no place
            if not rule.optional:
                problems += [_problem(name, "-", tensors.entries[name].shape, None) for name in sorted(present)]
            continue
        if not present:
            continue
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if rule.stacked else (1, leaf.shape)
        expected = rule.torch_shape(shape)
        names = rule.names(layers)
        for name in names:
            shape = tensors.entries[name].shape if name in present else "missing"
            if shape != expected:
                problems.append(_problem(name, rule.path, shape, expected))
            elif not jnp.issubdtype(tensors.entries[name].dtype, jnp.floating):
                problems.append(_problem(name, rule.path, tensors.entries[name].dtype, "floating-point numbers"))
        problems += [_problem(n, rule.path, tensors.entries[n].shape, f"{layers} layers") for n in present - set(names)]
        plan[rule.path] = (rule, leaf)
    return plan, problems


def _absent(wanted: Mapping[str, Any], plan: Mapping[str, Any], table: Sequence[Rule]) -> list[str]:
    of_path = {rule.path: rule for rule in table}
    assert set(wanted) <= set(of_path), f"parameters without a torch name: {sorted(set(wanted) - set(of_path))}"
    out: list[str] = []
    for path in sorted(set(wanted) - set(plan)):
        rule, shape = of_path[path], wanted[path].shape
        shape = rule.torch_shape(shape[1:]) if rule.stacked else rule.torch_shape(shape)
        out.append(_problem(rule.torch, path, "missing", shape))
    return out


def _problem(name: str, path: str, found: object, expected: object) -> str:
    return f"{name}  (ours: {path}): found {found}, expected {expected or 'no such tensor'}"


def _raise(problems: Sequence[str], what: str) -> None:
    if problems:
        raise ValueError(f"{what}; {len(problems)} tensors differ:\n  " + "\n  ".join(problems))


def _read(rule: Rule, tensors: safetensors_io.Tensors, leaf: Any, dtype: str | None, place: Any) -> jax.Array:
    """One parameter on its devices. Of a parameter that is spread, one shard at a time is in host memory."""
    part = Part(rule, tensors, tuple(leaf.shape), dtype)
    if place is None:
        return jnp.asarray(part[...])
    return jax.make_array_from_callback(part.shape, place, part.__getitem__)


class Part:
    """One of our parameters as it lies in torch tensors on disk. Indexing it, by slices, reads what they ask for.

    Raises:
      ValueError: on reading, a number that is NaN or infinite in a tensor of which something is read.
    """

    def __init__(self, rule: Rule, tensors: safetensors_io.Tensors, shape: tuple[int, ...], dtype: str | None) -> None:
        self.shape, self._rule, self._tensors = shape, rule, tensors
        self._names = rule.names(shape[0] if rule.stacked else 1)
        self._sizes = rule.sizes(shape[1:] if rule.stacked else shape)
        widest = max((tensors.entries[name].dtype for name in self._names), key=lambda d: d.itemsize)
        self.dtype = jnp.dtype(dtype) if dtype else widest
        self._checked: set[str] = set()

    def __getitem__(self, index: Any) -> np.ndarray:
        if not self._rule.stacked:
            return np.array(self._layer(0)[index], self.dtype)
        of_layers, rest = (slice(None), ...) if index is ... else (index[0], tuple(index[1:]))
        chosen = range(self.shape[0])[of_layers]
        host = np.empty((len(chosen), *np.broadcast_to(0, self.shape[1:])[rest].shape), self.dtype)
        for row, i in zip(host, chosen, strict=True):
            row[...] = self._layer(i)[rest]
        return host

    def _layer(self, i: int) -> np.ndarray:
        name = self._names[i]
        tensor = self._tensors[name]
        if name not in self._checked:
            sources.check_finite(name, tensor)
            self._checked.add(name)
        return self._rule.to_ours(tensor, self._sizes)
