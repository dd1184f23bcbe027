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

from hico_jax import checkpoint, optim
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
    parts = optim.split(model, experiment.optim.rates)
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
        found = checkpoint.load_params(experiment.init.parent, params_dict(*weights))
        trainable, frozen = (checkpoint.from_dict(found.params, half) for half in weights)
        origin = f"parameters of {experiment.init.parent}, step {found.meta['step']}{_passed(found)}"
        if found.meta["step"] < found.meta["config"]["train"]["steps"]:
            origin += f" (WARNING: that run has not finished its {found.meta['config']['train']['steps']} steps)"
    else:
        trainable, frozen = _random(experiment, weights)  # 4
        origin = f"random weights, seed {experiment.train.seed}"
        if experiment.init.weights:  # 3
            whole = nnx.merge(parts.graphdef, trainable, frozen)
            whole, names = load.load_into(whole, experiment.init.weights, mesh=mesh)
            trainable, frozen = optim.split(whole, experiment.optim.rates)[1:]
            origin = f"{len(names)} arrays of {', '.join(experiment.init.weights)}; others random"
    moments = jax.jit(tx.init, out_shardings=_shardings(jax.eval_shape(tx.init, trainable), mesh))(trainable)
    return start(_state(0, trainable, frozen, moments, mesh), origin)


def _passed(found: checkpoint.Restored) -> str:
    return "".join(f" (WARNING: skipped {reason})" for reason in found.skipped)


def _random(experiment: Experiment, weights: Any) -> Any:
    def build() -> tuple[Any, Any]:
        model = experiment.model.build(rngs=nnx.Rngs(params=experiment.train.seed))
        return tuple(optim.split(model, experiment.optim.rates)[1:])

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

    def one(x: Any) -> NamedSharding:
        if not isinstance(x, nnx.Variable):
            return _whole(mesh, x.ndim)
        shape, axes = x.get_value().shape, x.get_metadata("axes")
        if len(shape) < len(axes):  # a factored moment
            return _whole(mesh, len(shape))
        return NamedSharding(mesh, sharding.spec(shape, axes, sizes))

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _with_shardings(tree: Any, mesh: Mesh) -> Any:
    placed = _shardings(tree, mesh)
    return jax.tree.map(
        lambda place, part: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), part),
        placed,
        tree,
    )
