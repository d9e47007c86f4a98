"""What the SDK posts, handed to the platform until it is taken.

The SDK gives a post up at the first 429, refused connection or slow answer, and at the third 5xx, some two seconds
later: that costs the job its result, and all that tells of it is a line in the log. So the SDK posts to this relay, on
the loopback interface of its own process, which waits and tries again. While it does, the SDK counts the job as
running: the worker's pings name it, and no other worker is given it.

    with Outbox(os.environ) as outbox:
        os.environ.update(outbox.environment)
        import runpod  # reads them at its import

A final result that the platform refuses for what it is (HTTP 400, 413, 422) becomes an error result, so that the client
learns of it. A stream that lost a piece sends no more of them and ends with an error, as every stream that fails
(`jobs.streaming`). Progress is sent once and never after the result: it may be lost, and must not come late.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import secrets
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity
from cachetools import LRUCache

from jobs.errors import JobError, error_result
from jobs.streaming import error_piece

PATIENCE_S = 500.0
"""For how long a post is tried: the SDK's own limit of a request is 600 s, after which it forgets the job."""

_RESULTS, _PIECES = "RUNPOD_WEBHOOK_POST_OUTPUT", "RUNPOD_WEBHOOK_POST_STREAM"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0
_TIMEOUT_S, _PROGRESS_TIMEOUT_S = 60.0, 5.0
_MAY_PASS = frozenset({408, 425, 429})  # of the refusals, those that mean another time
_IN_DOUBT = frozenset({301, 302, 303, 307, 308, 401, 403, 409})  # a gateway's, while it is set up anew, or meant
_DOUBT_S = 30.0  # for so long these
_FOR_WHAT_IT_IS = frozenset({400, 413, 422})
_NEVER_TAKEN = 424
"""What the SDK is told at the end of all patience. Of a 5xx it would begin anew."""
_FORWARDED_HEADERS = ("authorization", "content-type", "charset", "x-request-id", "user-agent")
_MAX_BODY_BYTES = 64 << 20
_MAX_PROGRESS_BYTES = 10_000
_WORKER, _JOB = "$RUNPOD_POD_ID", "$ID"  # in the platform's templates, filled in by the SDK
_STREAMS_END = "&isStream=true"  # of the SDK's address for the result of a generator
_MAX_REMEMBERED = 10_000  # jobs
_LOOKS_FOR_END_EVERY_S = 0.1

_log = logging.getLogger(__name__)


