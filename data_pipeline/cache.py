"""Decoded media that several rows share.

In: a row and what names its media. Out: the row again, until newer ones need the room.
Next: data_pipeline/loader.py
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Hashable

from data_pipeline import layout


class Cache:
    """Decoded media of small sets, oldest out first: several conversations about one film share its frames."""

    def __init__(self, limit: int) -> None:
        self.limit, self._held = limit, 0
        self._rows: collections.OrderedDict[Hashable, layout.Row] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, media: Hashable) -> layout.Row | None:
        with self._lock:
            return self._rows.get(media)

    def put(self, media: Hashable, row: layout.Row) -> None:
        size = _bytes(row)
        with self._lock:
            if media in self._rows or size > self.limit:
                return
            self._held += size
            self._rows[media] = row
            while self._held > self.limit:
                _, old = self._rows.popitem(last=False)
                self._held -= _bytes(old)


def _bytes(row: layout.Row) -> int:
    return sum(a.nbytes for a in (row.clips, row.tiles, row.tokens) if a is not None)
