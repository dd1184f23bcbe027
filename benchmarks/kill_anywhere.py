"""Kill a run anywhere, start it again, and compare with a run that was never killed: bit for bit.

    python benchmarks/kill_anywhere.py --instants 200
    python benchmarks/kill_anywhere.py --instants 20 --processes 2
    python benchmarks/kill_anywhere.py --instants 20 --signal TERM
    python benchmarks/kill_anywhere.py --instants 20 --fork --steps 6 --every 2
    python benchmarks/kill_anywhere.py --named --fork

Half of the instants are random moments of a life; the other half are named points: every file operation that a
process does below its checkpoint folder (create, open for writing, rename, delete), as Python's own audit hook
reports them. A run goes on from kill to kill until it is done; then another begins, until the instants are used up.
With --named every named point has its turn once, and nothing else is killed.
SIGTERM must end with code 75 and lose no step. With --fork a life begins where Python has imported everything and JAX
has not yet looked for devices: a third of a short life is imports otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
AGAIN = 75
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def main(argv: list[str] | None = None) -> int:
    """Drive, or with --child be driven."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3, help="steps between saves")
    parser.add_argument("--processes", type=int, default=1, help="joined by jax.distributed")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--model", default="tiny", help="tiny or nano")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--named", action="store_true", help="every named point once, whatever --instants says")
    parser.add_argument("--fork", action="store_true", help="fork lives from a process that has imported all")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--point", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args)
    if args.fork and args.processes > 1:
        parser.error("--fork is for one process")
    with tempfile.TemporaryDirectory() as folder:
        found = drive(args, pathlib.Path(folder))
    print(json.dumps(found, indent=2))
    return 0 if found["different"] == 0 else 1


