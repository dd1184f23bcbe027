from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.options import DataConfig
from hico_jax import checkpoint, config, metrics, optim, preempt, registry, start, step, train
from hico_jax.batch import Batch
from hico_jax.config import CheckpointConfig, Experiment, TrainConfig
from hico_jax.parallel.mesh import MeshConfig

MODEL = registry.model_config("tiny")
ONE = jax.devices()[:1]
ROOT = pathlib.Path(__file__).resolve().parents[2]


def fake(seed: int, rows: int = 4, **changes: Any) -> Batch:
    return Batch.fake(MODEL.geometry(), rows=rows, seed=seed, vocab=MODEL.llm.vocab_size, **changes)


def experiment(workdir: pathlib.Path, steps: int = 4, every: int = 2, **optim_changes: Any) -> Experiment:
    return Experiment(
        "test", "tiny", MODEL, DataConfig(batch_size=4), optim.OptimConfig(lr=1e-2, **optim_changes),
        train=TrainConfig(steps=steps, log_every=1), checkpoint=CheckpointConfig(every=every, keep=3),
        workdir=str(workdir),
    )  # fmt: skip


def losses_of(workdir: pathlib.Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics.read(str(workdir))]


def leaves(state: Any) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(state)]


class Info(NamedTuple):
    ids: tuple[str, ...]
    waste: float = 0.25
    bad_total: dict[str, int] = {}  # noqa: RUF012


class Item(NamedTuple):
    batch: Batch
    info: Info


class Counter:
    """A source with a position, as the loader has; may do something before it yields a batch."""

    def __init__(self, before: Any = None) -> None:
        self.position, self.before = 0, before

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        self.position += 1
        if self.before:
            self.before(self.position)
        return Item(fake(self.position), Info((f"clip-{self.position}",)))

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Runs of the same settings on the same mesh share what they compile: every start would compile the same."""
    begin, held = step.Stepper.__init__, dict[str, Any]()

    def stepper(self: Any, settings: Experiment, begun: start.Start, mesh: Any, say: Any) -> None:
        begin(self, settings, begun, mesh, say)
        same = dataclasses.replace(settings, workdir="", checkpoint=CheckpointConfig())
        self._compiled = held.setdefault(f"{same} {mesh}", {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.Stepper, "__init__", stepper)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    """Six steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train.fit(experiment(workdir, steps=6), Counter(), devices=ONE)


