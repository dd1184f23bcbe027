"""One update: loss, gradients, clipping, optimizer; compiled once for each shape of batch.

In: a `TrainState` and a `Batch`. Out: the next state and the step's numbers, all on the device.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from hico_jax import checkpoint, lora, losses, optim
from hico_jax.batch import Batch
from hico_jax.config import Experiment
from hico_jax.parallel import sharding, zigzag
from hico_jax.start import Start, TrainState


def train_step(
    state: TrainState, batch: Batch, *, graphdef: Any, tx: optax.GradientTransformation, settings: Experiment
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update and the step's numbers. Frozen weights take no part in differentiation."""
    optim_config = settings.optim

    def loss_of(trainable: Any, part: tuple[Batch, jax.Array | None]) -> tuple[jax.Array, losses.Loss]:
        model = nnx.merge(graphdef, *lora.join(trainable, state.frozen, settings.lora))
        stream = model(*part)
        weights = losses.balance(stream.weights, stream.segments, optim_config.loss_average)
        loss = losses.next_token(
            stream.x, model.llm.unembed_weight(), stream.targets, weights, chunk=settings.train.loss_chunk
        )
        return loss.total, loss

    parts = batch, row_keys(settings, state.step, batch)
    grads, loss = _accumulate(jax.grad(loss_of, has_aux=True), state.trainable, parts, optim_config.accumulate)
    weight = jnp.maximum(loss.weight, jnp.finfo(jnp.float32).tiny)
    grads = jax.tree.map(lambda g: g / weight, grads)
    norm = jnp.asarray(optax.tree.norm(grads))
    updates, moments = tx.update(optim.clip(grads, norm, optim_config.clip_norm), state.optimizer, state.trainable)
    new = state._replace(
        step=state.step + 1, trainable=optax.apply_updates(state.trainable, updates), optimizer=moments
    )
    share = optim.schedule(optim_config, settings.num_steps)
    numbers = {
        "loss": loss.total / weight,
        "accuracy": loss.correct / jnp.maximum(loss.supervised, 1.0),
        "grad_norm": norm,
        "lr": optim_config.lr * share(state.step),
        "supervised": loss.supervised,
    }
    return new, {name: jnp.asarray(number) for name, number in numbers.items()}


def row_keys(settings: Experiment, step: jax.Array, batch: Batch) -> jax.Array | None:
    """A random key for each row, from seed, step and what the row says; None where nothing is random.

    Where a row stands in the batch, how it is padded and dealt, and which host reads it change nothing.
    """
    if not getattr(settings.model.vision, "drop_path", 0):
        return None
    mark = batch.tokens.astype(jnp.uint32) * np.uint32(2654435761) + batch.positions.astype(jnp.uint32)
    mark = (mark ^ (mark >> 15)) * np.uint32(2246822519)
    rows = jnp.where(batch.segments > 0, mark ^ (mark >> 13), np.uint32(0)).sum(1, dtype=jnp.uint32)
    key = jax.random.fold_in(jax.random.key(settings.train.seed), step)
    return jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(rows)


def _accumulate(grad_of: Any, trainable: Any, batch: Any, parts: int) -> tuple[Any, losses.Loss]:
    """Sums over micro-batches, one after the other: the activations of one exist at a time.

    Micro-batch i is every `parts`-th row from row i, so that no row moves to another device.
    """
    if parts == 1:
        return grad_of(trainable, batch)
    micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0), batch)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, grad_of(trainable, part)), None

    shapes = jax.eval_shape(grad_of, trainable, jax.tree.map(lambda a: a[0], micro))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zeros, micro)[0]


class Stepper:
    """`train_step`, compiled once for each shape of batch, and told about."""

    def __init__(self, experiment: Experiment, start: Start, mesh: Mesh, say: Callable[[str], None]) -> None:
        step = functools.partial(train_step, graphdef=start.graphdef, tx=start.optimizer, settings=experiment)
        self._jitted = jax.jit(
            step, donate_argnums=0, out_shardings=(jax.tree.map(lambda a: a.sharding, start.state), None)
        )
        self._compiled: dict[Any, Any] = {}
        self._mesh, self._say, self._parts = mesh, say, experiment.optim.accumulate
        self.compile_s = 0.0  # of the last call; 0 when nothing was compiled
        self.copied = 0  # rows of this process in the last batch that stand there so that rows divide

    def put(self, batch: Batch) -> Batch:
        """This process's rows as part of the global batch, on the devices.

        Rows that do not divide over the mesh are filled up with copies that do not count (`sharding.rows_filled`); that
        is said. Without them every device would compute all rows.
        """
        filled = sharding.rows_filled(batch, self._mesh, self._parts)
        copied, told = filled.shape[0] - batch.shape[0], self.copied
        self.copied = copied
        if copied and copied != told:
            step = self._parts * sharding.row_parts(self._mesh)
            self._say(
                f"WARNING: {copied} of {filled.shape[0]} rows are copies that do not count: {batch.shape[0]} rows in "
                f"{self._parts} micro-batches do not divide over slice x data x fsdp = {step // self._parts}; make "
                f"data.batch_size a multiple of {step}, or raise mesh.sequence so that devices share rows"
            )
        return sharding.put(zigzag.deal(filled, self._mesh.shape[sharding.SEQUENCE]), self._mesh)

    def compiled(self, state: TrainState, batch: Batch) -> Any:
        """The program for a batch of this shape; arrays may be abstract."""
        key = jax.tree.structure(batch), tuple((a.shape, str(a.dtype)) for a in jax.tree.leaves(batch))
        self.compile_s = 0.0
        if key not in self._compiled:
            self._say(f"compiling for {describe(batch)} ...")
            began = time.monotonic()
            self._compiled[key] = self._jitted.lower(state, batch).compile()
            self.compile_s = time.monotonic() - began
            self._say(f"compiled in {self.compile_s:.1f} s")
        return self._compiled[key]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        program = self.compiled(state, batch)
        with jax.transfer_guard("disallow"):
            return program(state, batch)


def describe(batch: Batch) -> str:
    """A batch's shape in words."""
    rows, length = batch.shape
    return f"{rows} rows of {length} tokens, {batch.clips.shape[1]} clips and {batch.images.shape[1]} images"


def step_cost(experiment: Experiment, state: TrainState) -> Callable[[Mapping[str, int]], float]:
    """Floating-point operations of a step: two for each weight and token forward, as many for each gradient taken.

    Products inside attention and what rematerialization repeats are left out, so utilization is understated.
    """
    sizes = {half: checkpoint.flatten(tree) for half, tree in (("trains", state.trainable), ("frozen", state.frozen))}

    def weights(half: str, part: str) -> int:
        table = "llm/embedding" if "llm/unembedding" in {**sizes["trains"], **sizes["frozen"]} else ""
        return sum(a.size for name, a in sizes[half].items() if name.startswith(part) and name != table)

    vision = 6 * weights("trains", "vision/") + 2 * weights("frozen", "vision/")
    language = 6 * weights("trains", "llm/") + 4 * weights("frozen", "llm/")
    tower = experiment.model.vision
    patches = (tower.image_px // tower.patch_px) ** 2
    return lambda count: float(vision * patches * count["frames"] + language * count["tokens"])
