"""Which strategy splits attention over a row: chosen by the configuration of the mesh, read where attention is called.

A user context of JAX: it takes part in the key of every compiled program, so another choice compiles anew.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax

AUTO = "auto"
MOST_GATHERED = 1 << 30  # bytes of a layer's keys and values up to which `auto` gathers them

_strategy: Any = jax.make_user_context(AUTO)


def using(strategy: str) -> contextlib.AbstractContextManager[Any]:
    """Everything traced inside attends by `strategy` when its rows are split."""
    return _strategy(strategy)


def strategy(gathered_bytes: int) -> str:
    """The strategy in force; `auto` gathers keys and values while they are few, and rings above.

    A gather has no steps to hide and no travel of gradients; a ring never holds more than two devices' keys.
    """
    chosen = _strategy.value
    if chosen != AUTO:
        return chosen
    return "gather" if gathered_bytes <= MOST_GATHERED else "ring"
