"""A bar with the time to finish on a terminal, a line for every tenth elsewhere.

In: what is counted. Out: a function to call with (done, total).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich import progress as rich_progress

Tick = Callable[[int, int], None]


@contextlib.contextmanager
def bar(name: str) -> Iterator[Tick]:
    """Show how far something is: `with bar("videos") as tick: tick(3, 10)`."""
    if not sys.stdout.isatty():
        yield _lines(name)
        return
    columns = (
        rich_progress.TextColumn("  {task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, transient=True) as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _lines(name: str) -> Tick:
    began, told = time.monotonic(), -1

    def tick(done: int, total: int) -> None:
        nonlocal told
        tenth = done * 10 // max(total, 1)
        if tenth > told:
            told = tenth
            left = (time.monotonic() - began) / max(done, 1) * (total - done)
            print(f"  {name} {done:,}/{total:,}, {left:.0f} s left", flush=True)

    return tick
