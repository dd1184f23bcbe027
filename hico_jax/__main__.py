"""`python -m hico_jax` is `hico`; the console script begins here too."""

import multiprocessing
import multiprocessing.process
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from hico_jax.cli import main

# XLA on a CPU takes and gives back buffers of megabytes all the time, and 4 kB pages of them cost a fifth of a training
# step. glibc reads this when a process starts and never again; other platforms ignore it.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
TRAINS = ("demo", "train")
READERS = "grain-process-prefetch"  # what grain calls them


def run() -> int:
    """Run `hico`. On Linux, what trains starts over once with larger pages, unless GLIBC_TUNABLES is already set."""
    if sys.argv[1:2] and sys.argv[1] in TRAINS and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        # `leave` ends reading processes without their farewells, which Python's tracker of resources would remark on.
        quiet = f"{os.environ.get('PYTHONWARNINGS', '')},ignore:resource_tracker".strip(",")
        tuned = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES, "PYTHONWARNINGS": quiet}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], tuned)
    code = main()
    readers = [child for child in multiprocessing.active_children() if child.name.startswith(READERS)]
    return leave(code, readers) if readers else code


def leave(code: int, readers: Sequence[multiprocessing.process.BaseProcess]) -> NoReturn:
    """End now. Grain asks each of its reading processes to end and waits for it up to 25 s; they only read."""
    for reader in readers:
        reader.kill()
    if (jax := sys.modules.get("jax")) is not None and jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run())
