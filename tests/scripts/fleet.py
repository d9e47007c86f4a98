"""An endpoint with workers that give a text back as its "audio", at once, and with all that goes wrong in a fleet.

The platform and its HTTP are real (`scripts.local_platform`); workers are threads that talk to it as the SDK does.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from aiohttp import web
from aiohttp.typedefs import Handler

from scripts.local_platform import Limits, LocalPlatform
from scripts.local_platform.jobs import Refused
from scripts.local_platform.web import operation_of

LIMITS = Limits(hold_s=0.2, stream_hold_s=0.05, silent_after_s=1.0, max_losses=1000)

Answer = Callable[[dict[str, Any]], dict[str, Any] | None]


def spoken(fields: dict[str, Any]) -> dict[str, Any]:
    """A result whose audio says which text it is of."""
    audio = base64.b64encode(f"{fields.get('voice_name')}: {fields['text']}".encode()).decode()
    about = {"format": fields.get("output_format", "wav"), "sample_rate": 24_000, "duration_s": 2.0, "warnings": []}
    return {"audio": audio, **about, "seed": 7, "model": "fake", "voice": "built-in", "timings": {"total": 0.1}}


class Fleet(LocalPlatform):
    """`with Fleet() as fleet`, then `fleet.work(…)`.

    Attributes:
        asked: the inputs of all jobs that workers took, as they came.
        made: how often a result was made under each key. What is made is kept, as a worker keeps it.
        num_refused, num_unknown: answers of 429, and of 404.
        lost_share: of the answers to /run, which are cut off behind the job's taking.
        is_open: while cleared, workers take nothing.
        on_job: told of each job that a worker takes, whole.
    """

    def __init__(self, limits: Limits = LIMITS, seed: int = 0) -> None:
        super().__init__(limits=limits, middlewares=[self._watch])
        self.asked: list[dict[str, Any]] = []
        self.made: collections.Counter[str] = collections.Counter()
        self.requests: collections.Counter[str] = collections.Counter()
        self.num_refused = self.num_unknown = 0
        self.lost_share = 0.0
        self.is_open = threading.Event()
        self.is_open.set()
        self.answer: Answer = spoken
        self.on_job: Callable[[dict[str, Any]], object] = lambda _job: None
        self._random = random.Random(seed)
        self._kept: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.is_open.set()
        for thread in self._threads:
            thread.join()
        self.close()

    def work(self, num_workers: int = 1, *, failing: float = 0.0, dying: float = 0.0) -> None:
        """Start workers.

        Args:
            num_workers: threads.
            failing: share of the jobs that fail, with a code that may pass.
            dying: share of the batches in whose midst a worker is gone; another comes in its place.
        """
        for number in range(num_workers):
            draw = random.Random(number)
            thread = threading.Thread(target=self._run_places, args=(draw, failing, dying))
            thread.start()
            self._threads.append(thread)

    def wait_for_jobs(self, count: int) -> None:
        """Until so many were taken by workers."""
        self.wait_until(lambda: len(self.asked) >= count)

    @staticmethod
    def wait_until(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60.0
        while not condition():
            assert time.monotonic() < deadline_s, "it did not happen"
            time.sleep(0.005)

    # ------------------------------------------------------------------------------ workers

    def _run_places(self, draw: random.Random, failing: float, dying: float) -> None:
        while not self._is_over.is_set():
            with httpx.Client(trust_env=False, timeout=30.0) as http:
                self._run_worker(_Urls(self, f"fake-{uuid.uuid4()}"), http, draw, failing, dying)

    def _run_worker(self, urls: _Urls, http: httpx.Client, draw: random.Random, failing: float, dying: float) -> None:
        while not self._is_over.is_set():
            self.is_open.wait()
            http.get(urls.ping)
            taken = http.get(urls.take)
            jobs = taken.json() if taken.status_code == 200 else []
            dies_at = draw.randrange(len(jobs)) if jobs and draw.random() < dying else None
            for number, job in enumerate(jobs):
                self.on_job(job)
                result = self._result(job["input"], draw.random() < failing)
                if number == dies_at:
                    return  # with what it made, and with the rest of the jobs
                if result is not None:
                    http.post(urls.done.replace("$ID", job["id"]), content=json.dumps(result))

    def _result(self, fields: dict[str, Any], fails: bool) -> dict[str, Any] | None:
        """What a worker posts; None for nothing, ever."""
        key = fields.get("idempotency_key", "")
        with self._lock:
            self.asked.append(fields)
            if key in self._kept:
                return {"output": {**self._kept[key], "repeated": True}}
        if fails:
            return {"error": "the model lost its thread", "output": {"error_code": "generation_failed"}}
        result = self.answer(fields)
        if result is None:
            return None
        if "error" in result:
            return {"error": result["error"], "output": {"error_code": result.get("error_code")}}
        if fields.get("operation") in (None, "tts", "long_form"):
            with self._lock:
                self.made[key] += 1
                self._kept[key] = result
        return {"output": result}

    @web.middleware
    async def _watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        operation = operation_of(request)
        self.requests[operation] += 1
        try:
            response = await handler(request)
        except Refused as refused:
            self.num_refused += refused.status == 429
            self.num_unknown += refused.status == 404
            raise
        if operation == "run" and self._random.random() < self.lost_share and request.transport is not None:
            request.transport.abort()
        return response


class _Urls:
    """Where a worker asks."""

    def __init__(self, fleet: Fleet, pod_id: str) -> None:
        given = fleet.environment(pod_id)
        take = given["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", pod_id).replace("/job-take/", "/job-take-batch/")
        self.take = f"{take}&batch_size=20"
        self.done = given["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", pod_id)
        self.ping = given["RUNPOD_WEBHOOK_PING"].replace("$RUNPOD_POD_ID", pod_id)


@contextlib.contextmanager
def fleet_of(num_workers: int = 1, **faults: float) -> Iterator[Fleet]:
    """A fleet at work."""
    with Fleet() as fleet:
        fleet.work(num_workers, **faults)
        yield fleet
