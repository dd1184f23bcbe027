"""What the TPU compiler says before it writes code: it places every buffer in a minute, and takes many more for code.

In: a row of the tables of docs/scale.md. Out: its record, as of a compile to the end. The compiler runs in another
process, which is ended when its report of memory is whole: there is no other way to stop it.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from hico_jax.plan import program

CHILD = "import sys; from hico_jax.plan import table; table.compiled(table.find(sys.argv[1]))"
STILL_S = 5.0  # a report that did not change for so long is whole
_SPACE = re.compile(r"^Memory Space: (\w+) .*\nTotal bytes: (\d+)", re.MULTILINE)
_ARGUMENT = re.compile(r"^allocation \d+: size (\d+), (?!color).*\bparameter \d+", re.MULTILINE)


def of_row(key: str, *, limit_s: float = 3600.0) -> dict[str, Any]:
    """Compile the row of this key until the compiler has placed all buffers.

    Raises:
      ValueError: as `reports`.
    """
    began = time.monotonic()
    found = reports(key, limit_s=limit_s)
    return read(*found) | {"compile_s": round(time.monotonic() - began, 1), "code": False}


def reports(key: str, *, limit_s: float = 3600.0) -> tuple[str, str, str]:
    """What the compiler wrote of a row until then: report of memory, list of buffers, program.

    Raises:
      ValueError: the compiler failed, or placed nothing within `limit_s` seconds.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hico_buffers_") as name, tempfile.TemporaryFile("w+") as said:
        folder = pathlib.Path(name)
        # Where the child's compiler writes; and this process may have asked the compiler before, and hold its lock.
        env = os.environ | {"TMPDIR": name, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        child = subprocess.Popen([sys.executable, "-c", CHILD, key], env=env, stdout=said, stderr=said)
        try:
            while not (found := _reports(folder)):
                said.seek(0)
                if child.poll() is not None:
                    words = (said.read().strip().splitlines() or ["it said nothing"])[-1]
                    raise ValueError(f"the compiler left no report of {key!r}: {words}")
                if time.monotonic() - began > limit_s:
                    raise ValueError(f"the compiler placed no buffers of {key!r} within {limit_s:.0f} s")
                time.sleep(1.0)
        finally:
            child.kill()
            child.wait()
        return found


def _reports(folder: pathlib.Path) -> tuple[str, str, str] | None:
    """Report of memory, list of buffers, program: when all are there and whole."""
    ends = ("-memory-usage-report.txt", "-buffer-assignment.txt", "_after_buffer_assignment.txt")
    files = [next(folder.glob(f"*/*.jit_*.after_optimizations{end}"), None) for end in ends]
    if None in files or time.time() - max(file.stat().st_mtime for file in files if file) < STILL_S:
        return None
    report, buffers, text = (file.read_text() for file in files if file)
    return report, buffers, text


def read(report: str, buffers: str, text: str) -> dict[str, Any]:
    """A record from the compiler's report of memory, its list of buffers and the program.

    The peak is the memory set aside, with the gaps between buffers; a compile to the end calls peak what lives at once,
    1 to 4 % less.
    """
    total, arguments, host = sizes(report, buffers)
    sent = program.by_kind(program.collectives_of(text))
    gib = lambda size: round(size / 2**30, 2)
    return {
        "peak_gib": gib(total), "argument_gib": gib(arguments),
        "temporary_gib": gib(total - arguments), "host_gib": gib(host),
        "collectives": {kind: list(numbers) for kind, numbers in sent.items()},
    }  # fmt: skip


def sizes(report: str, buffers: str) -> tuple[int, int, int]:
    """Bytes of a device's memory, of them arguments, and of the host's memory."""
    spaces = {name: int(size) for name, size in _SPACE.findall(report)}
    return spaces["default"], sum(map(int, _ARGUMENT.findall(buffers))), spaces.get("host", 0)
