"""Being told to stop: SIGTERM on one machine, the runtime's preemption notice on several.

In: a signal. Out: a question the loop asks after each step, and the exit code that means "run me again".
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: stopped before the end with everything saved; the same command goes on


class Notice:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False

    def stops(self, step: int) -> bool:
        """Whether every process stops after this step: hosts of a pod are not told at the same moment."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self.asked = bool(multihost_utils.reached_preemption_sync_point(step))
        return self.asked

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Take SIGTERM as the wish to stop at the next step's end.

        Elsewhere than in the main thread signals cannot be caught. With several processes the distributed
        runtime has its own handler, which tells all of them; it is left alone.
        """
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            yield
            return

        def ask(*_: Any) -> None:
            self.asked = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Before there is anything to save, SIGTERM ends the program at once, with the code for "run me again"."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
