"""Train: one loop for every stage. What a stage is stands in its configuration.

    init_state   weights and optimizer, laid out on the mesh, from the first source there is (start.py)
    train_step   one update, on the device (step.py)
    fit          the loop: data, steps, metrics, checkpoints

In: an `Experiment` and an iterator of batches. Out: a workdir with config.json, metrics.jsonl, checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from data_pipeline.loader import make_loader
from data_pipeline.together import Shared
from hico_jax import checkpoint, config, first_batch, lora, metrics, overview
from hico_jax.batch import Batch
from hico_jax.config import Experiment
from hico_jax.parallel import context, hosts, sharding
from hico_jax.parallel.mesh import make_mesh
from hico_jax.preempt import AGAIN, Notice, exit_on_sigterm
from hico_jax.samples import Evaluate, samples
from hico_jax.start import Start, TrainState, abstract_start, init_state, params_dict
from hico_jax.step import Stepper, step_cost

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "env.json"
FIRST_BATCH_FILE, FIRST_BATCH_PAGE = "first_batch.png", "first_batch.html"
TRACE_FOLDER = "trace"


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names the step and the examples."""


# ----------------------------------------------------------------------------------------------- the loop


@dataclasses.dataclass
class Run:
    """What the loop holds besides the state."""

    experiment: Experiment
    saved: checkpoint.Checkpointer
    writer: metrics.Writer
    progress: metrics.Progress
    notice: Notice = dataclasses.field(default_factory=Notice)
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
        meta = {
            "data": data, "config": json.loads(config.to_json(self.experiment)), "metrics": self.writer.tail(),
            "rng": {"seed": self.experiment.train.seed, "step": step},  # every key of a step is folded from these
        }  # fmt: skip
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
      ValueError: the data ends before the last step, weights do not fit, or bfloat16 on a CPU.
    """
    mesh = make_mesh(experiment.mesh, devices)
    if experiment.model.dtype == "bfloat16" and mesh.devices.flat[0].platform == "cpu":
        # It compiles, and fails at the first product that is summed in float32.
        raise ValueError("model.dtype is 'bfloat16', which cannot be trained in on a CPU; set it to 'float32'")
    saved = checkpoint.Checkpointer(experiment.workdir, experiment.checkpoint)
    notice = Notice()
    # Saves are closed before SIGTERM ends the program again: told while the last one is written, it still is.
    with jax.set_mesh(mesh), context.using(experiment.mesh.context), notice.on_sigterm(), contextlib.closing(saved):
        start = init_state(experiment, mesh, saved)
        first = int(jax.device_get(start.state.step))
        run = Run(
            experiment, saved, metrics.Writer(experiment.workdir, first, (start.meta or {}).get("metrics", ())),
            metrics.Progress(experiment.num_steps, experiment.train.log_every, start=first, title=experiment.stage),
            notice,
        )  # fmt: skip
        _begin(run, start)
        with contextlib.closing(run.writer), contextlib.closing(run.progress):
            return _loop(run, start, Source(batches, first, start.meta and start.meta["data"]), mesh, decode, evaluate)


def compile_ahead(experiment: Experiment, batches: Iterable[Any], devices: Sequence[Any] | None = None) -> None:
    """Compile the step for the first batch, from shapes alone: with JAX_COMPILATION_CACHE_DIR set, the run finds it."""
    mesh = make_mesh(experiment.mesh, devices)
    with jax.set_mesh(mesh), context.using(experiment.mesh.context):
        start = abstract_start(experiment, mesh)
        stepper = Stepper(experiment, start, mesh, print)
        batch, _, _ = Source(batches, 0, None).next(1)
        stepper.compiled(start.state, stepper.put(batch))


def _loop(
    run: Run, start: Start, source: Source, mesh: Mesh, decode: Callable[[Any], str] | None, evaluate: Evaluate | None
) -> TrainState:
    experiment, state, notice = run.experiment, start.state, run.notice
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
            _draw(batch, epath.Path(experiment.workdir), decode)
        _trace(experiment, step)
        count = metrics.counts(batch, geometry)
        if jax.process_count() > 1:  # the others' rows are about as long
            count = {name: n * experiment.data.batch_size // batch.shape[0] for name, n in count.items()}
        state, numbers = stepper(state, stepper.put(batch))
        about |= {"copied_rows": stepper.copied} if stepper.copied else {}
        run.log()  # of the step before, while this one runs
        now = time.monotonic()
        seconds = now - began - stepper.compile_s
        flops = cost(count)
        rates = metrics.rates(count, seconds, waited, flops, peak and peak * mesh.size)
        run.waiting = (step, numbers, count | rates | about | {"compile_s": stepper.compile_s}, ids)
        began = now
        stop = notice.stops(step)
        last = step == steps or stop
        if last or step % experiment.checkpoint.every == 0:
            run.save(state, step, source.position())
        if evaluate and (last or (experiment.train.eval_every and step % experiment.train.eval_every == 0)):
            run.log()
            model = nnx.merge(start.graphdef, *lora.join(state.trainable, state.frozen, experiment.lora))
            run.writer.write(step, {f"eval/{k}": float(v) for k, v in evaluate(model, step).items()})
        if stop:
            run.progress.say(f"stopped by SIGTERM after step {step}, saved; the same command goes on from here")
            break
    run.log()
    _trace(experiment, None)
    return state


def _trace(experiment: Experiment, step: int | None) -> None:
    """Start or stop the profiler before a step; at the end (None) stop it if it runs."""
    if not experiment.train.trace:
        return
    first, count = experiment.train.trace
    if step == first:
        jax.profiler.start_trace(str(epath.Path(experiment.workdir) / TRACE_FOLDER))
    elif step == first + count or (step is None and first <= experiment.num_steps < first + count):
        with contextlib.suppress(RuntimeError):  # it never began: the run went on from a later step
            jax.profiler.stop_trace()


def _draw(batch: Batch, workdir: epath.Path, decode: Callable[[Any], str] | None) -> None:
    """What the model is about to see, as a picture and as a page."""
    if jax.process_index() == 0:
        metrics.contact_sheet(batch, workdir / FIRST_BATCH_FILE, decode=decode)
        (workdir / FIRST_BATCH_PAGE).write_text(first_batch.page(batch, decode))


def _begin(run: Run, start: Start) -> None:
    """Say what is about to happen, and write it down: config.json, env.json."""
    experiment = run.experiment
    sizes = [sum(a.size for a in jax.tree.leaves(half)) for half in (start.state.trainable, start.state.frozen)]
    devices = jax.devices()
    run.progress.say(f"{experiment.stage}: {experiment.model_name}, {sizes[0]:,} parameters train, {sizes[1]:,} frozen")
    run.progress.say(f"weights: {start.origin}")
    run.progress.say(f"devices: {len(devices)} x {devices[0].device_kind}; workdir: {experiment.workdir}")
    for told in (*overview.table(start.state), *overview.memory(jax.local_devices())):
        run.progress.say(told)
    resolved = json.loads(config.to_json(experiment))
    for line in config.differences(start.meta["config"], resolved) if start.meta else ():
        run.progress.say(f"WARNING: changed since the checkpoint: {line}")
    if int(jax.device_get(start.state.step)) >= experiment.num_steps:
        run.progress.say(f"all {experiment.num_steps} steps are done; raise train.steps to go on")
    if jax.process_index() == 0:
        folder = epath.Path(experiment.workdir)
        metrics.write_whole(folder / CONFIG_FILE, config.to_json(experiment) + "\n")
        environment = {
            "python": platform.python_version(), "jax": jax.__version__, "devices": len(devices),
            "device_kind": devices[0].device_kind, "processes": jax.process_count(), "origin": start.origin,
        }  # fmt: skip
        metrics.write_whole(folder / ENVIRONMENT_FILE, json.dumps(environment, indent=2) + "\n")


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
        bad, order = sum(info.bad_total.values()), getattr(info, "order", 0)
        return item.batch, list(info.ids), {"padding_percent": 100 * info.waste, "bad": bad, "order": order}

    def position(self) -> Any:
        """What `set_state` takes to yield the next batch again; None if the data has no position of its own."""
        return self._iterator.get_state() if self._stateful else None


def main(argv: Sequence[str]) -> int:
    """`hico train --config=FILE[:VARIANT] [--config.a.b=VALUE ...]`: 0 done, 75 stopped and saved, 2 a mistake.

    `--dry_run` says what would be made; `--compile_only` compiles the step and stops.

    A mistake in flags or configuration is one sentence on stderr.
    """
    try:
        dry = [a for a in argv if a in ("--dry_run", "--dry-run")]
        ahead = [a for a in argv if a in ("--compile_only", "--compile-only")]
        experiment = config.from_flags([a for a in argv if a not in (*dry, *ahead)])
        if dry or experiment.train.dry_run:
            print("\n".join(overview.dry_run(experiment, make_mesh(experiment.mesh))))
            return 0
        if not experiment.workdir:
            raise ValueError("no workdir is given; add --config.workdir=FOLDER")
    except ValueError as error:
        print(f"hico train: {error}", file=sys.stderr)
        return 2
    if experiment.train.distributed:
        hosts.join()
        return _train(experiment, compile_only=bool(ahead))
    with exit_on_sigterm():
        return _train(experiment, compile_only=bool(ahead))


_HELD: list[Any] = []  # loaders that must not be collected before the program ends


def _train(experiment: Experiment, *, compile_only: bool = False) -> int:
    mesh = make_mesh(experiment.mesh)
    index, count = sharding.rows_of(mesh)
    share = sharding.clip_share(mesh)
    shared = share and Shared(share[0], hosts.Agreement(share[1]))
    loader = make_loader(
        experiment.data, experiment.model.geometry(), process_index=index, process_count=count, shared=shared
    )
    tokenizer = loader.plan.tokenizer
    if tokenizer.vocab_size > experiment.model.llm.vocab_size:
        raise ValueError(
            f"{experiment.data.tokenizer} has {tokenizer.vocab_size} tokens but the model has rows for "
            f"{experiment.model.llm.vocab_size}; give the model's own tokenizer"
        )
    if experiment.train.steps is None:
        settings = dataclasses.replace(experiment.train, steps=loader.num_steps)
        experiment = dataclasses.replace(experiment, train=settings)
    closing: contextlib.AbstractContextManager[Any] = contextlib.closing(loader)
    if experiment.data.worker_count:  # its processes are ended with the program, at once; closing waits for each
        _HELD.append(loader)
        closing = contextlib.nullcontext()
    if compile_only:
        with closing:
            compile_ahead(experiment, loader)
        return 0
    show = None
    if experiment.train.num_samples and not experiment.model.drop.num_stages and jax.process_count() == 1:
        rows = range(min(experiment.train.num_samples, experiment.data.batch_size))
        fixed = loader.plan.collate([loader.plan.make(i) for i in rows])
        show = samples(fixed, tokenizer.decode, tokenizer.eos_ids)
    with closing:
        state = fit(experiment, loader, decode=tokenizer.decode, evaluate=show)
    return 0 if int(jax.device_get(state.step)) >= experiment.num_steps else AGAIN
