"""The launch scripts: clean by shellcheck, what they would run, and a pod's life against a stub of gcloud."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TPU = ROOT / "launch" / "tpu"
WHERE = ["--name=run1", "--zone=us-east5-a", "--type=v5p-128"]

STUB = """#!/usr/bin/env bash
# Writes down what it is called with; answers from files in $STUB that are used up line by line.
echo "gcloud $*" >> "$STUB/calls"
answer() {
  if [ -s "$STUB/$1" ]; then head -n 1 "$STUB/$1" > "$STUB/$1.last"; sed -i 1d "$STUB/$1"; fi
  cat "$STUB/$1.last" 2>/dev/null
}
case "$*" in
  *"queued-resources describe"*) answer queued ;;
  *"tpu-vm describe"*) answer state ;;
  *HICO_EXIT\\ 0*) answer progress ;;
esac
"""


def script(name: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / name), *args], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


@pytest.fixture
def stub(tmp_path: pathlib.Path) -> dict[str, str]:
    (tmp_path / "gcloud").write_text(STUB)
    (tmp_path / "gcloud").chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "STUB": str(tmp_path), "HICO_WAIT_S": "0", "HICO_POLL_S": "0",
        "HICO_BACKOFF_S": "0",
    }  # fmt: skip


def calls(stub: dict[str, str]) -> list[str]:
    return (pathlib.Path(stub["STUB"]) / "calls").read_text().splitlines()


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck") or str(ROOT / ".venv/bin/shellcheck")
    if not os.path.exists(program):
        pytest.skip("shellcheck is not installed")
    files = [str(p) for p in sorted((ROOT / "launch").rglob("*.sh"))]
    found = subprocess.run([program, "-x", *files], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["tpu/create.sh", *WHERE, "--spot"], "v5p-128 --runtime-version v2-alpha-tpuv5 --node-id run1 --spot"),
        (["tpu/create.sh", *WHERE, "--slices=2", "--reserved"], "--node-prefix run1 --node-count 2 --reserved"),
        (["tpu/setup.sh", *WHERE, "--source=gs://b/h.tar.gz"], "gsutil"),
        (["tpu/start.sh", *WHERE, "--", "--config=c.py"], "--xla_tpu_scoped_vmem_limit_kib=65472"),
        (["tpu/logs.sh", *WHERE, "--", "3"], "--worker=3"),
        (["tpu/stop.sh", *WHERE], "kill"),
        (["tpu/delete.sh", *WHERE], "queued-resources delete run1 --zone us-east5-a --force --quiet"),
        (["tpu/babysit.sh", *WHERE, "--", "--config=c.py"], "after a preemption delete and begin again"),
        (["gke.sh", "--cluster=c", "--image=i", *WHERE, "--", "--config=c.py"], "gcluster job submit --name run1"),
        (["local.sh", "--processes=2", "--", "--config=c.py"], "HICO_PROCESS=1 HICO_PROCESSES=2"),
    ],
    ids=lambda a: a[0] if isinstance(a, list) else "",
)  # fmt: skip
def test_dry_runs_show_the_commands_and_run_none(args: list[str], shown: str, stub: dict[str, str]) -> None:
    name, *rest = args
    split = rest.index("--") if "--" in rest else len(rest)
    found = script(name, *rest[:split], "--dry_run", *rest[split:], env=stub)
    assert found.returncode == 0, found.stderr
    assert shown in found.stdout
    assert not (pathlib.Path(stub["STUB"]) / "calls").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["tpu/create.sh", "--zone=z"], "no --name=NAME"),
        (["tpu/create.sh", "--name=n"], "no --zone=ZONE"),
        (["tpu/create.sh", "--name=n", "--zone=z", "--type=h100-8", "--dry_run"], "it reads v5litepod-32"),
        (["tpu/create.sh", *WHERE, "--slices=none"], "must be a whole number"),
        (["tpu/create.sh", *WHERE, "--spot", "--reserved", "--dry_run"], "exclude each other"),
        (["tpu/create.sh", *WHERE, "--nonsense"], "unknown flag --nonsense"),
        (["tpu/start.sh", *WHERE], "nothing to run"),
        (["gke.sh", *WHERE, "--", "x"], "no --cluster"),
        (["local.sh", "--processes=0", "--", "x"], "must be a whole number"),
    ],
)
def test_mistakes_are_one_line(args: list[str], says: str) -> None:
    found = script(*args)
    assert found.returncode == 2
    assert says in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_slice_is_waited_for(stub: dict[str, str]) -> None:
    pathlib.Path(stub["STUB"], "queued").write_text("ACCEPTED\nPROVISIONING\nACTIVE\n")
    assert script("tpu/create.sh", *WHERE, env=stub).returncode == 0
    assert len(calls(stub)) == 4
    pathlib.Path(stub["STUB"], "queued").write_text("FAILED\n")
    assert "run1 is FAILED" in script("tpu/create.sh", *WHERE, env=stub).stderr


def test_a_preempted_run_is_started_again(stub: dict[str, str]) -> None:
    where = pathlib.Path(stub["STUB"])
    (where / "queued").write_text("ACTIVE\n")
    (where / "state").write_text("READY\nPREEMPTED\nREADY\n")
    (where / "progress").write_text("running\ndone\n")
    found = script("tpu/babysit.sh", *WHERE, "--spot", "--source=gs://b/h.tar.gz", "--", "--config=c.py", env=stub)
    assert found.returncode == 0, found.stderr
    made = [c.split()[4] for c in calls(stub) if "queued-resources" in c and "describe" not in c]
    assert made == ["create", "delete", "create"]


def test_the_same_failure_at_the_same_step_ends_it(stub: dict[str, str]) -> None:
    where = pathlib.Path(stub["STUB"])
    (where / "queued").write_text("ACTIVE\n")
    (where / "state").write_text("READY\n")
    (where / "progress").write_text("failed 10\nfailed 12\nfailed 12\n")
    found = script("tpu/babysit.sh", *WHERE, "--source=gs://b/h.tar.gz", "--", "--config=c.py", env=stub)
    assert found.returncode == 2
    assert "failed twice at step 12" in found.stderr


def test_a_stale_lock_is_taken_over_and_a_live_one_names_its_process(tmp_path: pathlib.Path) -> None:
    """The worker's own command, run here by a gcloud that is a shell."""
    home = tmp_path / "hico"
    (home / ".venv" / "bin").mkdir(parents=True)
    program = home / ".venv" / "bin" / "hico"
    program.write_text('#!/bin/sh\necho "ran $*"\n')
    program.chmod(0o755)
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/usr/bin/env bash\ncd "$STUB"\nexec bash -c "${@: -1}"\n')
    gcloud.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STUB": str(tmp_path)}
    start = ["tpu/start.sh", *WHERE, "--", "--config=c.py"]
    gone = subprocess.Popen(["true"])
    gone.wait()
    for stale in (None, "", str(gone.pid)):  # no lock, an empty one, one of a process that is gone
        if stale is not None:
            (home / ".run.lock").write_text(stale)
        assert script(*start, env=env).returncode == 0
        assert (home / ".run.lock").read_text().strip() not in ("", str(gone.pid))
    (home / ".run.lock").write_text(str(os.getpid()))
    found = script(*start, env=env)
    assert found.returncode != 0
    assert f"a run is going on in hico: process {os.getpid()}; launch/tpu/stop.sh ends it" in found.stderr
    assert (home / ".run.lock").read_text() == str(os.getpid())
