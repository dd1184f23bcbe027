"""Train: one loop for every stage. What a stage is stands in its configuration.

    init_state   weights and optimizer, laid out on the mesh, from the first source there is (start.py)
    train_step   one update, on the device
    fit          the loop: data, steps, metrics, checkpoints

In: an `Experiment` and an iterator of batches. Out: a workdir with config.json, metrics.jsonl, checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from data_pipeline.loader import make_loader
from hico_jax import checkpoint, config, losses, metrics, optim
from hico_jax.batch import Batch
from hico_jax.config import Experiment
from hico_jax.generate import GenerationConfig, generate
from hico_jax.parallel import sharding
from hico_jax.parallel.mesh import make_mesh
from hico_jax.start import Start, TrainState, init_state, params_dict

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "env.json"
FIRST_BATCH_FILE = "first_batch.png"
Evaluate = Callable[[nnx.Module, int], Mapping[str, float]]


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names the step and the examples."""


# ----------------------------------------------------------------------------------------------- the step


def train_step(
    state: TrainState, batch: Batch, *, graphdef: Any, tx: optax.GradientTransformation, settings: Experiment
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update and the step's numbers. Frozen weights take no part in differentiation."""
    optim_config = settings.optim

    def loss_of(trainable: Any, part: Batch) -> tuple[jax.Array, losses.Loss]:
        model = nnx.merge(graphdef, trainable, state.frozen)
        stream = model(part)
        weights = losses.balance(stream.weights, stream.segments, optim_config.loss_average)
        loss = losses.next_token(
            stream.x, model.llm.unembed_weight(), stream.targets, weights, chunk=settings.train.loss_chunk
        )
        return loss.total, loss

    grads, loss = _accumulate(jax.grad(loss_of, has_aux=True), state.trainable, batch, optim_config.accumulate)
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


def _accumulate(grad_of: Any, trainable: Any, batch: Batch, parts: int) -> tuple[Any, losses.Loss]:
    """Sums over micro-batches, one after the other: the activations of one exist at a time.

    Micro-batch i is every `parts`-th row from row i, so that no row moves to another device.
    """
    if parts == 1:
        return grad_of(trainable, batch)
    micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0), batch)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, grad_of(trainable, part)), None

    shapes = jax.eval_shape(grad_of, trainable, jax.tree.map(lambda a: a[0], micro))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zeros, micro)[0]


class Stepper:
    """`train_step`, compiled once for each shape of batch, and told about."""

    def __init__(self, experiment: Experiment, start: Start, mesh: Mesh, say: Callable[[str], None]) -> None:
        step = functools.partial(train_step, graphdef=start.graphdef, tx=start.optimizer, settings=experiment)
        self._jitted = jax.jit(step, donate_argnums=0, out_shardings=(_shardings_of(start.state), None))
        self._compiled: dict[Any, Any] = {}
        self._mesh, self._say = mesh, say
        self.compile_s = 0.0  # of the last call; 0 when nothing was compiled

    def put(self, batch: Batch) -> Batch:
        """This process's rows as part of the global batch, on the devices."""
        places = sharding.batch_shardings(batch, self._mesh)
        return jax.tree.map(lambda a, p: jax.make_array_from_process_local_data(p, np.asarray(a)), batch, places)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.tree.structure(batch), tuple((a.shape, str(a.dtype)) for a in jax.tree.leaves(batch))
        self.compile_s = 0.0
        if key not in self._compiled:
            self._say(f"compiling for {describe(batch)} ...")
            began = time.monotonic()
            self._compiled[key] = self._jitted.lower(state, batch).compile()
            self.compile_s = time.monotonic() - began
            self._say(f"compiled in {self.compile_s:.1f} s")
        with jax.transfer_guard("disallow"):
            return self._compiled[key](state, batch)


def _shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, tree)


def describe(batch: Batch) -> str:
    """A batch's shape in words."""
    rows, length = batch.shape
    return f"{rows} rows of {length} tokens, {batch.clips.shape[1]} clips and {batch.images.shape[1]} images"


# ----------------------------------------------------------------------------------------------- the loop


@dataclasses.dataclass
class Run:
    """What the loop holds besides the state."""

    experiment: Experiment
    saved: checkpoint.Checkpointer
    writer: metrics.Writer
    progress: metrics.Progress
    stop: bool = False  # set by SIGTERM
    waiting: tuple[int, dict[str, jax.Array], dict[str, float], list[str]] | None = None  # a step not yet logged

    def log(self) -> None:
        """Fetch and write the numbers of the step that waits.

        Raises:
          NonFiniteLossError: its loss or gradient is not finite.
        """
        if self.waiting is None:
            return
        step, on_device, on_host, ids = self.waiting
        self.waiting = None
        values = {name: float(v) for name, v in jax.device_get(on_device).items()} | on_host
        self.writer.write(step, values)
        self.progress.step(step, values)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            named = f"Examples: {', '.join(ids)}" if ids else "The data source names no examples"
            raise NonFiniteLossError(
                f"the loss of step {step} is {values['loss']} (gradient norm {values['grad_norm']}). {named}. "
                "Nothing of this step was saved; lower optim.lr, or look at these examples."
            )

    def save(self, state: TrainState, step: int, data: Any) -> None:
        self.log()  # never save what a bad step left
        meta = {"data": data, "config": json.loads(config.to_json(self.experiment))}
        params = params_dict(state.trainable, state.frozen)
        self.saved.save(step, params, checkpoint.to_dict(state.optimizer), meta)


