"""No more requests than the platform takes: a bucket of tokens for each operation.

A limit is N requests within any ten seconds. A bucket that refills at 90 % of that and holds 1 % keeps it even where
requests are delayed on their way, and where a run that was killed is followed by another at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from scripts.batch.errors import BatchError

WINDOW_S = 10.0
LIMITS: Mapping[str, int] = MappingProxyType({"run": 1000, "status": 2000, "stream": 2000, "cancel": 100})
"""Requests of each operation within `WINDOW_S` (docs.runpod.io, rate limits and quotas)."""

_REFILL, _HOLDS, _ROUNDING = 0.9, 0.01, 1e-9


class Bucket:
    """Gives way to one request after the other, in the order in which they came.

    Args:
        most: requests within `WINDOW_S`.
        clock: gives seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = _REFILL * most / WINDOW_S
        self._most = max(1.0, _HOLDS * most)
        self._clock = clock
        self._tokens, self._filled_s = self._most, clock()
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Wait until a request may be sent."""
        async with self._turn:
            while (wait_s := self.wait_s()) > 0:
                await asyncio.sleep(wait_s)
            self._tokens -= 1

    def wait_s(self) -> float:
        """Until there is a token; 0 for now."""
        now_s = self._clock()
        if now_s > self._filled_s:
            self._tokens = min(self._most, self._tokens + (now_s - self._filled_s) * self._per_s)
            self._filled_s = now_s
        missing = 1.0 - self._tokens
        return max(self._filled_s - now_s, 0.0) + (missing / self._per_s if missing > _ROUNDING else 0.0)

    def pause(self, seconds: float) -> None:
        """The platform said that it is too much: nothing for a while, and then begin slowly."""
        self._tokens = 0.0
        self._filled_s = max(self._filled_s, self._clock() + seconds)


def limits_of(given: Mapping[str, str]) -> dict[str, int]:
    """`LIMITS` with what was said instead.

    Raises:
        BatchError: naming what was expected.
    """
    limits = dict(LIMITS)
    for name, text in given.items():
        if name not in limits or not text.isdecimal() or int(text) < 1:
            raise BatchError(f"--rate {name}={text}: expected {'|'.join(LIMITS)}=N, requests within {WINDOW_S:g} s")
        limits[name] = int(text)
    return limits
