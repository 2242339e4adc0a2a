"""
How much one visitor, or one address, may take: questions a minute, open sockets. Pure; knows no framework.

In memory and per process: a limit here is against floods, not an account of use.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, deque
from collections.abc import Callable

from bot.errors import RateLimited

MAX_KEYS = 10_000  # above this many, keys without recent hits are dropped


class RateLimit:
    """At most `limit` hits a key within the last `window_s` seconds."""

    def __init__(self, limit: int, window_s: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.window_s = window_s
        self._clock = clock
        self._hits: dict[str, deque[float]] = {}

    def hit(self, key: str) -> None:
        """
        Count one hit of `key`.

        Raises:
            RateLimited: over the limit; says after how long the next one passes. Not counted.
        """
        now = self._clock()
        if len(self._hits) > MAX_KEYS:
            self._hits = {k: h for k, h in self._hits.items() if h[-1] > now - self.window_s}
        hits = self._hits.setdefault(key, deque())
        while hits and hits[0] <= now - self.window_s:
            hits.popleft()
        if len(hits) >= self.limit:
            raise RateLimited(max(1.0, hits[0] + self.window_s - now))
        hits.append(now)

    def forget(self, key: str) -> None:
        """Count the hits of `key` no longer."""
        self._hits.pop(key, None)


class Places:
    """At most `limit` places taken at once by a key."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: Counter[str] = Counter()

    def take(self, key: str) -> bool:
        """Take a place and return True, or return False where none is left."""
        if self._taken[key] >= self.limit:
            return False
        self._taken[key] += 1
        return True

    def leave(self, key: str) -> None:
        """Give a place back."""
        self._taken[key] -= 1
        if self._taken[key] <= 0:
            del self._taken[key]


def is_loopback(address: str) -> bool:
    """Return whether `address` is this machine: the merchant's own tools, or a proxy that hides the visitors."""
    try:
        ip = ipaddress.ip_address(address)
        mapped = getattr(ip, "ipv4_mapped", None)  # an IPv4 client of a server that listens on "::"
        return (mapped or ip).is_loopback
    except ValueError:
        return False