def fit(
    experiment: Experiment,
    batches: Iterable[Any],
    *,
    decode: Callable[[Any], str] | None = None,
    evaluate: Evaluate | None = None,
    devices: Sequence[Any] | None = None,
) -> TrainState:
    """Train to `train.steps`, going on from the workdir's checkpoint if it has one.

    `batches` yields a `Batch`, or what the loader yields. If it has `get_state` and `set_state`, its
    position is saved and restored; otherwise the batches of steps already done are skipped. SIGTERM saves and
    returns early: the state's `step` says how far it came.

    Raises:
      NonFiniteLossError: the loss is not finite.
      ValueError: the data ends before the last step, or weights do not fit.
    """
    mesh = make_mesh(experiment.mesh, devices)
    saved = checkpoint.Checkpointer(experiment.workdir, experiment.checkpoint)
    with jax.set_mesh(mesh), contextlib.closing(saved):
        start = init_state(experiment, mesh, saved)
        first = int(jax.device_get(start.state.step))
        run = Run(
            experiment, saved, metrics.Writer(experiment.workdir, first),
            metrics.Progress(experiment.num_steps, experiment.train.log_every, start=first, title=experiment.stage),
        )  # fmt: skip
        _begin(run, start)
        with contextlib.closing(run.writer), contextlib.closing(run.progress), _on_sigterm(run):
            return _loop(run, start, Source(batches, first, start.meta and start.meta["data"]), mesh, decode, evaluate)


def _loop(
    run: Run, start: Start, source: Source, mesh: Mesh, decode: Callable[[Any], str] | None, evaluate: Evaluate | None
) -> TrainState:
    experiment, state = run.experiment, start.state
    stepper = Stepper(experiment, start, mesh, run.progress.say)
    geometry, steps = experiment.model.geometry(), experiment.num_steps
    cost = step_cost(experiment, state)
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    first, began = int(jax.device_get(state.step)), time.monotonic()
    for step in range(first + 1, steps + 1):
        waited = time.monotonic()
        batch, ids, about = source.next(step)
        waited = time.monotonic() - waited
        if step == first + 1:
            metrics.contact_sheet(batch, epath.Path(experiment.workdir) / FIRST_BATCH_FILE, decode=decode)
        count = metrics.counts(batch, geometry)
        state, numbers = stepper(state, stepper.put(batch))
        run.log()  # of the step before, while this one runs
        now = time.monotonic()
        seconds = now - began - stepper.compile_s
        flops = cost(count)
        rates = metrics.rates(count, seconds, waited, flops, peak and peak * mesh.size)
        run.waiting = (step, numbers, count | rates | about | {"compile_s": stepper.compile_s}, ids)
        began = now
        run.stop = _stopping(run.stop, step)
        last = step == steps or run.stop
        if last or step % experiment.checkpoint.every == 0:
            run.save(state, step, source.position())
        if evaluate and (last or (experiment.train.eval_every and step % experiment.train.eval_every == 0)):
            run.log()
            model = nnx.merge(start.graphdef, state.trainable, state.frozen)
            run.writer.write(step, {f"eval/{k}": float(v) for k, v in evaluate(model, step).items()})
        if run.stop:
            run.progress.say(f"stopped by SIGTERM after step {step}, saved; the same command goes on from here")
            break
    run.log()
    return state


def _begin(run: Run, start: Start) -> None:
    """Say what is about to happen, and write it down: config.json, env.json."""
    experiment = run.experiment
    sizes = [sum(a.size for a in jax.tree.leaves(half)) for half in (start.state.trainable, start.state.frozen)]
    devices = jax.devices()
    run.progress.say(f"{experiment.stage}: {experiment.model_name}, {sizes[0]:,} parameters train, {sizes[1]:,} frozen")
    run.progress.say(f"weights: {start.origin}")
    run.progress.say(f"devices: {len(devices)} x {devices[0].device_kind}; workdir: {experiment.workdir}")
    resolved = json.loads(config.to_json(experiment))
    for line in config.differences(start.meta["config"], resolved) if start.meta else ():
        run.progress.say(f"WARNING: changed since the checkpoint: {line}")
    if int(jax.device_get(start.state.step)) >= experiment.num_steps:
        run.progress.say(f"all {experiment.num_steps} steps are done; raise train.steps to go on")
    if jax.process_index() == 0:
        folder = epath.Path(experiment.workdir)
        (folder / CONFIG_FILE).write_text(config.to_json(experiment) + "\n")
        environment = {
            "python": platform.python_version(), "jax": jax.__version__, "devices": len(devices),
            "device_kind": devices[0].device_kind, "processes": jax.process_count(), "origin": start.origin,
        }  # fmt: skip
        (folder / ENVIRONMENT_FILE).write_text(json.dumps(environment, indent=2) + "\n")


