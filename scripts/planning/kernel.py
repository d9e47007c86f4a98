"""The simulation's loop: jobs arrive, wait in one queue, share workers, and workers come and go.

Compiled, so that millions of jobs take seconds; without numba (which librosa brings along) the same lines run as
plain Python, a hundred times slower. Whatever needs no loop over jobs is in simulation.py.

A worker with k jobs gives each of them rates[k] / k characters per second. That is kept as one number per worker, the
characters that any job which stayed there would have got (`given`): a job is done when it reaches what it was when
the job came plus the job's length, and nothing has to be touched in between.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Event = tuple[float, int, int, int]
"""When, what, which worker, and that worker's version when it was foreseen: a later change makes it void."""

DONE, READY, IDLE_OUT = 0, 1, 2
OFF, STARTING, RUNNING = 0, 1, 2
NOBODY = -1


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function as machine code, kept on disk for the next process."""
    try:
        import numba  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return function
    return cast("Callable[P, R]", numba.njit(cache=True)(function))


class Rule(NamedTuple):
    """How a fleet scales; seconds where it says so.

    Args:
        workers_min: always running, from the beginning on.
        workers_max: never more than these.
        by_requests: 1 for RunPod's request count, 0 for its queue delay.
        scaler_value: jobs for one worker, or the seconds a job may wait before there are more workers.
        check_s: how often it is looked at.
        start_s: from asking for a worker until it takes jobs.
        revive_s: the same where one stopped at most `revivable_s` ago (FlashBoot); where that is 0, never.
        idle_s: how long a worker without jobs stays.
    """

    workers_min: int
    workers_max: int
    by_requests: int
    scaler_value: float
    check_s: float
    start_s: float
    revive_s: float
    revivable_s: float
    idle_s: float


class Fleet(NamedTuple):
    """All workers: one place in each array per worker that may ever run at once."""

    status: Ints
    version: Ints
    jobs: Ints  # how many it has
    given: Floats  # characters that each job would have got
    updated: Floats  # when that was true
    due: Floats  # (workers, concurrency): what `given` is when the job is done
    job: Ints  # (workers, concurrency)
    busy_s: Floats
    idle_s: Floats
    starting_s: Floats
    after: Ints  # of the same number of jobs, the next worker
    before: Ints
    first: Ints  # by number of jobs: the worker that came to it last
    free: Ints  # workers that are off, the last to stop at the end
    stopped: Floats  # when they stopped
    num: Ints  # [off, running, starting]


@compiled
def new_fleet(rule: Rule, concurrency: int) -> Fleet:
    size = rule.workers_max
    fleet = Fleet(
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.zeros(size),
        np.zeros(size),
        np.zeros((size, concurrency)),
        np.zeros((size, concurrency), np.int64),
        np.zeros(size),
        np.zeros(size),
        np.zeros(size),
        np.full(size, NOBODY, np.int64),
        np.full(size, NOBODY, np.int64),
        np.full(concurrency + 1, NOBODY, np.int64),
        np.arange(size, 0, -1) - 1,
        np.full(size, -np.inf),
        np.zeros(3, np.int64),
    )
    fleet.num[0] = size
    for _ in range(rule.workers_min):
        worker = take_off(fleet)
        fleet.status[worker] = RUNNING
        fleet.num[1] += 1
        link(fleet, worker)
    return fleet


@compiled
def take_off(fleet: Fleet) -> int:
    """The worker that stopped last, no longer among those that are off."""
    fleet.num[0] -= 1
    return int(fleet.free[fleet.num[0]])


@compiled
def link(fleet: Fleet, worker: int) -> None:
    """Put a worker among those with as many jobs."""
    level = fleet.jobs[worker]
    old = fleet.first[level]
    fleet.after[worker], fleet.before[worker] = old, NOBODY
    if old != NOBODY:
        fleet.before[old] = worker
    fleet.first[level] = worker


@compiled
def unlink(fleet: Fleet, worker: int) -> None:
    behind, ahead = fleet.after[worker], fleet.before[worker]
    if behind != NOBODY:
        fleet.before[behind] = ahead
    if ahead != NOBODY:
        fleet.after[ahead] = behind
    else:
        fleet.first[fleet.jobs[worker]] = behind


@compiled
def bring_up_to_date(fleet: Fleet, worker: int, now: float, rates: Floats) -> None:
    """Count what happened at a worker since it was last looked at."""
    passed = now - fleet.updated[worker]
    jobs = fleet.jobs[worker]
    if jobs > 0:
        fleet.given[worker] += passed * rates[jobs] / jobs
        fleet.busy_s[worker] += passed
    else:
        fleet.idle_s[worker] += passed
    fleet.updated[worker] = now


@compiled
def foresee(fleet: Fleet, worker: int, rule: Rule, rates: Floats, events: list[Event]) -> None:
    """What happens next at a worker that has just changed: its first job is done, or it has been idle long enough."""
    fleet.version[worker] += 1
    now, jobs = fleet.updated[worker], fleet.jobs[worker]
    if jobs > 0:
        left = np.inf
        for place in range(jobs):
            left = min(left, fleet.due[worker, place] - fleet.given[worker])
        when = now + max(left, 0.0) * jobs / rates[jobs]
        heapq.heappush(events, (when, DONE, worker, fleet.version[worker]))
    elif worker >= rule.workers_min:
        heapq.heappush(events, (now + rule.idle_s, IDLE_OUT, worker, fleet.version[worker]))


@compiled
def least_loaded(fleet: Fleet, concurrency: int) -> int:
    """A worker with the fewest jobs, of those the one that came to that number last; NOBODY where all are full."""
    for level in range(concurrency):
        if fleet.first[level] != NOBODY:
            return int(fleet.first[level])
    return NOBODY


@compiled
def give(fleet: Fleet, worker: int, job: int, length: float, now: float, rates: Floats) -> None:
    """A job goes to a worker."""
    bring_up_to_date(fleet, worker, now, rates)
    unlink(fleet, worker)
    place = fleet.jobs[worker]
    fleet.due[worker, place] = fleet.given[worker] + length
    fleet.job[worker, place] = job
    fleet.jobs[worker] = place + 1
    link(fleet, worker)


@compiled
def finish(fleet: Fleet, worker: int, now: float, rates: Floats) -> int:
    """The job that is nearest its end leaves its worker; returns which."""
    bring_up_to_date(fleet, worker, now, rates)
    unlink(fleet, worker)
    last = fleet.jobs[worker] - 1
    place = 0
    for each in range(last + 1):
        if fleet.due[worker, each] < fleet.due[worker, place]:
            place = each
    job = fleet.job[worker, place]
    fleet.due[worker, place], fleet.job[worker, place] = fleet.due[worker, last], fleet.job[worker, last]
    fleet.jobs[worker] = last
    if last == 0:
        fleet.given[worker] = 0.0  # small numbers stay exact
    link(fleet, worker)
    return int(job)


@compiled
def start_worker(fleet: Fleet, rule: Rule, now: float, events: list[Event]) -> None:
    worker = take_off(fleet)
    is_revived = rule.revivable_s > 0 and now - fleet.stopped[worker] <= rule.revivable_s
    seconds = rule.revive_s if is_revived else rule.start_s
    fleet.status[worker] = STARTING
    fleet.num[2] += 1
    fleet.version[worker] += 1
    fleet.starting_s[worker] += seconds
    heapq.heappush(events, (now + seconds, READY, worker, fleet.version[worker]))


@compiled
def stop_worker(fleet: Fleet, worker: int, now: float, rates: Floats) -> None:
    bring_up_to_date(fleet, worker, now, rates)
    unlink(fleet, worker)
    fleet.status[worker] = OFF
    fleet.stopped[worker] = now
    fleet.free[fleet.num[0]] = worker
    fleet.num[0] += 1
    fleet.num[1] -= 1


@compiled
def welcome(fleet: Fleet, worker: int, now: float, rule: Rule, rates: Floats, events: list[Event]) -> None:
    """A worker that was starting is ready."""
    fleet.status[worker] = RUNNING
    fleet.num[2] -= 1
    fleet.num[1] += 1
    fleet.updated[worker] = now
    link(fleet, worker)
    foresee(fleet, worker, rule, rates, events)


@compiled
def workers_wanted(fleet: Fleet, rule: Rule, concurrency: int, waiting: int, overdue: int, in_progress: int) -> int:
    """How many more workers the scaler asks for."""
    if rule.by_requests:
        wanted = np.ceil((waiting + in_progress) / rule.scaler_value) - fleet.num[1] - fleet.num[2]
    else:
        wanted = np.ceil(overdue / concurrency) - fleet.num[2]
    return max(0, min(int(wanted), fleet.num[0]))


@compiled
def is_more_now(events: list[Event], now: float, next_arrival: float) -> bool:
    """Whether at this very moment another job is done or comes, or another worker is ready."""
    return next_arrival == now or (len(events) > 0 and events[0][0] == now and events[0][1] != IDLE_OUT)


@compiled
def run(arrivals: Floats, lengths: Floats, rates: Floats, rule: Rule, starts: Floats, ends: Floats) -> tuple[Any, Any]:
    """Simulate until every job is done and every worker that may stop has stopped.

    What happens at the same moment happens in this order: jobs are done, workers are ready, jobs come; then jobs are
    given out, to all those workers; then workers that have been idle for long enough stop, and then the scaler looks.

    Args:
        arrivals: (jobs,) in order, seconds.
        lengths: (jobs,) characters.
        rates: (concurrency + 1,) characters per second of a worker with so many jobs.
        starts, ends: (jobs,) filled: when each job was taken, and when it was done.

    Returns:
        The fleet, and its size over time: (seconds, running, starting) at each change.
    """
    concurrency, num_jobs = len(rates) - 1, len(arrivals)
    fleet = new_fleet(rule, concurrency)
    events = [(0.0, DONE, 0, -1)]  # void: it tells the compiler what is in the list
    sizes = [(0.0, rule.workers_min, 0)]
    arrived, taken, done, late = 0, 0, 0, 0  # jobs are numbered as they come, and the queue is first in, first out
    next_check = np.inf
    while True:
        next_event = events[0][0] if len(events) > 0 else np.inf
        next_arrival = arrivals[arrived] if arrived < num_jobs else np.inf
        now = min(next_event, next_arrival, next_check)
        if now == np.inf:
            break
        if next_event == now and not (events[0][1] == IDLE_OUT and next_arrival == now):
            _, what, worker, version = heapq.heappop(events)
            if version != fleet.version[worker]:
                pass  # something else happened there since
            elif what == DONE:
                ends[finish(fleet, worker, now, rates)] = now
                done += 1
                foresee(fleet, worker, rule, rates, events)
            elif what == READY:
                welcome(fleet, worker, now, rule, rates, events)
                sizes.append((now, fleet.num[1], fleet.num[2]))
            else:
                stop_worker(fleet, worker, now, rates)
                sizes.append((now, fleet.num[1], fleet.num[2]))
        elif next_arrival == now:
            arrived += 1
            next_arrival = arrivals[arrived] if arrived < num_jobs else np.inf
        else:
            next_check = np.inf
            late = max(late, taken)
            while late < arrived and arrivals[late] <= now - rule.scaler_value:
                late += 1
            overdue = 0 if rule.by_requests else late - taken
            more = workers_wanted(fleet, rule, concurrency, arrived - taken, overdue, taken - done)
            for _ in range(more):
                start_worker(fleet, rule, now, events)
            if more > 0:
                sizes.append((now, fleet.num[1], fleet.num[2]))
        if is_more_now(events, now, next_arrival):
            continue
        while taken < arrived:
            worker = least_loaded(fleet, concurrency)
            if worker == NOBODY:
                break
            give(fleet, worker, taken, lengths[taken], now, rates)
            foresee(fleet, worker, rule, rates, events)
            starts[taken] = now
            taken += 1
        if next_check == np.inf and (taken < arrived or (rule.by_requests and done < arrived)):
            next_check = (np.floor(now / rule.check_s) + 1.0) * rule.check_s
    return fleet, sizes
