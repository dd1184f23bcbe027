"""How often somebody may ask: a bucket of requests each, which fills again evenly.

In: who asks. Out: whether now, or in how many seconds.
Next: hico_jax/serve/app.py
"""

from __future__ import annotations

import collections
import ipaddress
import time
from collections.abc import Callable


class Rates:
    """`per_minute` requests in the long run, a tenth of them (at least one) at once; 0 lets everybody through.

    Only the `most` who asked last are remembered, so strangers cannot fill the memory.
    """

    def __init__(self, per_minute: int, *, most: int = 4096, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.most, self.clock = per_minute / 60, most, clock
        self.burst = max(1.0, per_minute / 10)
        self.left: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()  # tokens, and when

    def wait(self, who: str) -> float:
        """Take one request; 0, or after how many seconds there is one again."""
        if not self.per_second:
            return 0.0
        now = self.clock()
        tokens, then = self.left.pop(who, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)
        allowed = tokens >= 1
        self.left[who] = (tokens - allowed, now)
        while len(self.left) > self.most:
            self.left.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self.per_second


def neighbourhood(host: str) -> str:
    """What counts as one address: of IPv6, where one machine has very many, the first 64 bits."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))
