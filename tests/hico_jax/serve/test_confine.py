"""A process that reads strangers' files reaches no network, writes and removes nothing; each of two means is enough."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys

import pytest

from hico_jax.serve.confine import FILTER, NAMESPACE, program
from hico_jax.serve.decoder import Decoder

CONFINED = """
import os, resource, signal, socket, sys, threading
from hico_jax.serve import confine, decoder

def attempt(without):
    if without == "namespace":
        confine._NEW_USER = confine._NEW_NET = 0x40  # no such flag
    if without == "filter":
        confine._MACHINES.clear()
    held = decoder._confine(decoder.Limits(memory_bytes=1 << 28, seconds=20)) if without != "all" else ()
    print(*held, sep=", ")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        socket.create_connection(("127.0.0.1", {port}), 5).close()
        print("connected")
    except OSError:
        print("no network")
    if without == "all":
        return
    try:
        open({path!r}, "wb", buffering=0).write(b"x")
    except OSError:
        print("no file")
    try:
        bytearray(1 << 30)
    except MemoryError:
        print("no memory")
    other = os.getppid()
    for name, do in {{
        "mark": lambda: os.setxattr({there!r}, "user.a", b"x"),
        "signal": lambda: os.kill(other, 0),
        "signal a thread": lambda: signal.pthread_kill(threading.get_ident(), 0),
        "slow down": lambda: os.setpriority(os.PRIO_PROCESS, other, os.getpriority(os.PRIO_PROCESS, other)),
        "limit": lambda: resource.prlimit(other, resource.RLIMIT_NOFILE),
        "remove": lambda: os.unlink({there!r}),
    }}.items():
        try:
            do()
        except PermissionError:
            print("may not", name)
        except OSError:
            print("could not", name)
    print(resource.prlimit(0, resource.RLIMIT_FSIZE)[1])

for without in sys.argv[1:]:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    attempt(without)
    print("there" if os.path.exists({there!r}) else "gone", flush=True)
    print("==", flush=True)
    os._exit(0)
"""
FORBIDDEN = [f"may not {name}" for name in ("mark", "signal", "signal a thread", "slow down", "limit", "remove")]


def confined(folder: pathlib.Path, *without: str) -> list[list[str]]:
    """What processes find that are confined as readers are, but for a mean, while somebody listens on this machine."""
    there = folder / "there"
    there.touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = CONFINED.format(path=str(folder / "written"), there=str(there), port=port)
        command = [sys.executable, "-c", code, *without]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [part.strip().splitlines() for part in done.stdout.split("==\n")[:-1]]


def test_a_reader_may_neither_write_nor_reach_the_network(tmp_path: pathlib.Path) -> None:
    """Without both means the same connection is made, so that it is they that forbid it."""
    decoder = Decoder()
    held = decoder.confinement()
    decoder.close()
    if not held:
        pytest.skip("this system allows neither a network namespace nor a system call filter")
    free, whole, *without = confined(tmp_path, "all", "nothing", "namespace", "filter")
    assert free == ["connected", "there"]
    assert whole[:4] == [", ".join(held), "no network", "no file", "no memory"]
    if FILTER in held:
        assert whole[4:] == [*FORBIDDEN, "0", "there"]
    for mean, found in zip((FILTER, NAMESPACE), without, strict=True):
        if mean in held:
            assert found[:3] == [mean, "no network", "no file"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_refuses_another_machines_calls_first(machine: str) -> None:
    """Whole instructions, jumps that stay inside, and an end that allows."""
    code = program(machine)
    lines = [code[i : i + 8] for i in range(0, len(code), 8)]
    assert len(code) % 8 == 0
    assert len(lines) < 4096
    for at, line in enumerate(lines):
        if line[0] in (0x15, 0x35):  # a jump
            assert at + 1 + max(line[2], line[3]) < len(lines)
    assert lines[1][0] == 0x15
    assert lines[-1] == bytes.fromhex("060000000000ff7f")
