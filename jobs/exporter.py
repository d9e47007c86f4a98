"""The worker's figures for Prometheus, on a port of their own (METRICS_PORT). Imported only where that is set."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.errors import JobError
from jobs.metrics import Histogram, Metrics, Totals

PREFIX = "chatterbox"

OCTAVES = range(-10, 18)
"""Bounds of the buckets as powers of two: from 1 ms to 36 h."""

_SUMS: Mapping[str, tuple[str, str]] = {
    "audio_s": ("audio_seconds", "Audio made, seconds"),
    "num_chars": ("characters", "Characters spoken"),
    "num_chunks": ("chunks", "Chunks spoken"),
    "attempts": ("chunk_attempts", "How often chunks were decoded"),
    "num_downloads": ("downloads", "Files fetched for jobs"),
    "num_downloaded_bytes": ("downloaded_bytes", "Size of the files fetched for jobs"),
}
_DURATIONS: Mapping[str, tuple[str, str]] = {
    "seconds": ("job_seconds", "From a job's arrival to its end, of jobs that were done"),
    "queue_s": ("job_queue_seconds", "What jobs waited for the engine"),
    "first_audio_s": ("job_first_audio_seconds", "From a job's arrival to its first audio"),
    "real_time_factor": ("job_real_time_factor", "Seconds that a job took per second of its audio"),
}

_log = logging.getLogger(__name__)


class Exporter:
    """Answers Prometheus on a port, on all interfaces; with nothing, until `show` says what.

    Args:
        port: 0 for one that is free.

    Raises:
        JobError: invalid_request, where the port cannot be had.
    """

    def __init__(self, port: int) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        try:
            self._server, self._thread = start_http_server(port, registry=self._registry)
        except OSError as error:
            message = f"METRICS_PORT: cannot listen on port {port}: {error.strerror or error}"
            raise JobError("invalid_request", message, "METRICS_PORT") from error
        self.port = int(self._server.server_port)
        _log.info("figures for Prometheus are on port %d", self.port)

    def show(self, metrics: Metrics, engine_stats: Callable[[], Mapping[str, Any]]) -> None:
        """Answer with these figures from now on.

        Args:
            metrics: of the jobs.
            engine_stats: gives the engine's own figures, of which the numbers are shown.
        """
        self._registry.register(_Figures(metrics, engine_stats))

    def close(self) -> None:
        """Let go of the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Figures(Collector):
    """All figures as Prometheus calls them, read when it asks."""

    def __init__(self, metrics: Metrics, engine_stats: Callable[[], Mapping[str, Any]]) -> None:
        self._metrics, self._engine_stats = metrics, engine_stats

    def collect(self) -> Iterator[Metric]:
        totals = self._metrics.totals()
        yield _gauge("uptime_seconds", "Since the worker's start", totals.uptime_s)
        yield _gauge("jobs_in_progress", "Jobs that have begun and not ended", totals.num_in_progress)
        yield from _counters(totals)
        for name, (called, about) in _DURATIONS.items():
            yield _histogram(called, about, totals.durations[name])
        for name, number in numbers(self._read_engine()):
            yield _gauge(f"engine_{name}", "The engine's own figure, as in operation info", number)

    def _read_engine(self) -> Mapping[str, Any]:
        try:
            return self._engine_stats()
        except Exception:  # the rest is worth having
            _log.exception("the engine's figures could not be read")
            return {}


def numbers(stats: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested figures, each under the names that lead to it: `core_num_tokens`."""
    for name, value in stats.items():
        called = re.sub(r"\W", "_", f"{place}{name}", flags=re.ASCII)
        if isinstance(value, Mapping):
            yield from numbers(value, f"{called}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield called, value


def _counters(totals: Totals) -> Iterator[Metric]:
    jobs = CounterMetricFamily(f"{PREFIX}_jobs", "Jobs that have ended", labels=("operation", "outcome"))
    for (operation, outcome), num in sorted(totals.finished.items()):
        jobs.add_metric((operation, outcome), num)
    yield jobs
    flags = CounterMetricFamily(f"{PREFIX}_chunk_flags", "Chunks by what is wrong with them", labels=("flag",))
    for flag, num in sorted(totals.flags.items()):
        flags.add_metric((flag,), num)
    yield flags
    delivered = CounterMetricFamily(f"{PREFIX}_delivered_bytes", "Size of the audio given to clients", labels=("way",))
    delivered.add_metric(("inline",), totals.sums["num_inline_bytes"])
    delivered.add_metric(("s3",), totals.sums["num_s3_bytes"])
    yield delivered
    for name, (called, about) in _SUMS.items():
        yield CounterMetricFamily(f"{PREFIX}_{called}", about, totals.sums[name])


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", about, value)


def _histogram(name: str, about: str, by_operation: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"{PREFIX}_{name}", about, labels=("operation",))
    for operation, histogram in sorted(by_operation.items()):
        family.add_metric((operation,), _cumulative(histogram), histogram.total)
    return family


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    bounds: Iterable[str] = [f"{2.0**octave!r}" for octave in OCTAVES]
    return [*zip(bounds, histogram.num_up_to(OCTAVES), strict=True), ("+Inf", histogram.num)]
