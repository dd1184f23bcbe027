"""Which sizes a batch may have: few enough to compile, fine enough not to waste.

In: a size and the allowed ones. Out: the size to pad to.
Next: data_pipeline/loader.py
"""

from __future__ import annotations

from collections.abc import Sequence


def ladder(value: int, least: int) -> int:
    """Round up to a step: multiples of `least` up to eight of them, then four steps to each doubling.

    Example:
      >>> [ladder(n, 1) for n in (0, 3, 8, 9, 17, 100)]
      [0, 3, 8, 10, 20, 112]
    """
    step = least
    while value > 8 * step:
        step *= 2
    return -(-value // step) * step


def bucket(value: int, buckets: Sequence[int], least: int, limit: int | None = None) -> int:
    """The smallest allowed size that holds `value`: a bucket, or without buckets a step of the ladder.

    Raises:
      ValueError: no bucket is large enough.
    """
    if not buckets:
        return ladder(value, least) if limit is None else max(value, min(ladder(value, least), limit))
    for size in buckets:
        if size >= value:
            return size
    raise ValueError(f"{value} fits none of the buckets {tuple(buckets)}; add a larger one")
