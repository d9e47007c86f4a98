"""The HTTP of the platform: what clients ask of an endpoint, and what the SDK's loop asks for a worker.

/v2/{endpoint}/{operation}[/{job}]          clients, with a key
/worker/{secret}/{operation}/{pod}[/{job}]  workers: whoever knows the path is one
"""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web  # comes with runpod, whose loop is built on it
from aiohttp.typedefs import Handler, Middleware

from scripts.local_platform.endpoint import Endpoint, Worker
from scripts.local_platform.jobs import Job, Refused, as_json
from scripts.local_platform.limits import Rate

_MAX_WAIT_S = 300.0

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    endpoint: Endpoint, *, client_path: str, key: str, worker_path: str, middlewares: Sequence[Middleware] = ()
) -> web.Application:
    """All routes.

    Args:
        endpoint: what they act on.
        client_path, worker_path: what stands before an operation.
        key: that clients have to send.
        middlewares: around every request, within the one that answers refusals.
    """
    most_bytes = 2 * max(endpoint.limits.run_bytes, endpoint.limits.runsync_bytes)  # what is larger is not even read
    app = web.Application(client_max_size=most_bytes, middlewares=[_answer_refusals, *middlewares])
    clients, workers = _Clients(endpoint, key), _Workers(endpoint)
    app.add_routes(clients.routes(client_path))
    app.add_routes(workers.routes(worker_path))
    return app


def operation_of(request: web.Request) -> str:
    """Such as run or job-done."""
    return request.path.split("/")[3]


@web.middleware
async def _answer_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as refused:
        wait_s = refused.retry_after_s
        headers = {} if wait_s is None else {"Retry-After": str(math.ceil(wait_s))}
        return _json(as_json({"error": refused.message}), refused.status, headers)


class _Clients:
    """What clients ask.

    Args:
        endpoint: which they ask it of.
        key: that they have to send.
    """

    def __init__(self, endpoint: Endpoint, key: str) -> None:
        self._endpoint, self._key = endpoint, key
        limits = endpoint.limits
        self._rates = {name: Rate(most, limits.rate_window_s) for name, most in limits.rates.items()}

    def routes(self, path: str) -> list[web.RouteDef]:
        """Of an endpoint at a path."""
        return [
            web.post(f"{path}/run", self._guarded(self._run)),
            web.post(f"{path}/runsync", self._guarded(self._runsync)),
            web.get(f"{path}/status/{{job}}", self._guarded(self._status)),
            web.post(f"{path}/status/{{job}}", self._guarded(self._status)),
            web.get(f"{path}/stream/{{job}}", self._guarded(self._stream)),
            web.post(f"{path}/stream/{{job}}", self._guarded(self._stream)),
            web.post(f"{path}/cancel/{{job}}", self._guarded(self._cancel)),
            web.post(f"{path}/retry/{{job}}", self._guarded(self._retry)),
            web.post(f"{path}/purge-queue", self._guarded(self._purge)),
            web.get(f"{path}/health", self._guarded(self._health)),
        ]

    def _guarded(self, answer: Answer) -> Answer:
        """With the key, and not too often."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            sent = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(sent.encode(), self._key.encode()):
                raise Refused(401, "the Authorization header does not hold this endpoint's key")
            operation = operation_of(request)
            rate = self._rates.get(operation)
            wait_s = rate.wait_s(time.monotonic()) if rate is not None else 0.0
            if wait_s:
                raise Refused(429, f"too many {operation} requests", retry_after_s=wait_s)
            return await answer(request)

        return guarded

    async def _run(self, request: web.Request) -> web.Response:
        return _json(self._endpoint.submit(await request.read(), is_sync=False).told_briefly())

    async def _runsync(self, request: web.Request) -> web.Response:
        wait_s = _wait_s(request, self._endpoint.limits.wait_s)
        job = self._endpoint.submit(await request.read(), is_sync=True)
        await job.changed.wait_for(lambda: job.is_over, wait_s)
        return _json(job.told())

    async def _status(self, request: web.Request) -> web.Response:
        return _json(self._job(request).told())

    async def _stream(self, request: web.Request) -> web.Response:
        status, pieces = await self._endpoint.next_pieces(self._job(request))
        return _json(b'{"status":"%s","stream":[%s]}' % (status.encode(), b",".join(pieces)))

    async def _cancel(self, request: web.Request) -> web.Response:
        job = self._job(request)
        self._endpoint.cancel(job)
        return _json(job.told_briefly())

    async def _retry(self, request: web.Request) -> web.Response:
        job = self._job(request)
        self._endpoint.retry(job)
        return _json(job.told_briefly())

    async def _purge(self, request: web.Request) -> web.Response:
        return _json(as_json({"removed": self._endpoint.purge(), "status": "completed"}))

    async def _health(self, request: web.Request) -> web.Response:
        return _json(as_json(self._endpoint.health()))

    def _job(self, request: web.Request) -> Job:
        return self._endpoint.find(request.match_info["job"])


class _Workers:
    """What the SDK's loop asks, as its modules rp_job, rp_http and rp_ping do.

    Args:
        endpoint: which it works for.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def routes(self, path: str) -> list[web.RouteDef]:
        """Of the worker's side at a path."""
        return [
            web.get(f"{path}/job-take/{{pod}}", self._take),
            web.get(f"{path}/job-take-batch/{{pod}}", self._take_batch),
            web.get(f"{path}/job-stop/{{pod}}", self._take_stops),
            web.get(f"{path}/ping/{{pod}}", self._ping),
            web.post(f"{path}/job-done/{{pod}}/{{job}}", self._done),
            web.post(f"{path}/job-stream/{{pod}}/{{job}}", self._piece),
        ]

    async def _take(self, request: web.Request) -> web.Response:
        jobs = await self._endpoint.take(self._worker(request), 1)
        return _json(jobs[0]) if jobs else web.Response(status=204)

    async def _take_batch(self, request: web.Request) -> web.Response:
        jobs = await self._endpoint.take(self._worker(request), int(request.query.get("batch_size", "1")))
        return _json(b"[%s]" % b",".join(jobs)) if jobs else web.Response(status=204)

    async def _take_stops(self, request: web.Request) -> web.Response:
        stops = await self._endpoint.take_stops(self._worker(request))
        return _json(as_json({"jobsToStop": stops})) if stops else web.Response(status=204)

    async def _ping(self, request: web.Request) -> web.Response:
        listed = request.query.get("job_id", "")
        self._endpoint.hear_ping(self._worker(request), filter(None, listed.split(",")))
        return _json(b"{}")

    async def _done(self, request: web.Request) -> web.Response:
        worker, job = self._worker(request), self._endpoint.find(request.match_info["job"])
        self._endpoint.receive_result(worker, job, await request.read())
        return _json(b"{}")

    async def _piece(self, request: web.Request) -> web.Response:
        worker, job = self._worker(request), self._endpoint.find(request.match_info["job"])
        self._endpoint.receive_piece(worker, job, await request.read())
        return _json(b"{}")

    def _worker(self, request: web.Request) -> Worker:
        return self._endpoint.worker(request.match_info["pod"])


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def _wait_s(request: web.Request, default_s: float) -> float:
    text = request.query.get("wait")
    if text is None:
        return default_s
    if not text.isdecimal() or not 1.0 <= int(text) / 1000 <= _MAX_WAIT_S:
        raise Refused(400, f"wait: expected 1000 to {_MAX_WAIT_S * 1000:.0f} milliseconds")
    return int(text) / 1000
