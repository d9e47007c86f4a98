"""A fleet under a load: how long jobs wait, how many workers there are, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scripts.planning.arrivals import Load
from scripts.planning.kernel import RUNNING, Floats, Rule, run
from scripts.planning.prices import Kind

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Seconds:
    """What workers are paid for."""

    busy: float
    idle: float
    starting: float

    @property
    def total(self) -> float:
        return self.busy + self.idle + self.starting


@dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Args:
        waits_s: (jobs,) from a job's arrival until a worker takes it.
        totals_s: (jobs,) from its arrival until it is done.
        finished_s: when the last job was done.
        active: of the workers that always run; flex: of those that come and go.
        num_starts: how often a worker was started.
        sizes: (changes, 3) seconds, workers running, workers starting.
    """

    load: Load
    waits_s: Floats
    totals_s: Floats
    finished_s: float
    active: Seconds
    flex: Seconds
    num_starts: int
    sizes: Floats

    @property
    def utilisation(self) -> float:
        """Of the seconds that are paid for, the part in which a worker had jobs."""
        return (self.active.busy + self.flex.busy) / self.paid_s if self.paid_s else 0.0

    @property
    def paid_s(self) -> float:
        return self.active.total + self.flex.total

    @property
    def most_workers(self) -> int:
        return int((self.sizes[:, 1] + self.sizes[:, 2]).max())

    def wait_s(self, percentile: float) -> float:
        return float(np.percentile(self.waits_s, percentile))

    def total_s(self, percentile: float) -> float:
        return float(np.percentile(self.totals_s, percentile))

    def cost(self, kind: Kind) -> float | None:
        """US dollars; None where the kind has no price."""
        if kind.flex_per_s is None or kind.always_on_per_s is None:
            return None
        return self.active.total * kind.always_on_per_s + self.flex.total * kind.flex_per_s

    def queue(self, times: Floats) -> Floats:
        """Jobs that wait at given moments."""
        starts = self.load.arrivals + self.waits_s  # in order, as arrivals are: first in, first out
        arrived = np.searchsorted(self.load.arrivals, times, side="right")
        return (arrived - np.searchsorted(starts, times, side="right")).astype(np.float64)


def simulate(load: Load, rates: Floats, rule: Rule) -> Outcome:
    """Run a fleet through a load, from an empty queue to an empty queue.

    Workers that always run are paid for from the beginning until jobs no longer come and all are done.

    Args:
        rates: (concurrency + 1,) characters per second of a worker with so many jobs, 0 at first.
    """
    assert rule.workers_max >= max(1, rule.workers_min), rule
    assert len(rates) > 1 and rates[0] == 0 and (rates[1:] > 0).all(), rates
    assert np.isfinite(rule).all(), f"it would never end: {rule}"
    assert rule.check_s > 0 and rule.scaler_value > 0 and rule.start_s >= 0 and rule.idle_s >= 0, rule
    starts, ends = np.full(len(load.arrivals), np.nan), np.full(len(load.arrivals), np.nan)
    lengths = np.ascontiguousarray(load.characters)
    fleet, sizes = run(load.arrivals, lengths, np.asarray(rates), rule, starts, ends)
    finished_s = float(ends.max())
    remaining = np.maximum(max(load.duration_s, finished_s) - fleet.updated, 0.0)
    idle_s = fleet.idle_s + np.where(fleet.status == RUNNING, remaining, 0.0)
    always = slice(0, rule.workers_min)
    others = slice(rule.workers_min, None)
    history = np.array(sizes, dtype=np.float64)
    return Outcome(
        load=load,
        waits_s=starts - load.arrivals,
        totals_s=ends - load.arrivals,
        finished_s=finished_s,
        active=_seconds(fleet.busy_s[always], idle_s[always], fleet.starting_s[always]),
        flex=_seconds(fleet.busy_s[others], idle_s[others], fleet.starting_s[others]),
        num_starts=int(np.maximum(np.diff(history[:, 1] + history[:, 2], prepend=history[0, 1]), 0).sum()),
        sizes=history,
    )


def _seconds(busy: Floats, idle: Floats, starting: Floats) -> Seconds:
    return Seconds(float(busy.sum()), float(idle.sum()), float(starting.sum()))
