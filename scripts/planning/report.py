"""What comes out: JSON for machines, tables for people, and every assumption in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.console import say, table
from scripts.planning.kernel import Rule
from scripts.planning.prices import SECONDS_PER_HOUR, Kind, Prices
from scripts.planning.simulation import PERCENTILES, Outcome
from scripts.planning.speeds import Speed

MILLION = 1e6
MOST_POINTS = 400
"""Of workers over time, in JSON."""


@dataclass(frozen=True)
class Plan:
    """One kind of worker, run in one way."""

    kind_name: str
    kind: Kind
    mode: str
    rule: Rule
    outcome: Outcome


def kind_row(name: str, kind: Kind, speed: Speed | None, concurrency: int, how: str) -> dict[str, Any]:
    """What a kind costs with as many jobs as it takes."""
    row: dict[str, Any] = {
        "kind": name,
        "memory_gb": kind.memory_gb,
        "vcpus": kind.vcpus,
        "measured": speed is not None,
    }
    if speed is None:
        return row | {"how_to_measure": how}
    chars_per_s = float(speed.rates(concurrency)[concurrency])
    paid = {
        "flex": kind.flex_per_s,
        "active": kind.always_on_per_s,
        "pod": None if kind.pod_per_hour is None else kind.pod_per_hour / SECONDS_PER_HOUR,
    }
    audio_s_per_s = chars_per_s / speed.spoken_chars_per_s
    return row | {
        "chars_per_s": chars_per_s,
        "real_time_factor": speed.real_time_factor(concurrency),
        "ready_s": speed.ready_s,
        "source": speed.source,
        "hours_per_million_characters": MILLION / chars_per_s / SECONDS_PER_HOUR,
        "usd_per_million_characters": {way: _times(price, MILLION / chars_per_s) for way, price in paid.items()},
        "usd_per_audio_hour": {way: _times(price, SECONDS_PER_HOUR / audio_s_per_s) for way, price in paid.items()},
    }


def _times(price: float | None, seconds: float) -> float | None:
    return None if price is None else price * seconds


def plan_row(plan: Plan, deadline_s: float | None) -> dict[str, Any]:
    outcome, rule = plan.outcome, plan.rule
    cost = outcome.cost(plan.kind)
    over_s = max(outcome.load.duration_s, outcome.finished_s)
    return {
        "kind": plan.kind_name,
        "mode": plan.mode,
        "workers_min": rule.workers_min,
        "workers_max": rule.workers_max,
        "most_workers": outcome.most_workers,
        "jobs": len(outcome.waits_s),
        "characters": outcome.load.total_characters,
        "wait_s": {f"p{each}": outcome.wait_s(each) for each in PERCENTILES},
        "total_s": {f"p{each}": outcome.total_s(each) for each in PERCENTILES},
        "finished_s": outcome.finished_s,
        "meets_deadline": None if deadline_s is None else outcome.finished_s <= deadline_s,
        "utilisation": outcome.utilisation,
        "starts": outcome.num_starts,
        "paid_s": {
            "active": vars(outcome.active) | {"total": outcome.active.total},
            "flex": vars(outcome.flex) | {"total": outcome.flex.total},
        },
        "usd": cost,
        "usd_per_hour": _times(cost, SECONDS_PER_HOUR / over_s),
        "usd_per_million_characters": _times(cost, MILLION / outcome.load.total_characters),
        "workers_over_time": workers_over_time(outcome),
    }


def workers_over_time(outcome: Outcome) -> list[dict[str, float]]:
    """At evenly spread moments: workers running and starting, jobs waiting."""
    end = max(outcome.load.duration_s, outcome.finished_s, float(outcome.sizes[-1, 0]))
    times = np.linspace(0.0, end, MOST_POINTS)
    place = np.searchsorted(outcome.sizes[:, 0], times, side="right") - 1
    rows = zip(times, outcome.sizes[place], outcome.queue(times), strict=True)
    return [
        {"s": round(float(s), 3), "running": int(size[1]), "starting": int(size[2]), "waiting": int(waiting)}
        for s, size, waiting in rows
    ]


# ------------------------------------------------------------------------------------------- tables


def print_kinds(rows: Sequence[Mapping[str, Any]], model: str, concurrency: int) -> None:
    columns = ("kind", "", "characters/s", "real-time factor", "$ per million characters", "$ per audio hour", "from")
    title = f"{model}: a worker of each kind, kept full ({concurrency} jobs at once)"
    table(title, columns, [_kind_cells(row) for row in rows])
    for how in dict.fromkeys(row["how_to_measure"] for row in rows if not row["measured"]):
        say(f"Not measured: {how}; or say --factor KIND=CHARACTERS_PER_SECOND")


def _kind_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    size = f"{row['memory_gb']:g} GB" if row["memory_gb"] else f"{row['vcpus']} vCPU" if row["vcpus"] else ""
    if not row["measured"]:
        return (row["kind"], size, "not measured", "", "", "", "")
    return (
        row["kind"],
        size,
        f"{row['chars_per_s']:.4g}",
        f"{row['real_time_factor']:.3g}",
        _prices(row["usd_per_million_characters"], f"no price ({row['hours_per_million_characters']:.3g} hours)"),
        _prices(row["usd_per_audio_hour"], "no price"),
        row["source"],
    )


def _prices(by_way: Mapping[str, float | None], otherwise: str) -> str:
    """One figure where all ways cost the same."""
    known = {way: f"{value:.4g}" for way, value in by_way.items() if value is not None}
    if not known:
        return otherwise
    if len(set(known.values())) == 1 and "flex" in known:
        return known["flex"]
    return ", ".join(f"{way} {value}" for way, value in known.items())


def print_plans(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    columns = ("kind", "workers", "at most", "waiting p50 · p90 · p99", "until done p50 · p99", "all done after")
    table(title, (*columns, "used", "starts", "$", "$/h", "$ per million characters"), [_plan_cells(r) for r in rows])


def _plan_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    wait, total = row["wait_s"], row["total_s"]
    size = (
        f"{row['workers_min']:,}" if row["mode"] == "always on" else f"{row['workers_min']:,} to {row['workers_max']:,}"
    )
    return (
        row["kind"],
        f"{row['mode']}: {size}",
        f"{row['most_workers']:,}",
        " · ".join(duration(wait[f"p{each}"]) for each in PERCENTILES),
        f"{duration(total['p50'])} · {duration(total['p99'])}",
        duration(row["finished_s"]),
        f"{row['utilisation']:.0%}",
        f"{row['starts']:,}",
        *("no price" if row[name] is None else f"{row[name]:,.4g}" for name in ("usd", "usd_per_hour")),
        "no price" if row["usd_per_million_characters"] is None else f"{row['usd_per_million_characters']:.4g}",
    )


def duration(seconds: float) -> str:
    """0.25 → "0.25 s", 5400 → "1.5 h"."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def print_assumptions(lines: Sequence[str]) -> None:
    say("Assumed:")
    for line in lines:
        say(f"  - {line}")


