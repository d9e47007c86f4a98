"""Figures of a worker's jobs since its start: how many, of which kind, how they ended, how long they took.

One `Metrics` belongs to one `Worker`. Durations go into buckets of fixed width on a log scale rather than into a ring
of the last ones: memory is bounded however long the worker lives, no burst of short jobs drives the slow ones out, and
Prometheus wants buckets anyway. The price is that a percentile is exact within `PERCENTILE_ERROR` only.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.audio_file import AUDIO_FIELDS

DONE = "done"
"""The outcome of a job that gave a result; of one that failed it is the code."""

REPEATED = "repeated"
"""The outcome of a job that gave the result of one before it (its `idempotency_key`): nothing was made."""

STOPPED = "stopped"
"""The outcome of a job that the platform took back."""

UNKNOWN = "unknown"
"""The operation of a job that could not be read."""

PERCENTILES = (50, 90, 99)

BUCKETS_PER_OCTAVE = 8
"""Buckets from one power of two to the next."""

PERCENTILE_ERROR = 2 ** (0.5 / BUCKETS_PER_OCTAVE) - 1
"""How far a percentile may be from the true one, as a share of it: half a bucket, 4.4 %."""

LEAST, MOST = 2.0**-16, 2.0**20
"""What is smaller than 15 µs or larger than 12 days counts as these."""

DURATIONS = ("seconds", "queue_s", "first_audio_s", "real_time_factor")
"""Of jobs that were done; those of jobs that failed would tell how quickly a typing error is found."""

SUMS = (
    *("audio_s", "num_chars", "num_chunks", "attempts"),
    *("num_inline_bytes", "num_s3_bytes", "num_downloads", "num_downloaded_bytes"),
)


@dataclass
class JobFigures:
    """What there is to count of one job; whoever learns something of it adds it.

    Args:
        operation: what it asked for, once that is known.
        outcome: DONE, REPEATED, STOPPED or an error's code.
        began_s: when it arrived, by the clock of its `Metrics`.
        seconds: from its arrival to its end.
        audio_s: audio made.
        num_chars: characters spoken.
        num_chunks: chunks spoken, and
        attempts: how often they were decoded, all together.
        queue_s: waited for the engine.
        first_audio_s: from its arrival to the first audio.
        real_time_factor: seconds per second of audio.
        num_inline_bytes: audio given in the result or in pieces, before base64.
        num_s3_bytes: audio given as a file in a bucket.
        num_downloads, num_downloaded_bytes: fetched for it.
        flags: what was wrong with chunks, and with how many.
    """

    operation: str = UNKNOWN
    outcome: str = STOPPED
    began_s: float = 0.0
    seconds: float = 0.0
    audio_s: float = 0.0
    num_chars: int = 0
    num_chunks: int = 0
    attempts: int = 0
    queue_s: float | None = None
    first_audio_s: float | None = None
    real_time_factor: float | None = None
    num_inline_bytes: int = 0
    num_s3_bytes: int = 0
    num_downloads: int = 0
    num_downloaded_bytes: int = 0
    flags: Counter[str] = field(default_factory=Counter)

    def take(self, result: Mapping[str, Any]) -> None:
        """Note what became of the job; what it was given in pieces is noted as that is sent."""
        self.outcome = result.get("error_code") or (REPEATED if result.get("repeated") else DONE)
        self.num_inline_bytes += sum(_num_bytes(result.get(name)) for name in AUDIO_FIELDS)
        if self.outcome != DONE:
            return
        self.audio_s = float(result.get("duration_s", 0.0))
        for chunk in result.get("chunks", ()):
            self.num_chars += len(chunk["text"])
            self.num_chunks += 1
            self.attempts += chunk["attempts"]
            self.flags.update(chunk["flags"])
        timings = result.get("timings", {})
        self.queue_s, self.first_audio_s = timings.get("queue"), timings.get("first_audio_s")
        self.real_time_factor = timings.get("real_time_factor")

    def for_log(self) -> dict[str, Any]:
        """The fields of a log line; what does not apply is left out."""
        about = {"operation": self.operation, "outcome": self.outcome, "seconds": round(self.seconds, 4)}
        rest = {name: getattr(self, name) for name in (*SUMS, *DURATIONS[1:])}
        flags = {"flags": ",".join(sorted(self.flags))} if self.flags else {}
        return about | {name: value for name, value in rest.items() if value} | flags


class Histogram:
    """How often which size came, in buckets of the same width on a log scale. Not thread-safe."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._low, self._high = math.inf, 0.0
        self.num = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        value = min(max(value, LEAST), MOST)
        mantissa, octave = math.frexp(value)  # so that powers of two are bounds to the last bit
        self._buckets[octave * BUCKETS_PER_OCTAVE + math.ceil(math.log2(mantissa) * BUCKETS_PER_OCTAVE)] += 1
        self._low, self._high = min(self._low, value), max(self._high, value)
        self.num += 1
        self.total += value

    def percentile(self, percent: float) -> float:
        """The value that so many percent do not exceed (nearest rank), within `PERCENTILE_ERROR`."""
        assert self.num, "nothing was added"
        rank = max(1, math.ceil(self.num * percent / 100))
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                middle = 2 ** ((bucket - 0.5) / BUCKETS_PER_OCTAVE)
                return min(max(middle, self._low), self._high)
        raise AssertionError(rank)

    def num_up_to(self, octaves: Iterable[int]) -> list[int]:
        """How many values are at most 2 to the power of each."""
        bounds = [octave * BUCKETS_PER_OCTAVE for octave in octaves]
        return [sum(num for bucket, num in self._buckets.items() if bucket <= bound) for bound in bounds]

    def report(self) -> dict[str, float]:
        """`{"num", "p50", "p90", "p99"}`."""
        return {"num": self.num, **{f"p{percent}": _short(self.percentile(percent)) for percent in PERCENTILES}}


