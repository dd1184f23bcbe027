"""Where a run begins: the first source of weights there is, laid out on the mesh.

In: an `Experiment` and a mesh. Out: the model's structure, the optimizer and a `TrainState`.
Next: hico_jax/train.py
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from hico_jax import checkpoint, lora, optim
from hico_jax.config import Experiment
from hico_jax.convert import load
from hico_jax.parallel import sharding


class TrainState(NamedTuple):
    """What a step changes, and the frozen weights it reads."""

    step: Any  # Int[] updates done
    trainable: Any  # nnx.State
    frozen: Any  # nnx.State
    optimizer: Any  # optax state of the trainable half


class Start(NamedTuple):
    """A run about to begin."""

    graphdef: Any  # the model's structure
    optimizer: optax.GradientTransformation
    state: TrainState
    origin: str  # where the weights come from, in words
    meta: Mapping[str, Any] | None = None  # the checkpoint's JSON, when this run resumes


def init_state(experiment: Experiment, mesh: Mesh, saved: checkpoint.Checkpointer | None = None) -> Start:
    """The state to begin with. The first of these that applies:

    1. resume: the workdir holds a checkpoint of this run (parameters, optimizer, step, data position);
    2. parent: `init.parent` names the workdir of the stage before (parameters only, optimizer anew);
    3. released: `init.weights` names folders of published weights (what they lack starts random);
    4. random, from `train.seed`.

    Raises:
      ValueError: weights that do not fit the model, every difference listed.
    """
    model = nnx.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(params=0)))
    parts = split(experiment, model)
    tx = optim.optimizer(experiment.optim, experiment.num_steps, parts.trainable)
    weights = _with_shardings((parts.trainable, parts.frozen), mesh)
    start = functools.partial(Start, parts.graphdef, tx)

    if saved is not None and saved.steps():  # 1
        moments = _with_shardings(jax.eval_shape(tx.init, parts.trainable), mesh)
        found = saved.restore(params_dict(*weights), checkpoint.to_dict(moments))
        trainable, frozen = (checkpoint.from_dict(found.params, half) for half in weights)
        state = _state(found.meta["step"], trainable, frozen, checkpoint.from_dict(found.optimizer, moments), mesh)
        return start(state, f"resumed at step {found.meta['step']}{_passed(found)}", found.meta)
    if experiment.init.parent:  # 2
        trainable, frozen, found = _from_parent(experiment, model, mesh, weights)
        origin = f"parameters of {experiment.init.parent}, step {found.meta['step']}{_passed(found)}"
        if found.meta["step"] < found.meta["config"]["train"]["steps"]:
            origin += f" (WARNING: that run has not finished its {found.meta['config']['train']['steps']} steps)"
    else:
        trainable, frozen = _random(experiment, weights)  # 4
        origin = f"random weights, seed {experiment.train.seed}"
        if experiment.init.weights:  # 3
            whole = jax.jit(lambda: experiment.model.build(rngs=nnx.Rngs(params=experiment.train.seed)))()
            whole = nnx.merge(parts.graphdef, trainable, frozen) if not experiment.lora.rank else whole
            whole, names = load.load_into(whole, experiment.init.weights, mesh=mesh)
            trainable, frozen = split(experiment, whole)[1:]
            origin = f"{len(names)} arrays of {', '.join(experiment.init.weights)}; others random"
    moments = jax.jit(tx.init, out_shardings=_shardings(jax.eval_shape(tx.init, trainable), mesh))(trainable)
    return start(_state(0, trainable, frozen, moments, mesh), origin)


def abstract_start(experiment: Experiment, mesh: Mesh) -> Start:
    """What a run would begin with, as shapes with their places on the mesh."""
    model = nnx.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(params=0)))
    graphdef, trainable, frozen = split(experiment, model)
    tx = optim.optimizer(experiment.optim, experiment.train.steps or 1, trainable)
    moments = jax.eval_shape(tx.init, trainable)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=_whole(mesh, 0))
    state = TrainState(step, *(_with_shardings(tree, mesh) for tree in (trainable, frozen, moments)))
    return Start(graphdef, tx, state, "shapes only")


def _passed(found: checkpoint.Restored) -> str:
    return "".join(f" (WARNING: skipped {reason})" for reason in found.skipped)


def split(experiment: Experiment, model: nnx.Module) -> optim.Parts:
    """The model by its table of rates; or all of it frozen, and adapters that train."""
    if not experiment.lora.rank:
        return optim.split(model, experiment.optim.rates)
    graphdef, _, frozen = optim.split(model, ((r".*", None),))

    def halves(frozen: Any) -> tuple[Any, Any]:
        begun = lora.begin(frozen, experiment.lora, experiment.train.seed)
        return begun, lora.quantize(frozen, experiment.lora)

    shapes = any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(frozen))
    return optim.Parts(graphdef, *(jax.eval_shape(halves, frozen) if shapes else halves(frozen)))


def _from_parent(experiment: Experiment, model: Any, mesh: Mesh, weights: Any) -> tuple[Any, Any, checkpoint.Restored]:
    """Both halves with the parent's parameters."""
    if not experiment.lora.rank:
        found = lora.load_merged(str(experiment.init.parent), params_dict(*weights))
        return *(checkpoint.from_dict(found.params, half) for half in weights), found
    base = _with_shardings(nnx.state(model), mesh)
    found = lora.load_merged(str(experiment.init.parent), checkpoint.to_dict(base))
    graphdef, state = nnx.split(model)
    whole = nnx.merge(graphdef, checkpoint.from_dict(found.params, state))
    return *jax.jit(lambda m: tuple(split(experiment, m)[1:]))(whole), found


def _random(experiment: Experiment, weights: Any) -> Any:
    def build() -> tuple[Any, Any]:
        model = experiment.model.build(rngs=nnx.Rngs(params=experiment.train.seed))
        return tuple(split(experiment, model)[1:])

    return jax.jit(build, out_shardings=jax.tree.map(lambda a: a.sharding, weights))()


def _state(step: int, trainable: Any, frozen: Any, moments: Any, mesh: Mesh) -> TrainState:
    return TrainState(jax.device_put(np.int32(step), _whole(mesh, 0)), trainable, frozen, moments)


def params_dict(trainable: Any, frozen: Any) -> dict[str, Any]:
    """Both halves as one nested dict: a checkpoint does not know what was frozen."""
    return checkpoint.nest(checkpoint.flatten(trainable) | checkpoint.flatten(frozen))


def _whole(mesh: Mesh, ndim: int) -> NamedSharding:
    return NamedSharding(mesh, sharding.spec((1,) * ndim, (None,) * ndim, dict(mesh.shape)))


def _shardings(tree: Any, mesh: Mesh) -> Any:
    """Of parameters and moments by their axes; of counters, whole."""
    sizes = dict(mesh.shape)

    def one(x: Any) -> Any:
        if not isinstance(x, nnx.Variable):
            return _whole(mesh, x.ndim)
        axes = x.get_metadata("axes")

        def place(a: Any) -> NamedSharding:
            if len(a.shape) < len(axes):  # a factored moment
                return _whole(mesh, len(a.shape))
            return NamedSharding(mesh, sharding.spec(a.shape, axes, sizes))

        return x.replace(jax.tree.map(place, x.get_value()))

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _with_shardings(tree: Any, mesh: Mesh) -> Any:
    placed = _shardings(tree, mesh)
    return jax.tree.map(
        lambda place, part: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), part),
        placed,
        tree,
    )