class Source:
    """The data, one batch at a time, from the position a run goes on from."""

    def __init__(self, batches: Iterable[Any], skip: int, position: Any) -> None:
        self._iterator: Any = iter(batches)
        self._stateful = hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")
        if not self._stateful:
            self._iterator = itertools.islice(self._iterator, skip, None)
        elif position is not None:
            self._iterator.set_state(position)

    def next(self, step: int) -> tuple[Batch, list[str], dict[str, float]]:
        """The next batch, the names of its examples, and what the loader tells of it.

        Raises:
          ValueError: there is none.
        """
        try:
            item = next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"the data ends before step {step}. Lower train.steps, add data, or let it repeat (data.num_epochs=0)."
            ) from None
        if isinstance(item, Batch):
            return item, [], {}
        info = item.info
        return item.batch, list(info.ids), {"padding_percent": 100 * info.waste, "bad": sum(info.bad_total.values())}

    def position(self) -> Any:
        """What `set_state` takes to yield the next batch again; None if the data has no position of its own."""
        return self._iterator.get_state() if self._stateful else None


@contextlib.contextmanager
def _on_sigterm(run: Run) -> Iterator[None]:
    """Ask the loop to stop at the next step's end. Elsewhere than in the main thread signals cannot be caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        run.stop = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopping(asked: bool, step: int) -> bool:
    """Whether every process stops after this step: hosts of a pod are not told at the same moment."""
    if jax.process_count() == 1:
        return asked
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))


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


def main(argv: Sequence[str]) -> int:
    """`hico train --config=FILE[:VARIANT] [--config.a.b=VALUE ...]`: 0 done or stopped, 2 a mistake.

    A mistake in flags or configuration is one sentence on stderr.
    """
    try:
        experiment = config.from_flags(argv)
        if not experiment.workdir:
            raise ValueError("no workdir is given; add --config.workdir=FOLDER")
    except ValueError as error:
        print(f"hico train: {error}", file=sys.stderr)
        return 2
    if experiment.train.distributed:
        jax.distributed.initialize()
    loader = make_loader(
        experiment.data, experiment.model.geometry(),
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    tokenizer = loader.plan.tokenizer
    if tokenizer.vocab_size > experiment.model.llm.vocab_size:
        raise ValueError(
            f"{experiment.data.tokenizer} has {tokenizer.vocab_size} tokens but the model has rows for "
            f"{experiment.model.llm.vocab_size}; give the model's own tokenizer"
        )
    if experiment.train.steps is None:
        settings = dataclasses.replace(experiment.train, steps=loader.num_steps)
        experiment = dataclasses.replace(experiment, train=settings)
    show = None
    if experiment.train.num_samples and not experiment.model.drop.num_stages and jax.process_count() == 1:
        rows = range(min(experiment.train.num_samples, experiment.data.batch_size))
        fixed = loader.plan.collate([loader.plan.make(i) for i in rows])
        show = samples(fixed, tokenizer.decode, tokenizer.eos_ids)
    with contextlib.closing(loader):
        fit(experiment, loader, decode=tokenizer.decode, evaluate=show)
    return 0


def samples(batch: Batch, decode: Callable[[Any], str], eos: tuple[int, ...]) -> Evaluate:
    """An evaluation that prints what the model says where each row has most to say, and counts exact answers.

    The longest supervised run, not the first: the reference also learns the newlines and marks of the prompt.
    """
    targets, slots = np.asarray(batch.targets), np.asarray(batch.slots)
    said_next = ~np.isin(targets, eos) & np.pad(slots[:, 1:] < 0, ((0, 0), (0, 1)), constant_values=True)
    supervised = (np.asarray(batch.segments) == 1) & (np.asarray(batch.weights) > 0) & said_next
    rows = np.flatnonzero(supervised.any(1))
    runs = [_longest_run(supervised[b]) for b in rows]
    wanted = [targets[b, run].tolist() for b, run in zip(rows, runs, strict=True)]
    starts = np.array([run.start for run in runs])
    prompts = jax.tree.map(lambda a: np.asarray(a)[rows], batch)
    inside = np.arange(supervised.shape[1]) <= starts[:, None]
    prompts = dataclasses.replace(prompts, segments=np.where(inside, prompts.segments, 0))

    def show(model: Any, step: int) -> dict[str, float]:
        settings = GenerationConfig(max_new_tokens=max(map(len, wanted)) + 1, eos=eos)  # and its end
        said = [_until(ids.tolist(), eos) for ids in generate(model, prompts, settings).ids]
        for ids, want in zip(said, wanted, strict=True):
            print(f"  step {step}: says {decode(ids).strip()!r}, expected {decode(want).strip()!r}", flush=True)
        return {"exact": sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)}

    return show if wanted else lambda model, step: {}


def _longest_run(mask: np.ndarray) -> slice:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    first = int(np.argmax(edges[1::2] - edges[::2]))
    return slice(int(edges[2 * first]), int(edges[2 * first + 1]))


def _until(ids: list[int], eos: tuple[int, ...]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in eos), len(ids))]
