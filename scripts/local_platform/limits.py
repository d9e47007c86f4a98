"""What the platform allows, and how long it waits for what."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

RATES: Mapping[str, int] = MappingProxyType(
    {"run": 1000, "runsync": 2000, "status": 2000, "stream": 2000, "cancel": 100, "purge-queue": 2}
)
"""Requests of each operation within `rate_window_s` (docs.runpod.io, rate limits and quotas)."""


@dataclass(frozen=True)
class Limits:
    """The defaults are the documented ones, where there is documentation.

    Args:
        run_bytes, runsync_bytes: largest request, and largest result of such a job, bytes of JSON.
        piece_bytes: largest piece of a stream.
        rates: requests of each operation within `rate_window_s`; what is not named is not limited.
        rate_window_s: seconds.
        queued_per_worker: how many jobs may wait for each worker before a further one is refused with 429 ...
        queued_anyway: ... and how many in any case.
        kept_s, kept_sync_s: for how long the result of a job from /run and from /runsync is kept.
        wait_s: for how long /runsync waits where the request does not say.
        execution_timeout_s: of a job whose policy names none; the least that a policy may ask for is
            `min_execution_timeout_s`.
        ttl_s: how old a job may get before it is done; the least that a policy may ask for is `min_ttl_s`.
        max_losses: a job that lost so many workers has failed.
        ping_interval_s: between two heartbeats of a worker, whole seconds.
        lost_after_s: a job that its worker's pings did not name for so long goes back into the queue.
        silent_after_s: a worker that is not this platform's process and sends no ping for so long has lost its jobs.
        stop_pod_s: a worker that asked for a fresh one in its place has so long for its other jobs.
        hold_s: for how long a worker's request for jobs, or for jobs to stop, is held open.
        stream_hold_s: for how long /stream waits for a piece where there is none.
        webhook_attempts: how often a webhook is called until it answers 200 ...
        webhook_pause_s: ... and how long after a call that failed.
    """

    run_bytes: int = 10_000_000
    runsync_bytes: int = 20_000_000
    piece_bytes: int = 1_000_000
    rates: Mapping[str, int] = field(default_factory=lambda: RATES)
    rate_window_s: float = 10.0
    queued_per_worker: int = 500
    queued_anyway: int = 50
    kept_s: float = 1800.0
    kept_sync_s: float = 60.0
    wait_s: float = 90.0
    execution_timeout_s: float = 600.0
    min_execution_timeout_s: float = 5.0
    ttl_s: float = 86_400.0
    min_ttl_s: float = 10.0
    max_losses: int = 3
    ping_interval_s: int = 2
    lost_after_s: float = 10.0
    silent_after_s: float = 60.0
    stop_pod_s: float = 600.0
    hold_s: float = 10.0
    stream_hold_s: float = 1.0
    webhook_attempts: int = 3
    webhook_pause_s: float = 10.0


class Rate:
    """Counts requests within a window that slides.

    Args:
        most: requests within the window.
        window_s: its length, seconds.
    """

    def __init__(self, most: int, window_s: float) -> None:
        self._times_s: collections.deque[float] = collections.deque(maxlen=most)
        self._window_s = window_s

    def wait_s(self, now_s: float) -> float:
        """Count a request; 0, or for how long there is no room for it (then it does not count)."""
        times_s = self._times_s
        if len(times_s) == times_s.maxlen and (not times_s or times_s[0] > now_s - self._window_s):
            return times_s[0] + self._window_s - now_s if times_s else self._window_s
        times_s.append(now_s)
        return 0.0
