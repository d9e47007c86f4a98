"""The fewest workers that are enough, found by simulating fleets."""

from __future__ import annotations

import math
from collections.abc import Callable

from scripts.planning.arrivals import Load
from scripts.planning.kernel import Floats, Rule
from scripts.planning.prices import PlanError
from scripts.planning.simulation import Outcome, simulate

MOST_WORKERS = 1_000_000
SAMPLE_JOBS = 200_000
"""With so many jobs of a long load a size is looked for; all of them then have to confirm it."""
HEADROOM = 1.2
"""Of a fleet that scales, above what is enough always on, as RunPod advises."""


def fewest(is_enough: Callable[[int], bool], at_least: int, at_most: int) -> int:
    """The smallest number from `at_least` on that is enough, where more are never worse.

    Raises:
        PlanError: when `at_most` are not enough.
    """
    low, high = at_least - 1, at_least
    while high > at_most or not is_enough(high):
        if high >= at_most:
            raise PlanError(f"not even {at_most:,} workers are enough")
        low, high = high, min(at_most, high + max(1, 2 * (high - low)))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def size_for_deadline(load: Load, rates: Floats, rule: Rule, deadline_s: float) -> tuple[Rule, Outcome]:
    """Workers for a heap of text that must be done in time, and the run that shows that they are enough.

    Between the rule's `workers_min` and its `workers_max`, where that is not 0.

    Raises:
        PlanError: when no number of workers is, or none that is allowed.
    """
    longest_s = float(load.characters.max() / rates[1])
    if not rule.workers_min and rule.start_s + longest_s > deadline_s:
        raise PlanError(
            f"not even a worker for each job is done in {deadline_s:g} s: starting takes {rule.start_s:.0f} s and the "
            f"longest job alone {longest_s:.0f} s. Give it more time, or shorter jobs with --job-characters"
        )

    def run(size: int) -> Outcome:
        return simulate(load, rates, rule._replace(workers_max=size))

    if rule.workers_max and (finished_s := run(rule.workers_max).finished_s) > deadline_s:
        raise PlanError(
            f"with --workers-max {rule.workers_max} all is done after {finished_s:,.0f} s, not in {deadline_s:,.0f} s"
        )
    most = rule.workers_max or max(rule.workers_min, min(MOST_WORKERS, len(load.arrivals)))
    at_least = max(1, rule.workers_min, math.ceil(load.total_characters / (float(rates.max()) * deadline_s)))
    size = fewest(lambda size: run(size).finished_s <= deadline_s, min(at_least, most), most)
    return rule._replace(workers_max=size), run(size)


def size_for_waiting(load: Load, rates: Floats, rule: Rule, wait_p99_s: float) -> tuple[Rule, Outcome]:
    """Workers that always run, so that of a hundred jobs 99 are taken in time, and the run that shows it.

    Of a load that goes on, more than it keeps busy: with fewer the queue only grows, and waits are short for no longer
    than the run.

    Raises:
        PlanError: when that takes too many workers.
    """

    def always_on(size: int) -> Rule:
        return rule._replace(workers_min=size, workers_max=size)

    sample = _beginning(load, SAMPLE_JOBS)
    at_least = math.floor(load.characters_per_s / float(rates[-1])) + 1 if load.goes_on else 1
    size = fewest(
        lambda size: simulate(sample, rates, always_on(size)).wait_s(99) <= wait_p99_s, at_least, MOST_WORKERS
    )
    while (outcome := simulate(load, rates, always_on(size))).wait_s(99) > wait_p99_s:
        size += max(1, size // 100)
    return always_on(size), outcome


def _beginning(load: Load, count: int) -> Load:
    if len(load.arrivals) <= count:
        return load
    return Load(load.arrivals[:count], load.characters[:count], float(load.arrivals[count - 1]))


def with_headroom(workers: int) -> int:
    return math.ceil(HEADROOM * workers)