def drive(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Kill until the instants are used up, and count what differed."""
    rng = random.Random(args.seed)
    data = make_data(folder)
    life(args, folder / "warm", data, "")  # fills the compilation cache
    began = time.monotonic()
    assert life(args, folder / "straight", data, "record") == 0
    length = time.monotonic() - began
    want = outcome(folder / "straight", args.steps)
    points = json.loads((folder / "straight" / "points.json").read_text())
    todo = [p for i, p in enumerate(points) if p not in points[:i]]
    rng.shuffle(todo)
    kills = {"random": 0, "point": 0, "survived": 0}
    hit: set[str] = set()
    different, lost, early, runs = 0, 0, 0, 0

    def found() -> dict[str, Any]:
        return {
            "signal": args.signal, "processes": args.processes, "model": args.model, "runs": runs,
            "killed at random": kills["random"], "killed at named points": kills["point"],
            "named points": len(set(points)), "of them hit": len(hit), "different": different + lost,
            "ended before SIGTERM is heard": early, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    total = len(todo) if args.named else args.instants

    def more() -> bool:
        return bool(todo) if args.named else kills["random"] + kills["point"] < args.instants

    while more():
        workdir, runs = folder / f"run{runs}", runs + 1
        while True:
            wanted = more()
            point = ""
            if wanted and (args.named or kills["point"] < kills["random"]):
                todo = todo or sorted(set(points))
                left = 1 - latest_step(workdir) / args.steps
                point = next((p for p in todo if met(p, points, left)), "")
            at_point = point != ""
            todo = [p for p in todo if p != point]
            wanted = wanted and (at_point or not args.named)
            delay = rng.uniform(0, 1.15 * length) if wanted and not at_point else None
            code = life(args, workdir, data, point, delay)
            if code == 0:
                kills["survived"] += wanted
                break
            if args.signal == "TERM":
                assert code in (AGAIN, -signal.SIGTERM), f"SIGTERM ended with code {code}, not {AGAIN}"
                early += code != AGAIN  # Python was still importing; a step that was logged must be saved all the same
                lost += not saved_all(workdir)
            else:
                assert code == -signal.SIGKILL, (
                    f"a life ended with code {code}: {(workdir / 'log').read_text()[-2000:]}"
                )
            kills["point" if at_point else "random"] += 1
            if at_point:
                hit.add(point)
        if outcome(workdir, args.steps) != want:
            different += 1
            print(f"run {runs - 1} differs from the run never killed", file=sys.stderr)
        shutil.rmtree(workdir)
        if args.json:  # after every run: what is known stays known
            pathlib.Path(args.json).write_text(json.dumps(found(), indent=2) + "\n")
        print(f"{kills['random'] + kills['point']} of {total} instants", file=sys.stderr, flush=True)
    return found()


def life(
    args: argparse.Namespace, workdir: pathlib.Path, data: pathlib.Path, point: str, delay: float | None = None
) -> int:
    """One process (or several) from start to its end; the first one's exit code."""
    workdir.mkdir(exist_ok=True)
    wanted = {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(data.parent / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HICO_KILL_DATA": str(data),
    }  # fmt: skip
    if args.fork:
        os.environ |= wanted  # before the first import of JAX, which reads it
        return forked(args, workdir, point, delay)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | wanted
    processes = []
    for rank in range(args.processes):
        command = [
            sys.executable, __file__, "--child", str(workdir), "--rank", str(rank), "--port", str(port),
            "--processes", str(args.processes), "--steps", str(args.steps), "--every", str(args.every),
            "--model", args.model, "--signal", args.signal, "--point", point if rank == 0 else "",
        ]  # fmt: skip
        with (workdir / f"log{rank or ''}").open("a") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        code = processes[0].wait(3600 if delay is None else delay)  # long: the machine may be stopped meanwhile
    except subprocess.TimeoutExpired:
        assert delay is not None, "a life took more than an hour: it hangs"
        processes[0].send_signal(getattr(signal, f"SIG{args.signal}"))
        code = processes[0].wait(1200)
    for other in processes[1:]:  # a pod's scheduler takes the others down too
        if code not in (0, AGAIN):
            other.kill()
        other.wait(1200)
    return code


def forked(args: argparse.Namespace, workdir: pathlib.Path, point: str, delay: float | None) -> int:
    """`life` without its imports."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from hico_jax import train  # noqa: F401  (JAX starts its threads with the first device, in the child)

    pid = os.fork()
    if pid == 0:
        log = os.open(workdir / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 70
        try:
            code = child(argparse.Namespace(**vars(args) | {"child": str(workdir), "point": point}))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + (3600 if delay is None else delay)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, getattr(signal, f"SIG{args.signal}"))
            end = float("inf")
        time.sleep(0.002)


def child(args: argparse.Namespace) -> int:
    """Train in this process; die at a point, or write down which points there are."""
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.rank)
    workdir = pathlib.Path(args.child)
    seen: list[str] = []
    if args.point:
        folder, counts = str(workdir / "checkpoints"), dict[str, int]()

        def audit(event: str, values: tuple[Any, ...]) -> None:
            if event not in EVENTS or not values or not str(values[0]).startswith(folder):
                return
            if event == "open" and not (isinstance(values[1], str) and set(values[1]) & set("wax+")):
                return
            name = point_name(event, str(values[0])[len(folder) :])
            counts[name] = counts.get(name, 0) + 1
            seen.append(f"{name}#{counts[name]}")
            if seen[-1] == args.point:
                os.kill(os.getpid(), getattr(signal, f"SIG{args.signal}"))

        sys.addaudithook(audit)
    from hico_jax import train

    data = os.environ["HICO_KILL_DATA"]
    code = train.main(
        [
            f"--config={ROOT}/configs/debug_tiny.py:{args.model}", f"--config.workdir={workdir}",
            f"--config.data.annotations={data}/short.yaml", f"--config.data.tokenizer={data}",
            f"--config.train.steps={args.steps}", f"--config.checkpoint.every={args.every}",
            "--config.data.batch_size=4", "--config.data.min_frames=4", "--config.data.max_frames=4",
            "--config.train.num_samples=0", "--config.data.prefetch_rows=4", "--config.data.read_threads=2",
        ]
    )  # fmt: skip
    if args.point == "record":
        (workdir / "points.json").write_text(json.dumps(seen))
    return code


def met(point: str, points: list[str], left: float) -> bool:
    """Whether a life that has this part of the run left comes to a point: counts begin again with each life.

    Example:
      >>> [met("rename STEP#2", ["rename STEP#1", "rename STEP#2"], left) for left in (1, 0.5)]
      [True, False]
    """
    name, _, count = point.rpartition("#")
    return int(count) <= left * sum(p.rpartition("#")[0] == name for p in points)


def latest_step(workdir: pathlib.Path) -> int:
    """The newest step whose checkpoint was committed; 0 without any."""
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


def point_name(event: str, path: str) -> str:
    """A file operation without what differs from run to run.

    Example:
      >>> point_name("os.rename", "/3.orbax-checkpoint-tmp/params")
      'rename STEP.orbax-checkpoint-tmp/params'
    """
    parts = ["STEP" + p[len(p.split(".")[0]) :] if p.split(".")[0].isdigit() else p for p in path.split("/")[1:]]
    parts = ["process" if p.startswith("ocdbt.process") else p for p in parts]
    return f"{event.removeprefix('os.')} {'/'.join(parts)}"


def make_data(folder: pathlib.Path) -> pathlib.Path:
    """A small world to train on."""
    command = [sys.executable, "-m", "hico_jax", "world", "--out", str(folder / "world"), "--preset", "tiny"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder / "world"


def outcome(workdir: pathlib.Path, steps: int) -> dict[str, Any]:
    """Losses of every step, and a digest of what the last checkpoint holds."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "order", "loss", "grad_norm", "accuracy", "lr", "tokens", "frames", "bad")
    losses = [{k: line[k] for k in kept} for line in lines if "loss" in line]
    meta = json.loads((workdir / "checkpoints" / str(steps) / "meta" / "metadata").read_text())["body"]
    arrays = hashlib.sha256(json.dumps(meta["arrays"], sort_keys=True).encode()).hexdigest()
    return {"losses": losses, "arrays": arrays, "data": meta["data"]}


def saved_all(workdir: pathlib.Path) -> bool:
    """Whether the newest checkpoint is of the last step that was logged."""
    if not (workdir / "metrics.jsonl").exists():
        return True
    lines = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return max(lines, default=0) <= latest_step(workdir)


if __name__ == "__main__":
    sys.exit(main())
