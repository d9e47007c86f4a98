"""A stand-in for the platform: the HTTP side that the SDK's real worker loop talks to, in this process.

It gives jobs, takes results, pieces of streams and progress, hears pings, and tells a worker to stop a job. Beside it
the SDK's own imitation of the platform's public side, which runs in the worker's process (`local_server`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jobs.settings import Settings

WORKER_ID = "worker-1"
_POLL_S = 0.2
"""How long a request for jobs, or for jobs to stop, is held open: short, so that a worker ends soon."""
_PATIENCE_S = 60.0


class Platform:
    """Jobs in, results out. `with Platform() as platform`, then `platform.worker(…)`.

    Attributes:
        results: of each job what job-done got, without progress: `{"output": …}` or `{"error": …}`.
        pieces: of each job the outputs that job-stream got, as they came.
        most_bytes: of each job the size of the largest post of a piece.
        progress: of each job what came as IN_PROGRESS.
        events: (kind, job id) of all posts, as they came.
        pings: the job ids of each ping, as one text.
        may_take_pieces: while cleared, posts of pieces are not answered.
    """

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self.pieces: dict[str, list[Any]] = defaultdict(list)
        self.most_bytes: dict[str, int] = defaultdict(int)
        self.progress: dict[str, list[Any]] = defaultdict(list)
        self.events: list[tuple[str, str]] = []
        self.pings: list[str] = []
        self.may_take_pieces = threading.Event()
        self.may_take_pieces.set()
        self._queue: list[dict[str, Any]] = []
        self._to_stop: list[str] = []
        self._changed = threading.Condition()
        self._num_jobs = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._request_handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Platform:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_take_pieces.set()
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------ a client's side

    def submit(self, **fields: Any) -> str:
        """Queue a job; its id."""
        with self._changed:
            self._num_jobs += 1
            job_id = f"job-{self._num_jobs}"
            self._queue.append({"id": job_id, "input": fields})
            self._changed.notify_all()
        return job_id

    def stop(self, job_id: str) -> None:
        """Cancel a job that runs."""
        with self._changed:
            self._to_stop.append(job_id)
            self._changed.notify_all()

    def result(self, job_id: str) -> dict[str, Any]:
        """What the worker ended the job with; waits for it."""
        self.wait_for(lambda: job_id in self.results)
        return self.results[job_id]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something that came from the worker makes `condition` true."""
        with self._changed:
            assert self._changed.wait_for(condition, _PATIENCE_S), (self.events, self.results)

    # ------------------------------------------------------------------------------ a worker's side

    @property
    def environment(self) -> dict[str, str]:
        """What the platform sets for a worker's process."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": WORKER_ID,
            "RUNPOD_AI_API_KEY": "a-key",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    @contextmanager
    def worker(self, script: Path, cwd: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker's process on this platform; it writes to `cwd/log` and is told to end at the end."""
        with (cwd / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(script)],
                cwd=cwd,
                env=without_ours(os.environ) | self.environment | settings,
                stdout=log,
                stderr=log,
            )
            try:
                yield process
            finally:
                self.may_take_pieces.set()
                process.terminate()
                _wait_or_kill(process)

    def take(self, num_wanted: int) -> list[dict[str, Any]]:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue), _POLL_S)
            taken, self._queue = self._queue[:num_wanted], self._queue[num_wanted:]
        return taken

    def take_stops(self) -> list[str]:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._to_stop), _POLL_S)
            taken, self._to_stop = self._to_stop, []
        return taken

    def receive(self, kind: str, job_id: str, data: bytes) -> None:
        body = json.loads(data)
        if kind == "job-stream":
            with self._changed:  # the post is on its way
                self.events.append(("piece sent", job_id))
                self._changed.notify_all()
            self.may_take_pieces.wait(_PATIENCE_S)
        with self._changed:
            if kind == "job-stream":
                self.pieces[job_id].append(body["output"])
                self.most_bytes[job_id] = max(self.most_bytes[job_id], len(data))
            elif body.get("status") == "IN_PROGRESS":
                self.progress[job_id].append(body["output"])
            else:
                assert job_id not in self.results, job_id
                self.results[job_id] = body
            self.events.append((kind, job_id))
            self._changed.notify_all()

    def hear_ping(self, query: str) -> None:
        with self._changed:
            self.pings.append(",".join(parse_qs(query).get("job_id", [])))
            self._changed.notify_all()

    def _request_handler(self) -> type[BaseHTTPRequestHandler]:
        platform = self

        class Requests(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                kind = url.path.split("/")[1]
                if kind == "job-stop":
                    self._answer({"jobsToStop": platform.take_stops()})
                elif kind == "ping":
                    platform.hear_ping(url.query)
                    self._answer({})
                else:
                    num_wanted = int(parse_qs(url.query).get("batch_size", ["1"])[0])
                    jobs = platform.take(num_wanted)
                    self._answer(jobs if kind == "job-take-batch" else jobs[0] if jobs else None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                kind, _, job_id = urlsplit(self.path).path.split("/")[1:4]
                platform.receive(kind, job_id, body)
                self._answer({})

            def _answer(self, value: Any) -> None:
                body = b"" if value in (None, []) else json.dumps(value).encode()
                try:
                    self.send_response(200 if body else 204)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # a worker that ends, or was told to stop the job, hangs up
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Not of interest."""

        return Requests


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


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what is told by nobody."""
    for _ in range(int(_PATIENCE_S / 0.02)):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")