def test_a_run_leaves_its_files_and_learns(straight: tuple[pathlib.Path, Any]) -> None:
    workdir, state = straight
    assert int(state.step) == 6
    lines = metrics.read(str(workdir))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["lr"] == 0.0
    assert lines[1]["lr"] == pytest.approx(1e-2)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["tokens"] == 4 * 20
    assert lines[0]["padding_percent"] == 25
    assert lines[0]["compile_s"] > 0
    assert lines[1]["compile_s"] == 0
    assert config.from_json((workdir / "config.json").read_text()).num_steps == 6
    assert json.loads((workdir / "env.json").read_text())["device_kind"] == "cpu"
    assert (workdir / "first_batch.png").stat().st_size > 1000
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_stopped_by_sigterm_and_resumed_equals_straight(
    straight: tuple[pathlib.Path, Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(position: int) -> None:
        if position == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    half = train.fit(experiment(tmp_path, steps=6), Counter(before=stop), devices=ONE)
    assert int(half.step) == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    whole = train.fit(experiment(tmp_path, steps=6), Counter(), devices=ONE)
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after step 3, saved" in said
    assert "weights: resumed at step 3" in said
    for a, b in zip(leaves(whole), leaves(straight[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses_of(tmp_path) == losses_of(straight[0])


# Stops itself (SIGSTOP, all its threads at once) at some of the file operations of its saves; argument 2 numbers them.
STOPPED = """
import os, pathlib, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
sys.path.insert(0, {tests!r})
from hico_jax import train
import test_train
workdir, points, seen = sys.argv[1], set(map(int, sys.argv[2].split(","))), 0
def audit(event, values):
    global seen
    if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        return
    if not values or not str(values[0]).startswith(workdir + "/checkpoints"):
        return
    if event == "open" and not (isinstance(values[1], str) and set(values[1]) & set("wax+")):
        return
    seen += 1
    if seen in points:
        os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(audit)
train.fit(test_train.experiment(pathlib.Path(workdir), steps=6), test_train.Counter(), devices=jax.devices()[:1])
"""


def instants(folder: pathlib.Path, number: int, moments: int) -> list[pathlib.Path]:
    """The workdir of a run as it stands at file operations of its saves and at moments between; killed at the last.

    What a stopped process leaves on disk is what SIGKILL would leave then. There are about ninety operations.
    """
    rng, workdir, found = np.random.default_rng(0), folder / "killed", list[pathlib.Path]()
    edges = np.linspace(1, 85, number - moments + 1).astype(int)  # all three saves have their share
    chosen = [int(rng.integers(low, high)) for low, high in itertools.pairwise(edges)]
    chosen += range(85, 85 + moments)  # for moments that fall on an operation
    between = sorted(rng.integers(1, number, moments).tolist())  # so many stops come before each moment
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED.format(tests=str(pathlib.Path(__file__).parent)), str(workdir),
         ",".join(map(str, chosen))],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    passed = 0
    while True:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"it ended with {os.waitstatus_to_exitcode(status)}"
        passed += 1
        if passed == number:
            break
        found.append(folder / str(len(found)))
        shutil.copytree(workdir, found[-1])
        os.kill(process.pid, signal.SIGCONT)
        if between and passed > between[0]:
            del between[0]
            time.sleep(float(rng.uniform(0, 0.01)))
            os.kill(process.pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    return [*found, workdir]


@pytest.mark.timeout(600)
def test_a_run_resumes_from_what_any_of_twenty_instants_leaves(
    straight: tuple[pathlib.Path, Any],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`benchmarks/kill_anywhere.py` kills for real every time, and resumes in new processes."""
    random = start._random  # every restart would draw the same numbers
    drawn: list[Any] = []

    def once(*arguments: Any) -> Any:
        drawn[:] = drawn or [random(*arguments)]
        return jax.tree.map(jnp.copy, drawn[0])

    monkeypatch.setattr(start, "_random", once)
    found, origins = instants(tmp_path, 20, moments=4), set()
    assert len(found) == 20
    for copy in found:
        state = train.fit(experiment(copy, steps=6), Counter(), devices=ONE)
        said = capsys.readouterr().out.splitlines()
        origins.add(next(line for line in said if line.startswith("weights:")).split("(")[0])
        assert losses_of(copy) == losses_of(straight[0]), copy
        for a, b in zip(leaves(state), leaves(straight[1]), strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(origins) >= 3, origins  # of random weights, and of several checkpoints


def test_a_finished_run_has_nothing_to_do(
    straight: tuple[pathlib.Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = losses_of(straight[0])
    other = experiment(straight[0], steps=6, every=3)
    train.fit(other, Counter(before=lambda _: pytest.fail("no batch is needed")), devices=ONE)
    said = capsys.readouterr().out
    assert "all 6 steps are done" in said
    assert "WARNING: changed since the checkpoint: checkpoint.every: 2 -> 3" in said
    assert losses_of(straight[0]) == before


def test_sigterm_while_the_last_save_is_written_does_not_end_it(
    straight: tuple[pathlib.Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, close = [], checkpoint.Checkpointer.close

    def told(saved: checkpoint.Checkpointer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        closed.append(close(saved))

    monkeypatch.setattr(checkpoint.Checkpointer, "close", told)
    with preempt.exit_on_sigterm():
        train.fit(experiment(straight[0], steps=6), Counter(), devices=ONE)
    assert len(closed) == 1


def test_a_list_of_batches_of_two_shapes_and_an_evaluation(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [fake(0), fake(1, clips=1), fake(2), fake(3, clips=1)]
    seen: list[int] = []

    def evaluate(model: Any, step: int) -> dict[str, float]:
        seen.append(step)
        return {"vocab": model.llm.unembed_weight().shape[1]}

    exp = experiment(tmp_path)
    exp = dataclasses.replace(exp, train=dataclasses.replace(exp.train, eval_every=3))
    train.fit(exp, batches, evaluate=evaluate, devices=ONE)
    said = capsys.readouterr().out
    assert said.count("compiling for") == 2
    assert "compiling for 4 rows of 20 tokens, 2 clips and 0 images ..." in said
    assert seen == [3, 4]
    lines = metrics.read(str(tmp_path))
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 4]
    assert lines[3] == {"step": 3, "eval/vocab": 64.0}

    longer = dataclasses.replace(exp, train=dataclasses.replace(exp.train, steps=6))
    with pytest.raises(ValueError, match=r"the data ends before step 5"):
        train.fit(longer, batches, devices=ONE)


def test_bfloat16_on_a_cpu_is_refused_before_anything_is_made(tmp_path: pathlib.Path) -> None:
    asked = experiment(tmp_path)
    asked = dataclasses.replace(asked, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"model.dtype is 'bfloat16', .* on a CPU; set it to 'float32'"):
        train.fit(asked, [], devices=ONE)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: pathlib.Path) -> None:
    def poisoned(seed: int) -> Item:
        batch = fake(seed)
        if seed == 2:
            batch = dataclasses.replace(batch, weights=np.where(batch.weights > 0, np.float32(np.inf), np.float32(0)))
        return Item(batch, Info((f"clip-{seed}",)))

    with pytest.raises(train.NonFiniteLossError, match=r"the loss of step 2 is nan .*Examples: clip-2\."):
        train.fit(experiment(tmp_path, steps=4, every=2), [poisoned(i) for i in (1, 2, 3, 4)], devices=ONE)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def one_step(
    settings: Experiment, devices: Any, batch: Batch, say: Any = lambda _: None
) -> tuple[Any, dict[str, float]]:
    mesh = train.make_mesh(settings.mesh, devices)
    with jax.set_mesh(mesh):
        begun = train.init_state(settings, mesh)
        stepper = train.Stepper(settings, begun, mesh, say)
        state, numbers = stepper(begun.state, stepper.put(batch))
    return state, {k: float(v) for k, v in numbers.items()}


ADAM_OFF = {"eps": 1e6, "warmup_steps": 0, "schedule": "constant", "clip_norm": 0.0}  # moves by the gradient itself


@pytest.fixture(scope="module")
def plain_step() -> tuple[Any, dict[str, float]]:
    return one_step(experiment(pathlib.Path(), **ADAM_OFF), ONE, fake(0, rows=8))


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        pytest.param(MeshConfig(2, 2, 1, 2), 1, marks=pytest.mark.slow),  # test_scale.py has a mix of all axes
        pytest.param(MeshConfig(1, 2, 2, 2), 2, marks=pytest.mark.slow),
        (MeshConfig(1, 3, 2, 1), 2),
        (MeshConfig(1, 1, 1, 1), 4),
    ],
)
def test_meshes_and_micro_batches_give_the_same_step(
    plain_step: tuple[Any, dict[str, float]], mesh: MeshConfig, accumulate: int
) -> None:
    """Also where rows do not divide: four of a micro-batch over three devices."""
    settings = dataclasses.replace(experiment(pathlib.Path(), **ADAM_OFF, accumulate=accumulate), mesh=mesh)
    said: list[str] = []
    state, numbers = one_step(settings, jax.devices()[: math.prod(mesh.sizes)], fake(0, rows=8), said.append)
    warned = [line for line in said if "4 of 12 rows are copies that do not count" in line]
    assert len(warned) == (mesh.fsdp == 3)
    for name, value in plain_step[1].items():
        assert numbers[name] == pytest.approx(value, rel=1e-5), name
    for a, b in zip(leaves(state.optimizer), leaves(plain_step[0].optimizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)  # gradients of size 0.1, sums in another order


def test_micro_batch_means_count_the_same() -> None:
    """Two micro-batches of unequal supervision: their means are averaged, not their tokens."""
    batch = fake(0)
    weights = batch.weights.copy()
    weights[1::2, :-3] = 0  # rows 1 and 3 are the second micro-batch
    batch = dataclasses.replace(batch, weights=weights)
    settings = experiment(pathlib.Path(), **ADAM_OFF, accumulate=2, loss_average="micro_batch")
    _, numbers = one_step(settings, ONE, batch)
    parts = [jax.tree.map(lambda a, i=i: a[i::2], batch) for i in range(2)]
    single = experiment(pathlib.Path(), **ADAM_OFF)
    means = [one_step(single, ONE, part)[1]["loss"] for part in parts]
    assert numbers["loss"] == pytest.approx(np.mean(means), rel=1e-5)


def test_frozen_weights_do_not_move() -> None:
    settings = experiment(pathlib.Path(), rates=((r"projector/.*", "lr"), (r".*", None)), warmup_steps=0)
    begun = train.init_state(settings, train.make_mesh(MeshConfig(), ONE))
    before = leaves(begun.state.frozen)
    state, _ = one_step(settings, ONE, fake(0))
    for a, b in zip(leaves(state.frozen), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all((a != b).any() for a, b in zip(leaves(state.trainable), leaves(begun.state.trainable), strict=True))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=missing.py"], "hico train: there is no configuration file missing.py"),
        ([f"--config={ROOT}/configs/debug_tiny.py"], "hico train: no workdir is given; add --config.workdir=FOLDER"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(argv) == 2
    assert capsys.readouterr().err.startswith(message)


def test_samples_show_what_the_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    batch = fake(0, rows=3)
    batch.weights[1] = 0  # asks nothing
    model = MODEL.build(rngs=train.nnx.Rngs(0))
    show = train.samples(batch, lambda ids: ",".join(map(str, ids)), eos=(63,))
    found = show(model, 7)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    supervised = batch.targets[0][batch.weights[0] > 0]
    assert said[0].endswith(f"expected '{','.join(map(str, supervised))}'")
    first = int(np.argmax(batch.weights[0] > 0))
    hidden = jax.jit(lambda m, b: m(b).x)(model, jax.tree.map(jnp.asarray, batch))[0, first]
    assert said[0].startswith(f"  step 7: says '{int(jnp.argmax(hidden @ model.llm.unembed_weight()))}")
    assert found == {"exact": 0.0}


def test_costs_count_what_trains() -> None:
    frozen = experiment(pathlib.Path(), rates=((r"projector/.*", "lr"), (r".*", None)))
    whole, some = (
        train.step_cost(exp, train.init_state(exp, train.make_mesh(MeshConfig(), ONE)).state)
        for exp in (experiment(pathlib.Path()), frozen)
    )
    tokens, frames = {"tokens": 1, "frames": 0}, {"tokens": 0, "frames": 1}
    assert some(tokens) / whole(tokens) == pytest.approx(4 / 6)  # gradients pass through, none are kept
    assert some(frames) / whole(frames) == pytest.approx(2 / 6)
    assert jnp.isfinite(whole(tokens))