@dataclass
class Totals:
    """All that was counted, at one moment.

    Args:
        uptime_s: seconds since the start.
        num_in_progress: jobs that have begun and not ended.
        finished: jobs by operation and outcome.
        sums: of each of `SUMS`.
        flags: chunks by what is wrong with them.
        durations: of each of `DURATIONS`, by operation.
    """

    uptime_s: float = 0.0
    num_in_progress: int = 0
    finished: Counter[tuple[str, str]] = field(default_factory=Counter)
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0))
    flags: Counter[str] = field(default_factory=Counter)
    durations: dict[str, dict[str, Histogram]] = field(
        default_factory=lambda: {name: defaultdict(Histogram) for name in DURATIONS}
    )

    def add(self, figures: JobFigures) -> None:
        """Count a job that has ended."""
        self.finished[figures.operation, figures.outcome] += 1
        self.flags.update(figures.flags)
        for name in SUMS:
            self.sums[name] += getattr(figures, name)
        for name in DURATIONS if figures.outcome == DONE else ():
            if (value := getattr(figures, name)) is not None:
                self.durations[name][figures.operation].add(value)

    def report(self) -> dict[str, Any]:
        """For `info`, as plain values."""
        finished: defaultdict[str, dict[str, int]] = defaultdict(dict)
        errors: Counter[str] = Counter()
        for (operation, outcome), num in sorted(self.finished.items()):
            finished[operation][outcome] = num
            if outcome not in (DONE, REPEATED, STOPPED):
                errors[outcome] += num
        return {
            "uptime_s": round(self.uptime_s, 3),
            "in_progress": self.num_in_progress,
            "finished": dict(finished),
            "errors": dict(errors),
            **{name: _short(value) for name, value in self.sums.items()},
            "flags": dict(self.flags),
            **{
                name: {operation: histogram.report() for operation, histogram in sorted(histograms.items())}
                for name, histograms in self.durations.items()
            },
        }


class Metrics:
    """Counts jobs. Thread-safe.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started_s = clock()
        self._lock = threading.Lock()  # of the next one
        self._totals = Totals()

    def begin(self) -> JobFigures:
        """A job has come; give its figures to `end`, however it ends."""
        with self._lock:
            self._totals.num_in_progress += 1
        return JobFigures(began_s=self._clock())

    def end(self, figures: JobFigures) -> None:
        """The job has ended."""
        figures.seconds = self._clock() - figures.began_s
        with self._lock:
            self._totals.num_in_progress -= 1
            self._totals.add(figures)

    def totals(self) -> Totals:
        """All figures until now, a copy."""
        with self._lock:
            totals = copy.deepcopy(self._totals)
        totals.uptime_s = self._clock() - self._started_s
        return totals


def _num_bytes(base64_text: str | None) -> int:
    """What base64 stands for."""
    return 0 if not base64_text else len(base64_text) * 3 // 4 - base64_text[-2:].count("=")


def _short(value: float) -> float:
    """Four digits of what is small, whole numbers as they are."""
    return value if isinstance(value, int) else float(f"{value:.4g}") if value < 1000 else round(value, 1)
