"""The queue of an endpoint: who has which job, and how each ends. On one event loop, without HTTP or processes.

A job ends once. A worker's answer counts whoever else has the job meanwhile; a repeated one is taken as the same, and
one that differs from the first is noted and left aside.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from scripts.local_platform.jobs import MAY_BE_RETRIED, Asked, Job, Refused, Status, as_json, members
from scripts.local_platform.limits import Limits
from scripts.local_platform.pulse import Pulse
from scripts.local_platform.spool import Spool

_MAX_CONFLICTS = 1000

_log = logging.getLogger(__name__)


class Worker:
    """A worker as the endpoint knows it.

    Args:
        pod_id: its name, of its own for every process.
        is_watched: whether somebody says when it ends; otherwise its pings have to.
    """

    def __init__(self, pod_id: str, *, is_watched: bool) -> None:
        self.pod_id, self.is_watched = pod_id, is_watched
        self.jobs: dict[str, Job] = {}
        self.to_stop: dict[str, None] = {}  # ids of jobs, in order
        self.is_ready = self.is_draining = False
        self.changed = Pulse()
        self.silence: asyncio.TimerHandle | None = None


class Endpoint:
    """The queue and its workers. Every call comes from the event loop that it was made on.

    Args:
        limits: what it allows.
        on_end: told of each job that ends.
        on_stop_pod: told of a worker that asks for a fresh one in its place.
    """

    def __init__(self, limits: Limits, *, on_end: Callable[[Job], None], on_stop_pod: Callable[[Worker], None]) -> None:
        self.limits = limits
        self.workers: dict[str, Worker] = {}
        self.conflicts: collections.deque[str] = collections.deque(maxlen=_MAX_CONFLICTS)
        self._on_end, self._on_stop_pod = on_end, on_stop_pod
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[str, Job] = {}
        self._queue: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._counts: collections.Counter[str] = collections.Counter()
        self._spool = Spool()
        self._changed = Pulse()

    # ------------------------------------------------------------------------------ a client's side

    def submit(self, body: bytes, *, is_sync: bool) -> Job:
        """Queue a job.

        Raises:
            Refused: 400, 413, 429.
        """
        most = self._most_bytes(is_sync)
        if len(body) > most:
            raise Refused(413, f"the request is {len(body) / 1e6:.1f} MB, and at most {most / 1e6:g} MB are taken")
        asked = Asked.parse(body, self.limits)
        room = max(self.limits.queued_anyway, self.limits.queued_per_worker * max(1, len(self.workers)))
        if len(self._queue) >= room:
            raise Refused(429, f"{room} jobs are waiting already", retry_after_s=1.0)
        job_id = ("sync-" if is_sync else "") + f"{uuid.uuid4()}-u1"
        request = self._spool.keep(as_json({**asked.fields, "id": job_id}))
        job = Job(job_id, dataclasses.replace(asked, fields={}), is_sync, request)
        self._jobs[job_id] = job
        self._enqueue(job)
        self._set_timer(job, "ttl", asked.ttl_s, self._outlive)
        return job

    def find(self, job_id: str) -> Job:
        """A job that is still known.

        Raises:
            Refused: 404.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise Refused(404, f"there is no job {job_id}, or its result has expired")
        return job

    def cancel(self, job: Job) -> None:
        """End a job that has not ended."""
        if not job.is_over:
            self._tell_to_stop(job)
            self._end(job, Status.CANCELLED, {})

    def retry(self, job: Job) -> None:
        """Queue a job again that failed.

        Raises:
            Refused: 400.
        """
        if job.status not in MAY_BE_RETRIED:
            raise Refused(400, f"a job that is {job.status} cannot be retried, only one that failed or timed out")
        self._stop_timers(job)
        job.forget_run()
        job.losses = 0
        job.queued_s = time.monotonic()
        self._counts["retried"] += 1
        self._enqueue(job)
        self._set_timer(job, "ttl", job.asked.ttl_s, self._outlive)

    def purge(self) -> int:
        """Cancel all that waits; how many those were."""
        waiting = list(self._queue.values())
        for job in waiting:
            self._end(job, Status.CANCELLED, {})
        return len(waiting)

    def health(self) -> dict[str, dict[str, int]]:
        """How many jobs and workers are in which state."""
        running = sum(bool(worker.jobs) for worker in self.workers.values())
        ready = sum(worker.is_ready for worker in self.workers.values())
        return {
            "jobs": {
                "completed": self._counts[Status.COMPLETED],
                "failed": self._counts[Status.FAILED] + self._counts[Status.TIMED_OUT],
                "inProgress": sum(len(worker.jobs) for worker in self.workers.values()),
                "inQueue": len(self._queue),
                "retried": self._counts["retried"],
            },
            "workers": {
                "idle": ready - running,
                "initializing": len(self.workers) - ready,
                "ready": ready,
                "running": running,
                "throttled": 0,
                "unhealthy": 0,
            },
        }

    async def next_pieces(self, job: Job) -> tuple[Status, list[bytes]]:
        """The job's status, and the pieces that nobody took yet; waits a little for one."""
        await job.changed.wait_for(lambda: bool(job.pieces) or job.is_over, self.limits.stream_hold_s)
        pieces = [piece.read() for piece in job.pieces]
        job.pieces.clear()
        return job.status, pieces

    # ------------------------------------------------------------------------------ a worker's side

    def add_worker(self, pod_id: str, *, is_watched: bool) -> None:
        """Expect a worker. One of a known name is left as it is."""
        self.workers.setdefault(pod_id, Worker(pod_id, is_watched=is_watched))

    def worker(self, pod_id: str) -> Worker:
        """An expected worker.

        Raises:
            Refused: 401.
        """
        worker = self.workers.get(pod_id)
        if worker is None:
            raise Refused(401, f"{pod_id} is no worker of this endpoint")
        return worker

    async def take(self, worker: Worker, num_wanted: int) -> list[bytes]:
        """Give a worker jobs as JSON; waits for the first."""
        worker.is_ready = True
        if not self._queue or worker.is_draining:
            await self._changed.wait_for(lambda: bool(self._queue) or worker.is_draining, self.limits.hold_s)
        if worker.is_draining:
            await asyncio.sleep(0.1)  # it will ask again before it notices that it is to end
            return []
        num_taken = min(num_wanted, len(self._queue))
        taken = [self._queue.popitem(last=False)[1] for _ in range(num_taken)]
        return [self._give(job, worker) for job in taken]

    async def take_stops(self, worker: Worker) -> list[str]:
        """Ids of jobs that a worker is to stop; waits for the first."""
        await worker.changed.wait_for(lambda: bool(worker.to_stop) or worker.is_draining, self.limits.hold_s)
        stops = list(worker.to_stop)
        worker.to_stop.clear()
        return stops

    def hear_ping(self, worker: Worker, listed: Iterable[str]) -> None:
        """Compare what a worker says it runs with what it was given."""
        self._listen(worker)
        now_s = time.monotonic()
        ids = set(listed)
        for job in list(worker.jobs.values()):
            if job.id in ids:
                job.listed_s = now_s
            elif now_s - job.listed_s > self.limits.lost_after_s:
                self._give_back(job, "dropped it")
        for job_id in ids - worker.jobs.keys():
            known = self._jobs.get(job_id)  # what it has just answered may be named once more
            if known is not None and known.status not in (Status.COMPLETED, Status.FAILED):
                self._stop(worker, job_id)

    def receive_piece(self, worker: Worker, job: Job, body: bytes) -> None:
        """Take a piece of a stream.

        Raises:
            Refused: 400, 413.
        """
        if len(body) > self.limits.piece_bytes:
            raise Refused(413, f"a piece of {len(body)} bytes, and at most {self.limits.piece_bytes} are taken")
        _decoded(body)
        if job.worker is worker and not job.is_over:
            job.pieces.append(self._spool.keep(body))
            job.changed.beat()

    def receive_result(self, worker: Worker, job: Job, body: bytes) -> None:
        """Take what a worker ended a job with, or how far it is.

        Raises:
            Refused: 400, 413.
        """
        most = self._most_bytes(job.is_sync)
        if len(body) > most:
            raise Refused(413, f"the result is {len(body) / 1e6:.1f} MB, and at most {most / 1e6:g} MB are taken")
        result = _decoded(body)
        if result.get("status") == Status.IN_PROGRESS:
            if job.worker is worker and not job.is_over:
                job.progress = result.get("output")
                job.changed.beat()
            return
        if result.pop("stopPod", False):
            self._replace(worker)
        self._accept(worker, job, result, hashlib.sha256(body).digest())

    def drain(self, worker: Worker) -> None:
        """Give a worker no more jobs, so that it can end."""
        worker.is_draining = True
        worker.changed.beat()
        self._changed.beat()

    def stop_all(self) -> None:
        """End every job: nobody will ask for a result."""
        self.purge()
        for worker in self.workers.values():
            for job in list(worker.jobs.values()):
                self.cancel(job)

    def lose(self, pod_id: str) -> None:
        """A worker is gone: its jobs go to others."""
        worker = self.workers.pop(pod_id)
        if worker.silence is not None:
            worker.silence.cancel()
        self._lose_jobs(worker)

    # ------------------------------------------------------------------------------ a job's way

    def _enqueue(self, job: Job, *, first: bool = False) -> None:
        job.status = Status.IN_QUEUE
        self._queue[job.id] = job
        if first:
            self._queue.move_to_end(job.id, last=False)
        job.changed.beat()
        self._changed.beat()

    def _give(self, job: Job, worker: Worker) -> bytes:
        job.status, job.worker = Status.IN_PROGRESS, worker
        job.taken_s = job.listed_s = time.monotonic()
        worker.jobs[job.id] = job
        self._listen(worker)
        self._set_timer(job, "execution", job.asked.execution_timeout_s, self._run_out)
        job.changed.beat()
        assert job.request is not None, job.id
        return job.request.read()

    def _accept(self, worker: Worker, job: Job, result: Mapping[str, Any], digest: bytes) -> None:
        if job.is_over:
            if job.digest is not None and job.digest != digest:
                self.conflicts.append(job.id)
                _log.warning("worker %s answered job %s again, and differently", worker.pod_id, job.id)
            return
        if job.worker is not None and job.worker is not worker:  # given to another when this one seemed lost
            self._tell_to_stop(job)
        job.digest = digest
        told = {name: result[name] for name in ("output", "error") if result.get(name) is not None}
        self._end(job, Status.FAILED if result.get("error") else Status.COMPLETED, told)

    def _end(self, job: Job, status: Status, told: Mapping[str, Any]) -> None:
        self._queue.pop(job.id, None)
        if job.worker is not None:
            job.worker.jobs.pop(job.id, None)
        job.status, job.ended_s, job.progress = status, time.monotonic(), None
        job.answer = self._spool.keep(members(told)) if told else None
        if status not in MAY_BE_RETRIED:
            job.request = None
        self._counts[status] += 1
        self._stop_timers(job)
        self._set_timer(job, "expiry", self.limits.kept_sync_s if job.is_sync else self.limits.kept_s, self._forget)
        job.changed.beat()
        self._on_end(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)

    def _outlive(self, job: Job) -> None:
        self._tell_to_stop(job)
        message = f"the job's time to live ({job.asked.ttl_s:g} s) was over before it was done"
        self._end(job, Status.TIMED_OUT, {"error": message})

    def _run_out(self, job: Job) -> None:
        self._tell_to_stop(job)
        message = f"the job ran for longer than its execution timeout ({job.asked.execution_timeout_s:g} s)"
        self._end(job, Status.TIMED_OUT, {"error": message})

    def _give_back(self, job: Job, why: str) -> None:
        worker = job.worker
        assert worker is not None, job.id
        worker.jobs.pop(job.id, None)
        self._stop_timer(job, "execution")
        job.losses += not worker.is_draining
        _log.warning("job %s goes back into the queue: worker %s %s", job.id, worker.pod_id, why)
        if job.losses >= self.limits.max_losses:
            message = f"the job lost its worker {job.losses} times; the last, {worker.pod_id}, {why}"
            self._end(job, Status.FAILED, {"error": message})
            return
        job.forget_run()
        self._counts["retried"] += 1
        self._enqueue(job, first=True)

    def _lose_jobs(self, worker: Worker) -> None:
        for job in reversed(list(worker.jobs.values())):  # each goes to the front
            self._give_back(job, "is gone")

    # ------------------------------------------------------------------------------ a worker's way

    def _listen(self, worker: Worker) -> None:
        """Wait again for a sign of life, if nobody watches this worker."""
        if worker.is_watched:
            return
        if worker.silence is not None:
            worker.silence.cancel()
        worker.silence = self._loop.call_later(self.limits.silent_after_s, self._lose_jobs, worker)

    def _replace(self, worker: Worker) -> None:
        if worker.is_watched and not worker.is_draining:
            self.drain(worker)
            self._on_stop_pod(worker)

    def _tell_to_stop(self, job: Job) -> None:
        if job.worker is not None and job.id in job.worker.jobs:
            self._stop(job.worker, job.id)

    @staticmethod
    def _stop(worker: Worker, job_id: str) -> None:
        worker.to_stop[job_id] = None
        worker.changed.beat()

    # ------------------------------------------------------------------------------

    def _most_bytes(self, is_sync: bool) -> int:
        return self.limits.runsync_bytes if is_sync else self.limits.run_bytes

    def _set_timer(self, job: Job, name: str, seconds: float, action: Callable[[Job], None]) -> None:
        self._stop_timer(job, name)
        job.timers[name] = self._loop.call_later(seconds, action, job)

    @staticmethod
    def _stop_timer(job: Job, name: str) -> None:
        timer = job.timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _stop_timers(self, job: Job) -> None:
        for name in list(job.timers):
            self._stop_timer(job, name)


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Refused(400, f"what a worker posts has to be JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "what a worker posts has to be a JSON object")
    return value
