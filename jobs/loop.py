"""A worker on the platform: the SDK's loop takes jobs, ours answers them, and nothing of it is lost on the way.

Order of a start: the model is ready and the machine found fit before the first job is asked for. Order of an end, be it
a signal, a result that asks for it or a device that failed: no more jobs are asked for, those that run are finished and
their results delivered. (The SDK's open request for jobs is not taken back: what it brings in that moment is refused by
a device that failed, and else left for the platform to give to another worker, when this one's pings end.)
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs import logs
from jobs.outbox import Outbox
from jobs.settings import Settings, SettingsError
from jobs.worker import BrokenWorker, Worker

_PROGRESS_EVERY_S = 5.0

_log = logging.getLogger(__name__)


def check_servable(settings: Settings, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what the SDK cannot serve.

    Raises:
        SettingsError: for STREAMING on the real-time API (RUNPOD_REALTIME_PORT), which cannot run generators: every
            request would fail.
    """
    if settings.streaming and environment.get("RUNPOD_REALTIME_PORT"):
        raise SettingsError("STREAMING cannot be on with RUNPOD_REALTIME_PORT: that API gives whole results only")


def serve(settings: Settings) -> None:
    """Load the model, then take jobs through the SDK until it returns.

    Raises:
        SettingsError: see `check_servable`.
    """
    check_servable(settings)
    faulthandler.enable()  # where native code fails, the log says what Python was doing
    config: dict[str, Any] = {"concurrency_modifier": lambda _current: settings.max_concurrency}
    with contextlib.ExitStack() as closing:
        outbox = closing.enter_context(Outbox(os.environ))
        os.environ.update(outbox.environment)
        with ThreadPoolExecutor(1, "import") as beside:  # a second, most of it waiting, while the weights load
            importing = beside.submit(_import_runpod, settings.log_level)
            worker = _load_worker(settings, _Replacement(config).ask)
            closing.callback(worker.close)
            runpod = importing.result()
        for check in worker.fitness_checks():
            runpod.serverless.register_fitness_check(check)
        config["handler"] = worker.stream if settings.streaming else _handler(worker, runpod, outbox)
        if settings.streaming and isinstance(worker, BrokenWorker):
            config["refresh_worker"] = True  # which no piece of a stream can ask for
        runpod.serverless.start(config)


def _load_worker(settings: Settings, on_lost: Callable[[bool], None]) -> Worker | BrokenWorker:
    if settings.unused:
        _log.warning("set, and not used by this version: %s", ", ".join(settings.unused))
    with logs.before_jobs():
        try:
            return Worker.load(settings, on_lost=on_lost)
        except Exception as error:
            return BrokenWorker(error)


def _import_runpod(level: str) -> Any:
    """Import the SDK with its logger tamed: at its default level, DEBUG, it prints whole outputs."""
    sdk_levels = {"DEBUG": "INFO", "INFO": "INFO", "WARNING": "WARN"}
    os.environ["RUNPOD_LOG_LEVEL"] = sdk_levels.get(level, "ERROR")
    import runpod

    return runpod


def _handler(worker: Worker | BrokenWorker, runpod: Any, outbox: Outbox) -> Callable[[dict[str, Any]], Any]:
    sends_progress = bool(os.environ.get("RUNPOD_WEBHOOK_POST_OUTPUT"))

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        outbox.begin(str(job.get("id")))
        with ProgressUpdates(lambda figures: runpod.serverless.progress_update(job, figures)) as updates:
            return await worker.run(job, updates.report if sends_progress else lambda _figures: None)

    return handler


class _Replacement:
    """Has this process replaced when its device failed: at once it takes no more jobs, and the last result of those
    that run asks the platform for a fresh worker. (Asked for with an earlier one, the platform would stop the rest.)

    Args:
        config: what the SDK runs with, and looks at after each job.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._is_ending = False

    def ask(self, is_last: bool) -> None:
        """A job has ended.

        Args:
            is_last: whether no other runs.
        """
        if is_last:
            self._config["refresh_worker"] = True
        if not self._is_ending:
            self._is_ending = True
            _log.error("this worker takes no more jobs and is to be replaced")
            signal.raise_signal(signal.SIGTERM)  # the SDK's word for it


class ProgressUpdates:
    """How far a job is, sent now and then while it runs.

    The SDK sends each update in a thread of its own: so the first waits too, jobs that are soon done send none, and
    nothing is sent at the very end.

    Args:
        send: hands figures to the platform.
        clock: gives seconds.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._send, self._clock = send, clock
        self._sent_s = clock()
        self._is_over = False

    def report(self, figures: dict[str, Any]) -> None:
        """Send figures, if it is time to."""
        now_s = self._clock()
        is_done = figures["chunks_done"] >= figures["chunks"]
        if not (self._is_over or is_done) and now_s - self._sent_s >= _PROGRESS_EVERY_S:
            self._sent_s = now_s
            self._send(figures)

    def __enter__(self) -> ProgressUpdates:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
