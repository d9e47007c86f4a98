"""The scheduler's order: streams first, nobody starves, nothing is lost."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler import STREAM_TURNS, Scheduler, Ticket


def tickets(job: int, count: int, num_rows: int = 1) -> list[Ticket]:
    return [Ticket(job, chunk, num_rows) for chunk in range(count)]


def drain(scheduler: Scheduler, num_free_rows: int = 2) -> list[Ticket]:
    taken = []
    while (ticket := scheduler.next(num_free_rows)) is not None:
        taken.append(ticket)
    return taken


def test_never_imports_torch() -> None:
    program = "import sys, engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 2), st.integers(1, 9)), max_size=12))
def test_every_ticket_is_given_out_once_and_in_its_jobs_order(jobs: list[tuple[bool, int, int]]) -> None:
    scheduler = Scheduler()
    for job, (is_stream, num_rows, count) in enumerate(jobs):
        scheduler.add(tickets(job, count, num_rows), is_stream=is_stream)
    taken = drain(scheduler)
    assert len(scheduler) == 0
    for job, (_, _, count) in enumerate(jobs):
        assert [t.chunk for t in taken if t.job == job] == list(range(count))
    assert len(taken) == sum(count for _, _, count in jobs)


def test_jobs_take_turns() -> None:
    scheduler = Scheduler()
    scheduler.add(tickets(1, 4))
    scheduler.add(tickets(2, 4))
    assert [t.job for t in drain(scheduler)] == [1, 2, 1, 2, 1, 2, 1, 2]


def test_a_late_job_starts_level_with_a_long_one() -> None:
    scheduler = Scheduler()
    scheduler.add(tickets(1, 100))
    for _ in range(50):
        scheduler.next(1)
    scheduler.add(tickets(2, 50))
    order = [t.job for t in drain(scheduler)]
    assert order[:10].count(1) in (5, 6)


def test_a_crowd_of_short_jobs_does_not_starve_a_long_one() -> None:
    scheduler = Scheduler()
    scheduler.add(tickets(0, 20))
    served = 0
    for job in range(1, 200):
        scheduler.add(tickets(job, 1))
        ticket = scheduler.next(1)
        assert ticket is not None
        served += ticket.job == 0
    assert served >= 19, "the 20th turn may be the next"


def test_streams_go_first_but_batch_gets_its_share() -> None:
    scheduler = Scheduler()
    scheduler.add(tickets(1, 40))
    scheduler.add(tickets(2, 40), is_stream=True)
    order = [t.job for t in drain(scheduler)][: 5 * STREAM_TURNS]
    assert order[0] == 2
    assert order.count(1) == 5


def test_a_pair_is_waited_for_and_not_overtaken() -> None:
    scheduler = Scheduler()
    scheduler.add(tickets(1, 1, num_rows=2))
    scheduler.add(tickets(2, 1, num_rows=1))
    assert scheduler.next(1) is None
    assert scheduler.next(2) == Ticket(1, 0, 2)


def test_a_retry_goes_before_its_jobs_other_chunks() -> None:
    scheduler = Scheduler()
    scheduler.add(tickets(1, 3))
    first = scheduler.next(1)
    assert first is not None
    scheduler.put_back(first)
    assert [t.chunk for t in drain(scheduler)] == [0, 1, 2]


def test_cancelling_drops_a_jobs_tickets_and_no_others() -> None:
    scheduler = Scheduler()
    scheduler.add(tickets(1, 3))
    scheduler.add(tickets(2, 2), is_stream=True)
    assert scheduler.cancel(1) == 3
    assert scheduler.cancel(1) == 0
    assert [t.job for t in drain(scheduler)] == [2, 2]