# -------------------------------------------------------------------------------------- assumptions


def assumptions_of_prices(prices: Prices) -> list[str]:
    return [
        f"Prices: {prices.source} ({prices.url}), read {prices.read}. They change; edit the table or say --price. "
        "Storage, network volumes and taxes are not in them",
        "Measured with random weights of full size: speed depends on shapes alone, but texts whose chunks have to be "
        "decoded again take longer",
    ]


def assumptions_of_speed(name: str, kind: Kind, speed: Speed, concurrency: int) -> list[str]:
    lines = []
    points = ", ".join(f"{jobs} at once {rate:.4g} characters/s" for jobs, rate in speed.points)
    if concurrency > max(jobs for jobs, _ in speed.points):
        lines.append(f"{name}: known is {points}; more jobs at once than that share the same speed and gain nothing")
    elif len(speed.points) > 1:
        lines.append(f"{name}: {points}; straight lines between them")
    if kind.vcpus is not None and "--factor" not in speed.source:
        lines.append(f"{name}: a vCPU of the rented machine is as fast as a core of the machine that was measured")
    return lines


def assumptions_of_simulation(rule: Rule, starts: Mapping[str, tuple[float, str]]) -> list[str]:
    if rule.by_requests:
        scaler = f"workers = (waiting + in progress) / {rule.scaler_value:g}, rounded up"
    else:
        scaler = f"for every full worker's worth of jobs waiting over {rule.scaler_value:g} s one more worker"
    flashboot = (
        f"FlashBoot: {rule.revive_s:g} s where a worker stopped within the last {rule.revivable_s:g} s"
        if rule.revivable_s
        else "FlashBoot brings nothing (--flashboot-start says otherwise)"
    )
    return [
        f"Scaler: {scaler}, looked at every {rule.check_s:g} s; a worker without jobs stops after {rule.idle_s:g} s",
        "Starting: " + "; ".join(f"{name} {seconds:.3g} s ({why})" for name, (seconds, why) in starts.items()),
        f"{flashboot}. There are always as many machines as asked for",
        "One queue, first in, first out; a job goes to the worker with the fewest jobs, of several to the one that "
        "came to that number last; a worker's jobs share its speed",
        "Starting, working and idle seconds are paid for; rounding up to whole seconds (under 1 s a start) is left out",
    ]
