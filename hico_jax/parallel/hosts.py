"""Join the processes of a run, and say which are missing when they do not all come.

In: on a pod nothing (the TPU runtime tells); elsewhere HICO_COORDINATOR (host:port), HICO_PROCESS and
HICO_PROCESSES, as `launch/local.sh` sets them. A roll call goes before JAX's own: its time-out names no one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

TIMEOUT_S = 300.0
AGREE_S = 3600.0  # reading a week of film takes long; of a process that died jax.distributed tells sooner


def join(timeout_s: float | None = None, env: Mapping[str, str] = os.environ) -> None:
    """Wait for every process, then `jax.distributed.initialize`.

    Raises:
      ValueError: settings that do not fit together, or processes that did not come in time (HICO_JOIN_S seconds).
    """
    timeout_s = float(env.get("HICO_JOIN_S", TIMEOUT_S)) if timeout_s is None else timeout_s
    coordinator = env.get("HICO_COORDINATOR")
    if coordinator is None:
        names = [n for n in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if n]
        if len(names) > 1 and env.get("TPU_WORKER_ID", "").isdigit() and env.get("MEGASCALE_NUM_SLICES", "1") == "1":
            roll_call(names[0], 8477, int(env["TPU_WORKER_ID"]), names, timeout_s)
        jax.distributed.initialize(initialization_timeout=round(timeout_s))
        return
    host, _, port = coordinator.rpartition(":")
    process, count = env.get("HICO_PROCESS", ""), env.get("HICO_PROCESSES", "")
    if not (port.isdigit() and host and process.isdigit() and count.isdigit() and int(process) < int(count)):
        raise ValueError(
            f"HICO_COORDINATOR is {coordinator!r}, HICO_PROCESS {process!r} and HICO_PROCESSES {count!r}; they must be "
            "host:port, a number from 0, and how many there are"
        )
    roll_call(host, int(port) + 1, int(process), [f"process {i}" for i in range(int(count))], timeout_s)
    jax.distributed.initialize(coordinator, int(count), int(process), initialization_timeout=round(timeout_s))


class Agreement:
    """Every time it is called, what each of some processes says, in their order. No device takes part.

    All of them must call it equally often.

    Raises:
      ValueError: a process said nothing in time; it is named.
    """

    def __init__(self, processes: Sequence[int], timeout_s: float = AGREE_S) -> None:
        self._processes, self._timeout_s, self._round = tuple(processes), timeout_s, 0

    def __call__(self, text: str) -> list[str]:
        from jax._src import distributed  # the store of jax.distributed has no public name

        client: Any = distributed.global_state.client
        own = f"hico/agree/{'-'.join(map(str, self._processes))}"
        client.key_value_set(f"{own}/{self._round}/{jax.process_index()}", text)
        said = [self._hear(client, f"{own}/{self._round}/{process}", process) for process in self._processes]
        if self._round:  # who spoke in this round has heard all of the one before
            client.key_value_delete(f"{own}/{self._round - 1}/{jax.process_index()}")
        self._round += 1
        return said

    def _hear(self, client: Any, key: str, process: int) -> str:
        try:
            return client.blocking_key_value_get(key, round(1000 * self._timeout_s))
        except Exception as error:  # one type of C++ for all that can happen
            raise ValueError(
                f"process {process} did not say within {self._timeout_s:.0f} s what it read for this step "
                f"({str(error).splitlines()[0][:80]}); look at its log"
            ) from None


def roll_call(host: str, port: int, process: int, names: Sequence[str], timeout_s: float) -> None:
    """Process 0 waits until all others have called; they wait for its answer.

    Raises:
      ValueError: some did not come in time; they are named.
    """
    until = time.monotonic() + timeout_s
    if process == 0:
        _listen(port, names, until, timeout_s)
        return
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, until - time.monotonic()))) as line:
                line.sendall(f"{process}\n".encode())
                line.settimeout(max(0.1, until - time.monotonic()))
                if line.recv(16) == b"all here\n":
                    return
                raise ValueError(f"{names[0]} gave up waiting for the others; its log names them")
        except OSError:
            if time.monotonic() > until:
                raise ValueError(
                    f"{names[0]} at {host}:{port} did not answer {names[process]} in {timeout_s:.0f} s; see its log, "
                    "or start it"
                ) from None
            time.sleep(0.2)


def _listen(port: int, names: Sequence[str], until: float, timeout_s: float) -> None:
    lines: dict[int, socket.socket] = {}
    server = socket.create_server(("", port), backlog=len(names), reuse_port=False)
    with server:
        while len(lines) < len(names) - 1:
            left = until - time.monotonic()
            if left <= 0:
                missing = [name for i, name in enumerate(names) if i and i not in lines]
                for line in lines.values():
                    line.close()
                raise ValueError(
                    f"{len(missing)} of {len(names)} processes did not start within {timeout_s:.0f} s: "
                    f"{', '.join(missing)}; look at their logs, then start all again (HICO_JOIN_S waits longer)"
                )
            server.settimeout(left)
            try:
                line, _ = server.accept()
                line.settimeout(5.0)
                said = line.recv(16).strip()
            except OSError:
                continue
            if said.isdigit():
                lines[int(said)] = line
        for line in lines.values():
            line.sendall(b"all here\n")
            line.close()
