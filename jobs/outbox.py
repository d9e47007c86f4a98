"""What the SDK posts, handed to the platform until it is taken.

The SDK gives a post up at the first 429, refused connection or slow answer, and at the third 5xx, some two seconds
later: that costs the job its result, and all that tells of it is a line in the log. So the SDK posts to this relay, on
the loopback interface of its own process, which waits and tries again. While it does, the SDK counts the job as
running: the worker's pings name it, and no other worker is given it.

    with Outbox(os.environ) as outbox:
        os.environ.update(outbox.environment)
        import runpod  # reads them at its import

A final result that the platform refuses for what it is (HTTP 400, 413, 422) becomes an error result, so that the client
learns of it. Progress is sent once and never after the result: it may be lost, and must not come late.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from jobs.errors import JobError, error_result

PATIENCE_S = 500.0
"""For how long a post is tried: the SDK's own limit of a request is 600 s, after which it forgets the job."""

_RESULTS, _PIECES = "RUNPOD_WEBHOOK_POST_OUTPUT", "RUNPOD_WEBHOOK_POST_STREAM"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0
_TIMEOUT_S, _PROGRESS_TIMEOUT_S = 60.0, 5.0
_MAY_PASS = frozenset({408, 425, 429})  # of the refusals, those that mean another time
_IN_DOUBT = frozenset({301, 302, 303, 307, 308, 401, 403, 409})  # a gateway's, while it is set up anew, or meant
_SHARE_FOR_DOUBT = 0.06  # of the patience, half a minute
_FOR_WHAT_IT_IS = frozenset({400, 413, 422})
_NEVER_TAKEN = 424
"""What the SDK is told at the end of all patience. Of a 5xx it would begin anew."""
_FORWARDED_HEADERS = ("authorization", "content-type", "charset", "x-request-id", "user-agent")
_MAX_BODY_BYTES = 64 << 20
_MAX_PROGRESS_BYTES = 10_000
_WORKER, _JOB = "$RUNPOD_POD_ID", "$ID"  # in the platform's templates, filled in by the SDK
_MAX_ENDED = 10_000

_log = logging.getLogger(__name__)


class Outbox:
    """The relay. Made, entered and closed in the process that imports the SDK.

    Args:
        environment: where the platform says what to post where.
        patience_s: for how long a result or a piece is tried.
        sleep: waits between two tries.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        patience_s: float = PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience_s, self._sleep = patience_s, sleep
        wanted = {name: environment[name] for name in (_RESULTS, _PIECES) if environment.get(name)}
        self._routes = {name: _Route.of(template, name) for name, template in wanted.items()}
        self._client = httpx.Client(follow_redirects=False)
        self._ended: dict[str, None] = {}  # jobs whose result was posted, in order
        self._in_progress: set[str] = set()  # jobs of which progress is being posted
        self._broken: set[str] = set()  # streams that lost a piece
        self._changed = threading.Condition()  # of the three above
        self._server = _Server(("127.0.0.1", 0), self._request_handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="outbox", daemon=True)

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
            status = self._piece(url, sent, body, job_id)
        elif _is_progress(body):
            return self._progress(url, sent, body, job_id)
        else:
            status = self._result(url, sent, body, job_id)
        if status != 200:
            _log.error("the platform did not take the answer of job %s (HTTP %d)", job_id, status)
        return status

    def _piece(self, url: str, headers: Mapping[str, str], body: bytes, job_id: str) -> int:
        """Of a stream that has lost a piece no more is sent: it ends with an error."""
        with self._changed:
            if job_id in self._broken:
                return _NEVER_TAKEN
        status = self._try_on(url, headers, body)
        if status != 200:
            with self._changed:
                self._broken.add(job_id)
        return status

    def _result(self, url: str, headers: Mapping[str, str], body: bytes, job_id: str) -> int:
        with self._changed:
            if job_id in self._broken:
                self._broken.discard(job_id)
                body = _told(JobError("internal", "a piece of the stream could not be delivered; send the job again"))
            self._ended[job_id] = None
            while len(self._ended) > _MAX_ENDED:
                del self._ended[next(iter(self._ended))]
            self._changed.wait_for(lambda: job_id not in self._in_progress)
        status = self._try_on(url, headers, body)
        return self.refuse(url, headers, status, len(body)) if status in _FOR_WHAT_IT_IS else status

    def refuse(self, url: str, headers: Mapping[str, str], status: int, num_bytes: int) -> int:
        """Send an error in the place of a result that is not taken."""
        message = f"the platform refused the result of {num_bytes / 1e6:.1f} MB (HTTP {status})"
        return self._try_on(url, headers, _told(JobError("result_too_large", message)))

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
            is_fresh = time.monotonic() - began_s < self._patience_s * _SHARE_FOR_DOUBT
            may_pass = status is None or status >= 500 or status in _MAY_PASS
            return None if may_pass or (is_fresh and status in _IN_DOUBT) else status

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
                self._answer(outbox.forward(self.path, headers, _too_large(num_bytes)))

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
        _log.debug("a post was given up", exc_info=True)


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


def _told(error: JobError) -> bytes:
    """An error as the SDK posts one: for a plain worker's client, and as text for a stream's."""
    told = error_result(error)
    posted = {"error": told["error"], "output": {name: told[name] for name in ("error_code", "field")}}
    return json.dumps(posted, ensure_ascii=False).encode("utf-8")


def _too_large(num_bytes: int) -> bytes:
    """In the place of what is larger than the platform has ever taken."""
    message = f"the result has {num_bytes / 1e6:.1f} MB, which no platform takes; ask for opus or mp3, or a bucket"
    return _told(JobError("result_too_large", message))
