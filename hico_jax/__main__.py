"""`python -m hico_jax` is `hico`; the console script begins here too."""

import os
import sys

from hico_jax.cli import main

# XLA on a CPU takes and gives back buffers of megabytes all the time, and 4 kB pages of them cost a fifth of a training
# step. glibc reads this when a process starts and never again; other platforms ignore it.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
TRAINS = ("demo", "train")


def run() -> int:
    """Run `hico`. On Linux, what trains starts over once with larger pages, unless GLIBC_TUNABLES is already set."""
    if sys.argv[1:2] and sys.argv[1] in TRAINS and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES})
    return main()


if __name__ == "__main__":
    sys.exit(run())
