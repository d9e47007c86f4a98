"""The platform's stand-in (`scripts.local_platform`) with what tests need of it: faults, all that was said, waiting.

Beside it the SDK's own imitation of the platform's public side, which runs in the worker's process (`local_server`).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from aiohttp import web
from aiohttp.typedefs import Handler

from jobs.settings import Settings
from scripts.local_platform import Limits, LocalPlatform, LocalWorker
from scripts.local_platform.web import operation_of

LIMITS = Limits(ping_interval_s=1, lost_after_s=15.0, hold_s=2.0, stream_hold_s=0.2, webhook_pause_s=0.05)
"""The platform's, and less patience."""
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request.

    Args:
        delay_s: for how long it waits before it is looked at.
        status: of an answer that is given in place of the request's own; None for the request's own.
        is_cut: whether the connection is cut before the answer, which has had its effect.
    """

    delay_s: float = 0.0
    status: int | None = None
    is_cut: bool = False


class Platform(LocalPlatform):
    """Jobs in, results out. `with Platform() as platform`, then `platform.worker(…)`.

    Attributes:
        results: of each job the first that was taken from job-done, without progress: `{"output": …}` or
            `{"error": …}`.
        answers: of each job all of those.
        pieces: of each job the outputs that were taken from job-stream, as they came.
        most_bytes: of each job the size of the largest post of a piece.
        progress: of each job what came as IN_PROGRESS.
        events: (operation, job id) of all posts of workers that were taken, as they came; before each piece
            ("piece sent", job id).
        pings: the job ids of each ping, as one text.
        may_take_pieces: while cleared, posts of pieces are not answered.
        fault: says what goes wrong with a request, by its operation (such as job-done) and its job's id or "".
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        super().__init__(limits=limits, middlewares=[self._watch])
        self.results: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.pieces: dict[str, list[Any]] = defaultdict(list)
        self.most_bytes: dict[str, int] = defaultdict(int)
        self.progress: dict[str, list[Any]] = defaultdict(list)
        self.events: list[tuple[str, str]] = []
        self.pings: list[str] = []
        self.may_take_pieces = threading.Event()
        self.may_take_pieces.set()
        self.fault: Callable[[str, str], Fault | None] = lambda _operation, _job_id: None
        self._news = threading.Condition()

    def __enter__(self) -> Platform:
        self.start()
        self.http = httpx.Client(base_url=self.url, headers=self.headers, timeout=_PATIENCE_S, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.may_take_pieces.set()
        self.http.close()
        self.close()

    # ------------------------------------------------------------------------------ a client's side

    def submit(self, **fields: Any) -> str:
        """Queue a job; its id."""
        return self.ask("POST", "run", input=fields)["id"]

    def ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """What an operation answers."""
        answer = self.http.request(method, f"{self.url}/{path}", json=body or None).raise_for_status()
        decoded: dict[str, Any] = answer.json()
        return decoded

    def status(self, job_id: str) -> dict[str, Any]:
        return self.ask("GET", f"status/{job_id}")

    def stop(self, job_id: str) -> None:
        """Cancel a job."""
        self.ask("POST", f"cancel/{job_id}")

    def result(self, job_id: str) -> dict[str, Any]:
        """What the worker ended the job with; waits for it."""
        self.wait_for(lambda: job_id in self.results)
        return self.results[job_id]

    def ended(self, job_id: str) -> dict[str, Any]:
        """What a client is told of a job at its end; waits for it."""
        wait_until(lambda: self.status(job_id)["status"] not in ("IN_QUEUE", "IN_PROGRESS"))
        return self.status(job_id)

    def has_jobs(self, place: LocalWorker) -> bool:
        """Whether the process in a place was given jobs that have not ended."""
        worker = self._endpoint.workers.get(place.pod_id)
        return worker is not None and bool(worker.jobs)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something that came from the worker makes `condition` true."""
        with self._news:
            assert self._news.wait_for(condition, _PATIENCE_S), (self.events, self.results)

    # ------------------------------------------------------------------------------ a worker's side

    @contextmanager
    def worker(self, script: Path, cwd: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker's process on this platform; it writes to `cwd/log` and is told to end at the end."""
        with self.place(script, cwd, settings, replaces=False) as place:
            yield place.process

    @contextmanager
    def place(
        self, script: Path, cwd: Path, settings: Mapping[str, str] | None = None, *, replaces: bool = True
    ) -> Iterator[LocalWorker]:
        """A worker that is replaced when it ends."""
        worker = self.start_worker(
            [sys.executable, str(script)],
            cwd=cwd,
            log=cwd / "log",
            environment=without_ours(os.environ) | dict(settings or {}),
            replaces=replaces,
        )
        try:
            yield worker
        finally:
            self.may_take_pieces.set()
            assert self.stop_worker(worker), (cwd / "log").read_text()

    @web.middleware
    async def _watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        operation, job_id = operation_of(request), request.match_info.get("job", "")
        fault = self.fault(operation, job_id)
        if fault is not None:
            await asyncio.sleep(fault.delay_s)
            if fault.status is not None:
                return web.Response(status=fault.status)
        if operation == "job-stream":
            self._note(("piece sent", job_id))  # it is on its way
            await asyncio.get_running_loop().run_in_executor(None, self.may_take_pieces.wait, _PATIENCE_S)
        response = await handler(request)
        if request.path.startswith("/worker/"):
            self._note_post(operation, job_id, await request.read(), request.query.get("job_id", ""))
        if fault is not None and fault.is_cut and request.transport is not None:
            request.transport.abort()
        return response

    def _note(self, event: tuple[str, str]) -> None:
        with self._news:
            self.events.append(event)
            self._news.notify_all()

    def _note_post(self, operation: str, job_id: str, data: bytes, listed: str) -> None:
        with self._news:
            if operation == "ping":
                self.pings.append(listed)
            elif operation == "job-stream":
                self.pieces[job_id].append(json.loads(data)["output"])
                self.most_bytes[job_id] = max(self.most_bytes[job_id], len(data))
            elif operation == "job-done":
                self._note_answer(job_id, json.loads(data))
            if job_id:
                self.events.append((operation, job_id))
            self._news.notify_all()

    def _note_answer(self, job_id: str, body: dict[str, Any]) -> None:
        if body.get("status") == "IN_PROGRESS":
            self.progress[job_id].append(body["output"])
        else:
            self.answers[job_id].append(body)
            self.results.setdefault(job_id, body)


@contextmanager
def local_server(script: Path, cwd: Path, **settings: str) -> Iterator[str]:
    """The SDK's own API around a worker: its URL. The worker writes to `cwd/log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--rp_serve_api", "--rp_api_port", str(port), "--rp_api_host", "127.0.0.1"]
    with (cwd / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=cwd,
            env=without_ours(os.environ) | settings,
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(lambda: _is_open(port) or process.poll() is not None)
            assert process.poll() is None, (cwd / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def post(url: str, **body: Any) -> dict[str, Any]:
    """Send and receive JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        decoded: dict[str, Any] = json.load(answer)
        return decoded


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def without_ours(environment: Any) -> dict[str, str]:
    """An environment without variables that would configure a worker."""
    ours = {name.upper() for name in Settings.model_fields}
    return {name: value for name, value in environment.items() if not name.startswith("RUNPOD_") and name not in ours}


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what is told by nobody."""
    for _ in range(int(_PATIENCE_S / 0.02)):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")
