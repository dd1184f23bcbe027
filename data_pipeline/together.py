"""A long row that several hosts read together: each decodes the clips that its own devices encode, and no others.

In: the rows of a step as this host laid them out and read them. Out: the same rows on every host of the row: what one
of them could not read teaches nothing on any.
Next: data_pipeline/loader.py
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline import layout
from data_pipeline.chat import IGNORE
from hico_jax.shapes import Bool, ndarray


class ClipShare(Protocol):
    """Which of a row's clips this host's devices encode, when the row has room for `count`."""

    def __call__(self, count: int) -> Bool[ndarray, " N"]: ...


Agree = Callable[[str], Sequence[str]]  # what this host says -> what every host of the row says, in one order


class Shared(NamedTuple):
    """One without the other would train on films that were never read."""

    share: ClipShare
    agree: Agree


def split(held: Bool[ndarray, " N"], counts: Sequence[int]) -> list[ndarray]:
    """The share of each conversation of a packed row, whose clips follow one another.

    Example:
      >>> [part.tolist() for part in split(np.array([True, False, False, True]), [1, 2])]
      [[True], [False, False]]
    """
    return np.split(held[: sum(counts)], np.cumsum(counts)[:-1])


def agreed(
    rows: Sequence[layout.Row], faults: Sequence[tuple[str, ...]], agree: Agree
) -> tuple[list[layout.Row], list[tuple[str, ...]]]:
    """Rows and faults of a step after asking the other hosts: a conversation that one cannot read is masked on all.

    It keeps its place, so that every host's clips stay where they are. A host cannot see the faults of clips that it
    does not decode.

    Raises:
      ValueError: hosts do not lay the rows out alike, so they do not read the same files.
    """
    mine = [(zlib.crc32(row.tokens.tobytes() + row.slots.tobytes()), f) for row, f in zip(rows, faults, strict=True)]
    told = [json.loads(text) for text in agree(json.dumps(mine))]
    for number, (row, fault) in enumerate(mine):
        for host, other in enumerate(told):
            if other[number][0] != row:
                found = next((f for f in (*fault, *other[number][1]) if f), "no host names a fault")
                raise ValueError(
                    f"hosts read different data: host {host} of this row lays it out otherwise than this one "
                    f"({found}); let all of them see the same annotations and files"
                )
    out, found = [], []
    for number, row in enumerate(rows):
        every = zip(*(other[number][1] for other in told), strict=True)
        fault = tuple(next((f for f in said if f), "") for said in every)
        out.append(masked(row, [i + 1 for i, f in enumerate(fault) if f]))
        found.append(fault)
    return out, found


def masked(row: layout.Row, segments: Sequence[int]) -> layout.Row:
    """The row with nothing to learn in these segments."""
    if not segments:
        return row
    return dataclasses.replace(row, labels=np.where(np.isin(row.segments, segments), IGNORE, row.labels))
