"""Which chunk gets the next free rows. Host-only: never imports torch, never sees a tensor.

Streams go before batch work, but every few turns a batch chunk goes first, so that neither starves.
Within a class, jobs take turns: the job that was served least goes next, and a job that arrives late
joins the round that is under way, so that neither a long job nor a crowd of short ones holds the rows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

_Job = TypeVar("_Job")

STREAM_TURNS = 4
"""Out of so many turns with both classes waiting, one is the batch's."""


@dataclass(frozen=True)
class Ticket:
    """A chunk that waits for rows.

    Args:
        job: id of its job.
        chunk: index within the job.
        num_rows: rows it takes (two with guidance).
    """

    job: int
    chunk: int
    num_rows: int = 1


@dataclass
class _Queue:
    tickets: deque[Ticket] = field(default_factory=deque)
    num_served: int = 0
    arrival: int = 0


class Scheduler:
    """Tickets in, one ticket at a time out. Not thread-safe: the engine's thread owns it."""

    def __init__(self) -> None:
        self._classes: dict[bool, dict[int, _Queue]] = {True: {}, False: {}}  # by is_stream
        self._num_arrived = 0
        self._num_turns = 0
        self._round = 0  # the most that a job was served

    def __len__(self) -> int:
        """How many chunks wait."""
        return sum(len(queue.tickets) for jobs in self._classes.values() for queue in jobs.values())

    def add(self, tickets: list[Ticket], *, is_stream: bool = False) -> None:
        """Queue chunks, each behind the others of its job."""
        for ticket in tickets:
            self._queue_of(ticket.job, is_stream).tickets.append(ticket)

    def put_back(self, ticket: Ticket, *, is_stream: bool = False) -> None:
        """Queue a chunk before the others of its job: one that is to be decoded again."""
        self._queue_of(ticket.job, is_stream).tickets.appendleft(ticket)

    def _queue_of(self, job: int, is_stream: bool) -> _Queue:
        jobs = self._classes[is_stream]
        if job not in jobs:
            self._num_arrived += 1
            # Behind the round that is being served: were it level with the least served, a crowd of
            # newcomers would always go before a job that was served once.
            jobs[job] = _Queue(num_served=self._round, arrival=self._num_arrived)
        return jobs[job]

    def next(self, num_free_rows: int) -> Ticket | None:
        """Take the ticket whose turn it is, or None when it does not fit.

        A ticket that needs more rows than are free is waited for, not overtaken: else chunks of one row
        would keep chunks of two from ever finding a pair.
        """
        is_stream = self._whose_turn()
        jobs = self._classes[is_stream]
        if not jobs:
            return None
        job, queue = min(jobs.items(), key=lambda item: (item[1].num_served, item[1].arrival))
        if queue.tickets[0].num_rows > num_free_rows:
            return None
        self._num_turns += 1
        queue.num_served += 1
        self._round = max(self._round, queue.num_served)
        ticket = queue.tickets.popleft()
        if not queue.tickets:
            del jobs[job]
        return ticket

    def _whose_turn(self) -> bool:
        streams, batch = self._classes[True], self._classes[False]
        if streams and batch:
            return self._num_turns % STREAM_TURNS != STREAM_TURNS - 1
        return bool(streams)

    def cancel(self, job: int) -> int:
        """Drop a job's waiting chunks; how many there were."""
        queues = [jobs.pop(job) for jobs in self._classes.values() if job in jobs]
        return sum(len(queue.tickets) for queue in queues)


def in_turns(ready: Sequence[tuple[_Job, int]]) -> list[tuple[_Job, int]]:
    """(job, pass) pairs in the order of serving: the first of every job, then the second of every job, and so on."""
    num_before: Counter[_Job] = Counter()
    rounds = []
    for job, _ in ready:
        rounds.append(num_before[job])
        num_before[job] += 1
    return [pair for _, pair in sorted(zip(rounds, ready, strict=True), key=lambda item: item[0])]
