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
import os, signal, socket, sys
from hico_jax.serve import confine, decoder
without = sys.argv[1:]
if "namespace" in without:
    confine._NEW_USER = confine._NEW_NET = 0x40  # no such flag
if "filter" in without:
    confine._MACHINES.clear()
held = decoder._confine(decoder.Limits(memory_bytes=1 << 28, seconds=20)) if "all" not in without else ()
print(*held, sep=", ")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    socket.create_connection(("127.0.0.1", {port}), 5).close()
    print("connected")
except OSError:
    print("no network")
if "all" in without:
    sys.exit()
try:
    open({path!r}, "wb", buffering=0).write(b"x")
except OSError:
    print("no file")
try:
    bytearray(1 << 30)
except MemoryError:
    print("no memory")
try:
    os.unlink({there!r})
except PermissionError:
    print("may not remove")
"""


def confined(folder: pathlib.Path, *without: str) -> list[str]:
    """What a process finds that is confined as readers are, while somebody listens on this machine."""
    there = folder / "there"
    there.touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = CONFINED.format(path=str(folder / "written"), there=str(there), port=port)
        command = [sys.executable, "-c", code, *without]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [*done.stdout.splitlines(), *["left there"] * there.exists()]


def test_a_reader_may_neither_write_nor_reach_the_network(tmp_path: pathlib.Path) -> None:
    """Without both means the same connection is made, so that it is they that forbid it."""
    decoder = Decoder()
    held = decoder.confinement()
    decoder.close()
    if not held:
        pytest.skip("this system allows neither a network namespace nor a system call filter")
    kept = ["may not remove", "left there"] if FILTER in held else []
    assert confined(tmp_path) == [", ".join(held), "no network", "no file", "no memory", *kept]
    assert confined(tmp_path, "all") == ["", "connected", "left there"]
    for name, mean in (("filter", NAMESPACE), ("namespace", FILTER)):
        if mean in held:
            assert confined(tmp_path, name)[:3] == [mean, "no network", "no file"]


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