class Outbox:
    """The relay. Made, entered and closed in the process that imports the SDK.

    Args:
        environment: where the platform says what to post where.
        patience_s: for how long a result or a piece is tried.
        doubt_s: for how much of it a refusal is doubted that may be of a gateway for a moment.
        sleep: waits between two tries.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        patience_s: float = PATIENCE_S,
        doubt_s: float = _DOUBT_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience_s, self._doubt_s, self._sleep = patience_s, doubt_s, sleep
        wanted = {name: environment[name] for name in (_RESULTS, _PIECES) if environment.get(name)}
        self._routes = {name: _Route.of(template, name) for name, template in wanted.items()}
        # Trusts whom the SDK trusts, and like it asks no proxy: whoever is given jobs can answer them.
        self._client = httpx.Client(follow_redirects=False, trust_env=False, verify=ssl.create_default_context())
        self._ended: LRUCache[str, None] = LRUCache(_MAX_REMEMBERED)  # jobs whose result was posted
        self._broken: LRUCache[str, None] = LRUCache(_MAX_REMEMBERED)  # jobs whose stream lost a piece
        self._in_progress: set[str] = set()  # jobs of which progress is being posted
        self._changed = threading.Condition()  # of the three above
        self._server = _Server(("127.0.0.1", 0), self._request_handler())
        serve = functools.partial(self._server.serve_forever, poll_interval=_LOOKS_FOR_END_EVERY_S)
        self._thread = threading.Thread(target=serve, name="outbox", daemon=True)

    def __enter__(self) -> Outbox:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._client.close()

    @property
    def environment(self) -> dict[str, str]:
        """What to put in the place of the platform's variables, before the SDK is imported."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {name: url + route.here for name, route in self._routes.items()}

    def begin(self, job_id: str) -> None:
        """A job is taken, perhaps again: progress of it is posted from now on."""
        with self._changed:
            self._ended.pop(job_id, None)

    def forward(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        """Post until it is taken; gives the HTTP status that the SDK is to see. Blocks.

        Args:
            path: of the request here, with its query.
            headers: of the request here.
            body: JSON.
        """
        route = next((route for route in self._routes.values() if path.startswith(f"{route.place}/")), None)
        if route is None:
            return 404
        url, job_id = route.origin + path.removeprefix(route.place), route.job_id(path)
        sent = {name: value for name, value in headers.items() if name.lower() in _FORWARDED_HEADERS}
        if route.name == _PIECES:
            return self._piece(url, sent, body, job_id)
        if _is_progress(body):
            return self._progress(url, sent, body, job_id)
        return self._result(url, sent, body, job_id)

    def _piece(self, url: str, headers: Mapping[str, str], body: bytes, job_id: str) -> int:
        """Of a stream that has lost a piece no more is sent, until the job is run again and streams anew."""
        with self._changed:
            if job_id in self._broken:
                if not _is_first(body):
                    return _NEVER_TAKEN
                del self._broken[job_id]
        status = self._try_on(url, headers, body)
        if status != 200:
            _log.error("the platform did not take a piece of job %s (HTTP %d): its stream is broken", job_id, status)
            with self._changed:
                self._broken[job_id] = None
        return status

    def _result(self, url: str, headers: Mapping[str, str], body: bytes, job_id: str) -> int:
        with self._changed:
            is_broken = job_id in self._broken
            self._ended[job_id] = None
            self._changed.wait_for(lambda: job_id not in self._in_progress)
        if is_broken and "error" not in (posted := json.loads(body)):
            lost = JobError("internal", "a piece of the stream could not be delivered; send the job again")
            body = _told(lost, url, posted)
        status = self._try_on(url, headers, body)
        if status in _FOR_WHAT_IT_IS:
            message = f"the platform refused the result of {len(body) / 1e6:.1f} MB (HTTP {status})"
            status = self._try_on(url, headers, _told(JobError("result_too_large", message), url, json.loads(body)))
        if status != 200:
            _log.error("the platform did not take the result of job %s (HTTP %d)", job_id, status)
        return status

    def _progress(self, url: str, headers: Mapping[str, str], body: bytes, job_id: str) -> int:
        """Once, and not beside or behind the result: then the job would look unfinished."""
        with self._changed:
            if job_id in self._ended or job_id in self._in_progress:
                return 200
            self._in_progress.add(job_id)
        try:
            self._once(url, headers, body, _PROGRESS_TIMEOUT_S)
        finally:
            with self._changed:
                self._in_progress.discard(job_id)
                self._changed.notify_all()
        return 200

    def _try_on(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """200 once it is taken, the platform's refusal, or `_NEVER_TAKEN`."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda status: status is None),
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
            stop=tenacity.stop_after_delay(self._patience_s),
            sleep=self._sleep,
            retry_error_callback=lambda _: _NEVER_TAKEN,
        )
        began_s = time.monotonic()

        def settled() -> int | None:
            """The outcome of one try; None where another may do better."""
            status = self._once(url, headers, body)
            is_in_doubt = status in _IN_DOUBT and time.monotonic() - began_s < self._doubt_s
            may_pass = status is None or status >= 500 or status in _MAY_PASS
            return None if may_pass or is_in_doubt else status

        status = retrying(settled)
        assert status is not None
        return status

    def _once(self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float = _TIMEOUT_S) -> int | None:
        try:
            status = self._client.post(url, content=body, headers=dict(headers), timeout=timeout_s).status_code
        except httpx.HTTPError as error:
            _log.warning("the platform could not be reached with a job's answer: %s", type(error).__name__)
            return None
        if 200 <= status < 300:
            return 200
        _log.warning("the platform answered a job's answer with HTTP %d", status)
        return status

    def _request_handler(self) -> type[BaseHTTPRequestHandler]:
        outbox = self

        class Requests(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                num_bytes = int(self.headers.get("Content-Length") or 0)
                headers = dict(self.headers.items())
                if num_bytes <= _MAX_BODY_BYTES:
                    self._answer(outbox.forward(self.path, headers, self.rfile.read(num_bytes)))
                    return
                for start in range(0, num_bytes, _MAX_BODY_BYTES):  # else the SDK would not hear the answer
                    self.rfile.read(min(_MAX_BODY_BYTES, num_bytes - start))
                self._answer(outbox.forward(self.path, headers, _too_large(num_bytes, self.path)))

            def _answer(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """The platform's answers are logged, where they are not what was hoped for."""

        return Requests


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a stopped job's post, which nobody waits for, keeps no process alive
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The SDK hangs up when a job is stopped."""
        is_hung_up = isinstance(sys.exception(), OSError)
        _log.log(logging.DEBUG if is_hung_up else logging.ERROR, "a post was given up", exc_info=True)


@dataclass(frozen=True)
class _Route:
    """Where posts of one kind go.

    Args:
        name: the platform's variable.
        place: first part of the path here: nobody else on this machine may post as this worker.
        origin: the platform's scheme and host.
        here: the template for the SDK, without this relay's host.
        path: matches a path that the SDK made of it.
    """

    name: str
    place: str
    origin: str
    here: str
    path: re.Pattern[str]

    @classmethod
    def of(cls, template: str, name: str) -> _Route:
        url = urlsplit(template)
        place = f"/{secrets.token_urlsafe(16)}"
        path = re.escape(place + url.path).replace(re.escape(_WORKER), "[^/?]*")
        pattern = path.replace(re.escape(_JOB), "(?P<job>[^/?]*)", 1)
        return cls(name, place, f"{url.scheme}://{url.netloc}", f"{place}{url.path}?{url.query}", re.compile(pattern))

    def job_id(self, path: str) -> str:
        """(The SDK's header with the job's id is of a session that all jobs share.)"""
        found = self.path.match(path)
        return "" if found is None else found.groupdict().get("job") or ""


def _is_progress(body: bytes) -> bool:
    if len(body) > _MAX_PROGRESS_BYTES:
        return False
    value = json.loads(body)
    return isinstance(value, dict) and value.get("status") == "IN_PROGRESS"


def _is_first(body: bytes) -> bool:
    """Whether a piece begins a stream."""
    return bool(json.loads(body)["output"]["seq"] == 0)


def _told(error: JobError, address: str, posted: Mapping[str, Any]) -> bytes:
    """An error as the SDK posts one: of a plain worker with its code beside it, of a stream as text.

    Args:
        error: what to tell.
        address: of the post.
        posted: in the place of what; its wish for a fresh worker is kept.
    """
    told = error_result(error)
    beside = {"error": told["error"], "output": {name: told[name] for name in ("error_code", "field")}}
    wish = {name: posted[name] for name in posted.keys() & {"stopPod"}}
    as_posted = error_piece(told) if address.endswith(_STREAMS_END) else beside
    return json.dumps({**as_posted, **wish}, ensure_ascii=False).encode("utf-8")


def _too_large(num_bytes: int, address: str) -> bytes:
    """In the place of what is larger than the platform has ever taken."""
    message = f"the result has {num_bytes / 1e6:.1f} MB, which no platform takes; ask for opus or mp3, or a bucket"
    return _told(JobError("result_too_large", message), address, {})
