"""The platform in a thread of its own: its HTTP, its queue and its workers' processes."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Middleware

from scripts.local_platform.endpoint import Endpoint, Worker
from scripts.local_platform.jobs import Job
from scripts.local_platform.limits import Limits
from scripts.local_platform.processes import Keeper, LocalWorker
from scripts.local_platform.web import application

HOST = "127.0.0.1"
HANDLER = Path(__file__).resolve().parents[2] / "handler.py"

_MAX_LINE_BYTES = 1 << 17
"""Of a request: a ping names all jobs of its worker, in up to 64 KiB."""

_WEBHOOK_TIMEOUT = aiohttp.ClientTimeout(total=30.0)

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class LocalPlatform:
    """An endpoint on this machine, between `start` and `close`, or within `with`. Its methods may be called anywhere.

    Args:
        limits: what it allows, and its times.
        api_key: that clients have to send; None makes one up.
        endpoint_id: the endpoint's name in URLs.
        port: to listen on; 0 for any that is free.
        middlewares: around every request, see `web.application`.

    Attributes:
        api_key: as above.
        limits: as above.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        api_key: str | None = None,
        endpoint_id: str = "local",
        port: int = 0,
        middlewares: Sequence[Middleware] = (),
    ) -> None:
        self.limits = limits or Limits()
        self.api_key = api_key or secrets.token_urlsafe(24)
        self._client_path = f"/v2/{endpoint_id}"
        self._worker_key = secrets.token_urlsafe(24)
        self._worker_path = f"/worker/{self._worker_key}"
        self._port, self._middlewares = port, middlewares
        self._workers: list[LocalWorker] = []
        self._webhooks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------ from start to end

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-platform", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        self._keeper = Keeper()

    def close(self, within_s: float = 20.0) -> None:
        """End all jobs, stop the workers, each with force after some seconds, and listen no more."""
        self._call(self._endpoint.stop_all)
        for worker in self._workers:
            worker.begin_stop()
            self._call(self._drain, worker.pod_id)
        for worker in self._workers:
            worker.stop(within_s)
        self._keeper.close()
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._end_loop()

    def __enter__(self) -> LocalPlatform:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------ for clients

    @property
    def url(self) -> str:
        """Of the endpoint: what stands before /run."""
        return f"http://{HOST}:{self._port}{self._client_path}"

    @property
    def headers(self) -> dict[str, str]:
        """With the key."""
        return {"Authorization": f"Bearer {self.api_key}"}

    @property
    def conflicts(self) -> list[str]:
        """Ids of jobs that were answered more than once, and differently, as often as that was."""
        return self._call(lambda: list(self._endpoint.conflicts))

    # ------------------------------------------------------------------------------ for workers

    @property
    def workers(self) -> tuple[LocalWorker, ...]:
        """Those that were started and not stopped."""
        return tuple(self._workers)

    def start_worker(
        self,
        command: Sequence[str] = (sys.executable, str(HANDLER)),
        *,
        log: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        replaces: bool = True,
    ) -> LocalWorker:
        """Start a worker; returns at once.

        Args:
            command: what a worker runs.
            log: file that its output is added to.
            cwd: its working directory; None for this one.
            environment: None for this process's. What it says of the platform is replaced.
            replaces: whether a process that ends is followed by a fresh one.
        """
        surroundings = {name: value for name, value in (environment or os.environ).items() if _may_stay(name)}

        def start(pod_id: str) -> subprocess.Popen[bytes]:
            self._call(self._endpoint.add_worker, pod_id, is_watched=True)
            whole = surroundings | self._variables(pod_id) | _without_proxy(surroundings)
            return self._keeper.start(command, cwd=cwd or Path.cwd(), environment=whole, log=log)

        def end(pod_id: str, process: subprocess.Popen[bytes]) -> None:
            self._keeper.end(process)
            self._call(self._endpoint.lose, pod_id)

        name = f"local-{secrets.token_hex(4)}"
        worker = LocalWorker(name, start=start, on_end=end, replaces=replaces)
        self._workers.append(worker)
        return worker

    def stop_worker(self, worker: LocalWorker, within_s: float = 20.0) -> bool:
        """Let a worker finish its jobs, and end it with force after some seconds; whether it went without."""
        self._workers.remove(worker)
        worker.begin_stop()
        self._call(self._drain, worker.pod_id)
        return worker.stop(within_s)

    def environment(self, pod_id: str) -> dict[str, str]:
        """What makes a process that somebody else starts a worker of this endpoint: its environment variables.

        It is lost, and its jobs go to others, when its pings stop.
        """
        self._call(self._endpoint.add_worker, pod_id, is_watched=False)
        return self._variables(pod_id)

    def _variables(self, pod_id: str) -> dict[str, str]:
        url = f"http://{HOST}:{self._port}{self._worker_path}"
        return {  # as the SDK reads them; it puts query parameters behind what follows the `?`
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": str(self.limits.ping_interval_s * 1000),
            "RUNPOD_POD_ID": pod_id,
            "RUNPOD_AI_API_KEY": self._worker_key,  # without one the SDK sends no pings
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def _drain(self, pod_id: str) -> None:
        worker = self._endpoint.workers.get(pod_id)
        if worker is not None:
            self._endpoint.drain(worker)

    def _replace(self, worker: Worker) -> None:
        """End a worker that asked for it: its place gets a fresh one. It hears of it before its post is answered."""
        for local in self._workers:
            if local.pod_id == worker.pod_id:
                local.terminate()
                self._loop.call_later(self.limits.stop_pod_s, local.kill_if, worker.pod_id)

    # ------------------------------------------------------------------------------ on the loop

    async def _open(self) -> None:
        self._endpoint = Endpoint(self.limits, on_end=self._notify, on_stop_pod=self._replace)
        app = application(
            self._endpoint,
            client_path=self._client_path,
            key=self.api_key,
            worker_path=self._worker_path,
            middlewares=self._middlewares,
        )
        # A worker that is gone must not be given a job by the request that it left behind.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0, max_line_size=_MAX_LINE_BYTES
        )
        self._session = aiohttp.ClientSession(timeout=_WEBHOOK_TIMEOUT)
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, self._port)
        try:
            await site.start()
        except OSError:
            await self._shut()
            raise
        self._port = self._runner.addresses[0][1]

    async def _shut(self) -> None:
        for task in self._webhooks:
            task.cancel()
        await self._runner.cleanup()
        await self._session.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, function: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
        """Call on the loop's thread, which alone touches the endpoint."""
        if threading.current_thread() is self._thread:
            return function(*args, **named)

        async def call() -> R:
            return function(*args, **named)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _notify(self, job: Job) -> None:
        if job.asked.webhook is not None:
            task = self._loop.create_task(self._call_webhook(job.asked.webhook, job.told()))
            self._webhooks.add(task)
            task.add_done_callback(self._webhooks.discard)

    async def _call_webhook(self, url: str, body: bytes) -> None:
        for attempt in range(self.limits.webhook_attempts):
            if attempt:
                await asyncio.sleep(self.limits.webhook_pause_s)
            try:
                async with self._session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError) as error:
                _log.info("the webhook %s could not be called: %s", url, error)
        _log.warning("the webhook %s was not taken in %d attempts", url, self.limits.webhook_attempts)


def _may_stay(name: str) -> bool:
    return not name.startswith("RUNPOD_")


def _without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """This machine is not behind a proxy."""
    return {name: ",".join(filter(None, [environment.get(name), HOST])) for name in ("NO_PROXY", "no_proxy")}
