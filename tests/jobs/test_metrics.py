"""Figures of jobs: each job counted once, percentiles as exact as they claim, the same for all who ask."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import SpeechError
from engine.types import Speech, SpeechRequest
from jobs.errors import JobError
from jobs.exporter import Exporter, numbers
from jobs.metrics import DONE, LEAST, MOST, PERCENTILE_ERROR, REPEATED, STOPPED, SUMS, Histogram, JobFigures, Metrics
from jobs.settings import Settings
from jobs.worker import Worker

ROOT = Path(__file__).parents[2]
SIZES = st.floats(LEAST, MOST)


def run(worker: Worker, **fields: Any) -> dict[str, Any]:
    return asyncio.run(worker.run({"id": "1", "input": fields}))


def figures(worker: Worker) -> dict[str, Any]:
    """As `info` gives them."""
    report: dict[str, Any] = run(worker, operation="info")["jobs"]
    return report


def histogram(values: list[float]) -> Histogram:
    made = Histogram()
    for value in values:
        made.add(value)
    return made


# ---------------------------------------------------------------------------------- sizes


@given(st.lists(SIZES, min_size=1, max_size=300), st.sampled_from([1, 50, 90, 99, 100]))
def test_a_percentile_is_within_half_a_bucket_of_the_true_one(values: list[float], percent: int) -> None:
    true = float(np.percentile(values, percent, method="inverted_cdf"))
    assert histogram(values).percentile(percent) == pytest.approx(true, rel=PERCENTILE_ERROR * (1 + 1e-9))


@given(SIZES)
def test_of_a_single_value_every_percentile_is_that_value(value: float) -> None:
    assert {histogram([value]).percentile(percent) for percent in (1, 50, 99)} == {value}


@given(st.lists(SIZES, max_size=100))
def test_what_is_at_most_a_power_of_two_is_counted_exactly(values: list[float]) -> None:
    octaves = range(-17, 22)
    expected = [sum(value <= 2.0**octave for value in values) for octave in octaves]
    assert histogram(values).num_up_to(octaves) == expected


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e300, math.inf])
def test_what_is_beyond_the_buckets_counts_as_their_ends(value: float) -> None:
    made = histogram([value])
    assert made.percentile(50) in (LEAST, MOST)
    assert math.isfinite(made.total)


def test_memory_does_not_grow_with_the_number_of_values() -> None:
    made = histogram(list(np.geomspace(1e-9, 1e9, 20_000)))
    assert made.num == 20_000
    assert len(made._buckets) <= 36 * 8 + 1


# ---------------------------------------------------------------------------------- jobs


def test_jobs_are_counted_by_operation_and_outcome(worker: Worker) -> None:
    run(worker, text="Hello there", seed=3)
    run(worker, text="Hello")
    run(worker, text="")
    run(worker, text="Hello", colour=1)
    run(worker, operation="sing")
    report = figures(worker)
    tts = {"done": 2, "text_empty": 1, "invalid_request": 1}
    assert report["finished"] == {"tts": tts, "unknown": {"invalid_request": 1}}
    assert report["errors"] == {"text_empty": 1, "invalid_request": 2}
    assert report["in_progress"] == 1  # the one that asks
    assert figures(worker)["finished"]["info"] == {"done": 1}
    json.dumps(report)


def test_what_was_spoken_is_summed_up(worker: Worker) -> None:
    results = [run(worker, text=text, output_format="flac") for text in ("Hello there", "Hello")]
    report = figures(worker)
    assert report["audio_s"] == pytest.approx(sum(result["duration_s"] for result in results), rel=1e-3)
    assert (report["num_chars"], report["num_chunks"], report["attempts"]) == (16, 2, 2)
    assert report["num_inline_bytes"] == sum(
        len(result["audio"]) // 4 * 3 - result["audio"].count("=") for result in results
    )
    for name in ("seconds", "queue_s", "first_audio_s", "real_time_factor"):
        assert report[name]["tts"]["num"] == 2, name
        assert 0 <= report[name]["tts"]["p50"] <= report[name]["tts"]["p99"], name


def test_a_stream_counts_the_bytes_of_its_pieces(worker: Worker) -> None:
    import base64

    async def taken() -> list[dict[str, Any]]:
        return [piece async for piece in worker.stream({"input": {"text": "Hello there"}})]

    pieces = asyncio.run(taken())
    report = figures(worker)
    assert report["num_inline_bytes"] == sum(len(base64.b64decode(piece["audio"])) for piece in pieces) > 0
    assert report["finished"]["tts"] == {"done": 1}


def test_a_failed_job_tells_nothing_of_how_long_jobs_take(make_engine: Callable[..., Any], settings: Settings) -> None:
    worker = Worker(
        make_engine(lambda _, future: future.set_exception(SpeechError("generation_failed", "no"))), settings
    )
    run(worker, text="Hello")
    report = figures(worker)
    assert (report["seconds"], report["finished"]) == ({}, {"tts": {"generation_failed": 1}})


def test_a_job_that_is_taken_back_is_counted_as_stopped_and_is_not_in_progress(
    make_engine: Callable[..., Any], settings: Settings
) -> None:
    def wait(request: SpeechRequest, future: Future[Speech]) -> None:
        """For ever."""

    engine = make_engine(wait)
    worker = Worker(engine, settings)

    async def scenario() -> None:
        running = asyncio.create_task(worker.run({"input": {"text": "Hello"}}))
        while not engine.futures:
            await asyncio.sleep(0)
        assert worker.metrics.totals().num_in_progress == 1
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(scenario())
    totals = worker.metrics.totals()
    assert (totals.num_in_progress, dict(totals.finished)) == (0, {("tts", STOPPED): 1})


def test_a_result_that_is_given_again_counts_as_delivered_and_not_as_made() -> None:
    job = JobFigures()
    result = {"audio": "AAAA", "duration_s": 9.0, "chunks": [{"text": "x", "attempts": 1, "flags": []}]}
    job.take({**result, "repeated": True})
    assert (job.outcome, job.num_inline_bytes, job.audio_s, job.num_chunks) == (REPEATED, 3, 0.0, 0)


def test_two_workers_count_for_themselves(engine: Any, settings: Settings) -> None:
    one, other = Worker(engine, settings), Worker(engine, settings)
    run(one, text="Hello")
    assert other.metrics.totals().finished == {}


def test_nothing_is_lost_when_many_threads_count_while_others_look() -> None:
    metrics = Metrics()
    barrier = threading.Barrier(8)

    def count() -> None:
        barrier.wait()
        for index in range(300):
            job = metrics.begin()
            job.operation, job.outcome, job.audio_s = "tts", DONE, 1.0
            job.queue_s = 0.1
            job.flags["silent"] = 1
            metrics.end(job)
            if index % 50 == 0:
                totals = metrics.totals()
                assert totals.sums["audio_s"] == sum(totals.finished.values()) == totals.flags["silent"]

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(count) for _ in range(8)]:
            done.result()
    totals = metrics.totals()
    assert (totals.finished["tts", DONE], totals.num_in_progress) == (2400, 0)
    assert totals.durations["queue_s"]["tts"].num == 2400


def test_figures_that_were_handed_out_do_not_change() -> None:
    metrics = Metrics()
    before = metrics.totals()
    job = metrics.begin()
    job.take({"duration_s": 2.0, "timings": {"queue": 0.5}, "chunks": []})
    metrics.end(job)
    assert (before.sums["audio_s"], before.durations["queue_s"]) == (0, {})


# ---------------------------------------------------------------------------------- Prometheus


def scraped(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    with closing(Exporter(0)) as exporter:
        yield exporter


def test_prometheus_finds_what_info_says(engine: Any, settings: Settings, exporter: Exporter) -> None:
    assert scraped(exporter.port) == {}  # while the model loads
    worker = Worker(engine, settings, exporter=exporter)
    run(worker, text="Hello there")
    run(worker, text="")
    samples, report = scraped(exporter.port), figures(worker)

    def value(name: str, **labels: str) -> float:
        return samples[f"chatterbox_{name}", tuple(sorted(labels.items()))]

    assert value("jobs_total", operation="tts", outcome="done") == 1
    assert value("jobs_total", operation="tts", outcome="text_empty") == 1
    assert value("jobs_in_progress") == 0
    assert value("audio_seconds_total") == pytest.approx(report["audio_s"], rel=1e-3)
    assert value("characters_total") == report["num_chars"] == 11
    assert value("delivered_bytes_total", way="inline") == report["num_inline_bytes"]
    assert value("job_seconds_count", operation="tts") == 1
    assert value("job_seconds_bucket", operation="tts", le="+Inf") == 1
    assert value("job_seconds_bucket", operation="tts", le="1024.0") == 1
    assert value("engine_rows") == 1
    worker._exporter = None


def test_every_sum_is_shown() -> None:
    metrics = Metrics()
    job = metrics.begin()
    for number, name in enumerate(SUMS, start=1):
        setattr(job, name, number * 1000)
    metrics.end(job)
    with closing(Exporter(0)) as exporter:
        exporter.show(metrics, dict)
        assert {1000.0 * number for number in range(1, len(SUMS) + 1)} <= set(scraped(exporter.port).values())


def test_an_engine_whose_figures_cannot_be_read_takes_only_its_own_away(exporter: Exporter) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("lost")

    exporter.show(Metrics(), fail)
    assert ("chatterbox_jobs_in_progress", ()) in scraped(exporter.port)


def test_only_numbers_of_nested_figures_are_shown() -> None:
    stats = {"device": "cpu", "fine": True, "a cache": {"hits": 3, "entries": 1.5}, "reasons": ["x"], "none": None}
    assert dict(numbers(stats)) == {"a_cache_hits": 3, "a_cache_entries": 1.5}


def test_a_port_that_is_taken_is_an_error_that_names_the_setting_before_a_model_is_loaded(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JobError, match=rf"METRICS_PORT: .*{port}") as caught:
            Worker.load(settings.model_copy(update={"model": "no such model", "metrics_port": port}))
    assert caught.value.code == "invalid_request"


def test_a_closed_worker_lets_go_of_the_port(engine: Any, settings: Settings) -> None:
    exporter = Exporter(0)
    Worker(engine, settings, exporter=exporter).close()
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", exporter.port))


def test_prometheus_is_not_imported_where_nobody_asks_for_it() -> None:
    program = "import sys, handler, jobs.worker; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_figures_hold_no_words_of_a_job() -> None:
    job = JobFigures()
    job.take({"error": "text: got MARKED", "error_code": "invalid_request", "field": "MARKED"})
    assert "MARKED" not in str(job)
