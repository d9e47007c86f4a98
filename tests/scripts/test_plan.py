"""scripts/plan.py: its simulation against queueing theory, its sizes against simulations, and as a program."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.planning.arrivals import Lengths, Load, batch, from_trace, parse_amount, parse_seconds, poisson
from scripts.planning.kernel import Floats, Rule
from scripts.planning.prices import Kind, PlanError, read_prices
from scripts.planning.report import kind_row
from scripts.planning.simulation import Outcome, simulate
from scripts.planning.sizing import fewest, size_for_deadline, size_for_waiting, with_headroom
from scripts.planning.speeds import Speed, parse_factors, read_measured

ROOT = Path(__file__).resolve().parents[2]
FLEX = Kind(flex_per_s=0.002, active_per_s=0.001, vcpus=2)
Done = subprocess.CompletedProcess[str]


def fixed(workers: int) -> Rule:
    """Workers that always run."""
    return scaled(workers, workers_min=workers)


def scaled(workers_max: int, **changes: Any) -> Rule:
    rule = Rule(0, workers_max, 0, 4.0, 1.0, start_s=20.0, revive_s=0.0, revivable_s=0.0, idle_s=5.0)
    return rule._replace(**changes)


def one_at_a_time(chars_per_s: float = 1.0) -> Floats:
    return np.array([0.0, chars_per_s])


def mean_wait(per_s: float, workers: int, lengths: Lengths, jobs: int = 400_000) -> float:
    """Of jobs that take a second on average."""
    load = poisson(per_s, 1.0, jobs / per_s, lengths, seed=1)
    return float(simulate(load, one_at_a_time(), fixed(workers)).waits_s.mean())


def erlang_c(load: float, workers: int) -> float:
    """The probability to wait, of M/M/c (Erlang, 1917)."""
    blocked = 1.0
    for count in range(1, workers + 1):  # Erlang B by its recursion
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / workers * (1 - blocked))


# ------------------------------------------------------------------------------- what theory knows


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_one_worker_makes_jobs_wait_as_m_m_1_does(busy: float) -> None:
    assert mean_wait(busy, 1, Lengths.EXPONENTIAL) == pytest.approx(busy / (1 - busy), rel=0.05)


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_equally_long_jobs_wait_as_m_d_1_does(busy: float) -> None:
    assert mean_wait(busy, 1, Lengths.FIXED) == pytest.approx(busy / (2 * (1 - busy)), rel=0.05)


@pytest.mark.parametrize(("per_s", "workers"), [(3.2, 4), (18.0, 20)])
def test_several_workers_make_jobs_wait_as_m_m_c_does(per_s: float, workers: int) -> None:
    expected = erlang_c(per_s, workers) / (workers - per_s)
    assert mean_wait(per_s, workers, Lengths.EXPONENTIAL) == pytest.approx(expected, rel=0.05)


def test_jobs_that_share_a_worker_take_as_long_as_in_processor_sharing() -> None:
    load = poisson(0.7, 1.0, 400_000, Lengths.FIXED, seed=2)
    rates = np.array([0.0, *([1.0] * 64)])
    outcome = simulate(load, rates, fixed(1))
    assert outcome.waits_s.max() == 0, "there is room for all"
    assert outcome.totals_s.mean() == pytest.approx(1 / (1 - 0.7), rel=0.05), "M/G/1-PS: whatever the lengths"


def test_a_worker_is_busy_for_as_much_of_the_time_as_it_is_given_work() -> None:
    load = poisson(2.4, 1.0, 100_000, Lengths.EXPONENTIAL, seed=3)
    assert simulate(load, one_at_a_time(), fixed(4)).utilisation == pytest.approx(0.6, rel=0.02)


# ---------------------------------------------------------------------------------- what is conserved


RULES = {
    "always on": fixed(6),
    "queue delay": scaled(20),
    "request count": scaled(20, by_requests=1, scaler_value=2.0),
    "flashboot": scaled(20, revive_s=1.0, revivable_s=60.0, idle_s=2.0),
    "some always on": scaled(20, workers_min=3),
    "too few": scaled(2),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param]


def bursts() -> Load:
    """Jobs that come in crowds with quiet in between, some at the very same moment."""
    generator = np.random.default_rng(4)
    starts = np.repeat(np.arange(12) * 90.0, 150)
    arrivals = np.sort(starts + np.floor(generator.uniform(0.0, 30.0, len(starts))))
    return Load(arrivals, generator.exponential(50.0, len(starts)) + 1.0, float(arrivals[-1]))


RATES = np.array([0.0, 30.0, 50.0, 60.0])


def test_every_job_is_served_once_and_in_turn(rule: Rule) -> None:
    load = bursts()
    outcome = simulate(load, RATES, rule)
    assert np.isfinite(outcome.totals_s).all() and (outcome.waits_s >= 0).all()
    assert (np.diff(load.arrivals + outcome.waits_s) >= 0).all(), "first in, first out"
    alone_s = load.characters / RATES[1]
    assert (outcome.totals_s - outcome.waits_s >= alone_s - 1e-6).all(), "no job is faster than alone"


def test_the_work_that_is_done_is_the_work_that_came(rule: Rule) -> None:
    """A worker with one job at a time is busy for exactly as long as its jobs take."""
    load = bursts()
    outcome = simulate(load, one_at_a_time(30.0), rule)
    assert outcome.active.busy + outcome.flex.busy == pytest.approx(load.total_characters / 30.0, rel=1e-9)


def test_the_cost_is_the_seconds_that_workers_were_there_at_their_price(rule: Rule) -> None:
    outcome = simulate(bursts(), RATES, rule)
    times, workers = outcome.sizes[:, 0], outcome.sizes[:, 1] + outcome.sizes[:, 2]
    end = max(outcome.load.duration_s, outcome.finished_s)
    flex_s = float(((workers - rule.workers_min) * np.diff(times, append=times[-1])).sum())
    active_s = rule.workers_min * end
    assert outcome.active.total == pytest.approx(active_s) and outcome.flex.total == pytest.approx(flex_s)
    assert outcome.cost(FLEX) == pytest.approx(0.001 * active_s + 0.002 * flex_s)
    assert outcome.paid_s == pytest.approx(active_s + flex_s)


def test_there_are_never_more_or_fewer_workers_than_allowed(rule: Rule) -> None:
    sizes = simulate(bursts(), RATES, rule).sizes
    workers = sizes[:, 1] + sizes[:, 2]
    assert workers.max() <= rule.workers_max and sizes[:, 1].min() >= rule.workers_min
    assert workers[-1] == rule.workers_min, "in the end all others have stopped"


def test_a_first_job_waits_for_the_scaler_and_for_the_start() -> None:
    load = Load(np.array([0.25]), np.array([60.0]), 0.25)
    outcome = simulate(load, RATES, scaled(5, start_s=20.0))
    assert outcome.waits_s[0] == pytest.approx(5.0 - 0.25 + 20.0), "over 4 s old at the look at 5 s"
    assert outcome.flex.starting == 20.0 and outcome.flex.busy == 2.0 and outcome.flex.idle == 5.0


def test_request_count_starts_as_many_workers_as_there_are_jobs_for() -> None:
    load = Load(np.zeros(10), np.full(10, 300.0), 0.0)
    outcome = simulate(load, RATES, scaled(50, by_requests=1, scaler_value=4.0))
    assert outcome.most_workers == math.ceil(10 / 4)


def test_flashboot_helps_only_a_worker_that_stopped_lately() -> None:
    arrivals = np.array([0.0, 100.0, 1000.0])
    outcome = simulate(Load(arrivals, np.full(3, 30.0), 1000.0), RATES, scaled(1, revive_s=1.0, revivable_s=120.0))
    cold, revived, cold_again = outcome.waits_s
    assert cold == pytest.approx(4 + 20) and revived == pytest.approx(4 + 1) and cold_again == pytest.approx(4 + 20)


CROWD = Load(np.zeros(4), np.full(4, 3000.0), 0.0)
BY_REQUESTS = scaled(3, by_requests=1, scaler_value=1.0)
"""Asked for at 1 s, three workers are ready at 21 s. Two are done at 121 s and stop at 126 s, when the scaler looks
and wants one of them back for the two jobs that the third has."""


def test_without_flashboot_no_start_is_free_even_at_the_moment_of_a_stop() -> None:
    outcome = simulate(CROWD, np.array([0.0, 30, 50, 60, 70]), BY_REQUESTS)
    assert outcome.sizes[5:8].tolist() == [[126, 2, 0], [126, 1, 0], [126, 1, 1]]
    assert outcome.num_starts == 4 and outcome.flex.starting == 4 * 20.0


def test_jobs_are_given_to_all_workers_that_are_ready_at_that_moment() -> None:
    outcome = simulate(CROWD, np.array([0.0, 30, 50, 60, 70]), BY_REQUESTS)
    assert outcome.waits_s.tolist() == [21.0] * 4
    assert sorted(outcome.totals_s) == pytest.approx([121.0, 121.0, 141.0, 141.0]), "one, one, and two together"


def test_a_job_that_comes_when_a_worker_would_stop_is_taken_by_it() -> None:
    load = Load(np.array([0.0, 31.0]), np.array([60.0, 60.0]), 31.0)  # asked for at 4 s: 20 to start, 2 busy, 5 idle
    outcome = simulate(load, RATES, scaled(1))
    assert outcome.waits_s.tolist() == [24.0, 0.0] and outcome.num_starts == 1


# -------------------------------------------------------------------------------- what must not fall


def test_more_load_never_makes_jobs_wait_less() -> None:
    waits = [mean_wait(per_s, 4, Lengths.EXPONENTIAL, jobs=50_000) for per_s in (1.0, 2.0, 3.0, 3.6, 3.9)]
    assert waits == sorted(waits) and waits[-1] > 10 * waits[0]


def test_more_workers_never_make_jobs_wait_longer() -> None:
    load = poisson(3.0, 1.0, 20_000, Lengths.EXPONENTIAL, seed=5)
    waits = [simulate(load, one_at_a_time(), fixed(size)).wait_s(99) for size in (3, 4, 5, 8)]
    assert waits == sorted(waits, reverse=True)


# --------------------------------------------------------------------------------------------- sizes


def finished(load: Load, rule: Rule) -> float:
    return simulate(load, RATES, rule).finished_s


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 64, 999, 1000])
@pytest.mark.parametrize("at_least", [1, 2, 50])
def test_the_fewest_that_are_enough_are_found(needed: int, at_least: int) -> None:
    tried: list[int] = []

    def is_enough(size: int) -> bool:
        tried.append(size)
        return size >= needed

    assert fewest(is_enough, at_least, at_most=1000) == max(needed, at_least)
    assert len(tried) <= 25 and max(tried) <= 1000
    with pytest.raises(PlanError, match="not even 1,000"):
        fewest(lambda size: False, at_least, at_most=1000)


def test_a_size_for_a_deadline_meets_it_and_one_worker_less_does_not() -> None:
    load = batch(2e6, 800, Lengths.EXPONENTIAL, seed=6)
    rule, outcome = size_for_deadline(load, RATES, scaled(0), deadline_s=3600)
    assert rule.workers_max > 1 and outcome.finished_s <= 3600
    assert finished(load, rule) <= 3600 < finished(load, rule._replace(workers_max=rule.workers_max - 1))


def test_a_shorter_deadline_takes_more_workers() -> None:
    load = batch(2e6, 800, Lengths.EXPONENTIAL, seed=6)
    sizes = [size_for_deadline(load, RATES, scaled(0), 3600 / part)[0].workers_max for part in (1, 2, 4)]
    assert sizes == sorted(sizes) and sizes[-1] > 3 * sizes[0]


def test_a_deadline_that_no_number_of_workers_meets_is_refused() -> None:
    load = batch(2e5, 50_000, Lengths.FIXED, seed=0)
    with pytest.raises(PlanError, match="longest job alone 1667 s"):
        size_for_deadline(load, RATES, scaled(0), deadline_s=600)
    with pytest.raises(PlanError, match="not even 4 workers are enough"):
        size_for_deadline(load, RATES, scaled(0), deadline_s=1667 + 20)


def test_a_size_for_a_deadline_keeps_to_the_bounds_that_are_given() -> None:
    load = batch(2e6, 800, Lengths.EXPONENTIAL, seed=6)
    free, _ = size_for_deadline(load, RATES, scaled(0), deadline_s=3600)
    needed = free.workers_max
    more, outcome = size_for_deadline(load, RATES, scaled(0, workers_min=needed + 3), deadline_s=3600)
    assert (more.workers_min, more.workers_max) == (needed + 3, needed + 3)
    assert outcome.flex.total == 0 and outcome.active.total == pytest.approx((needed + 3) * outcome.finished_s)
    some, outcome = size_for_deadline(load, RATES, scaled(needed + 9, workers_min=2), deadline_s=3600)
    assert some.workers_min == 2 and some.workers_max <= needed and outcome.finished_s <= 3600
    with pytest.raises(PlanError, match=rf"--workers-max {needed - 1} all is done after 3,\d+ s, not in"):
        size_for_deadline(load, RATES, scaled(needed - 1), deadline_s=3600)


@pytest.mark.parametrize(("per_s", "wait_s", "duration_s"), [(3.6, 60.0, 600.0), (0.7, 3600.0, 3600.0)])
def test_workers_for_a_load_that_goes_on_are_more_than_it_keeps_busy(
    per_s: float, wait_s: float, duration_s: float
) -> None:
    """However long jobs may wait: with fewer, the queue would only grow."""
    load = poisson(per_s, 800.0, duration_s, Lengths.EXPONENTIAL, seed=0)
    rule, _ = size_for_waiting(load, one_at_a_time(300.0), scaled(0), wait_s)
    assert rule.workers_max == math.floor(load.total_characters / duration_s / 300.0) + 1


def test_of_workers_that_slow_down_when_full_as_many_are_taken_as_can_stay_full() -> None:
    load = poisson(1.0, 100.0, 200.0, Lengths.FIXED, seed=0)
    rule, _ = size_for_waiting(load, np.array([0.0, 200.0, 30.0]), scaled(0), 3600.0)
    assert rule.workers_max > load.characters_per_s / 30.0


def test_workers_for_a_crowd_that_comes_once_may_be_fewer_than_it_keeps_busy() -> None:
    crowd = Load(np.arange(10.0), np.full(10, 300.0), 9.0)
    rule, outcome = size_for_waiting(crowd, one_at_a_time(30.0), scaled(0), wait_p99_s=50.0)
    assert rule.workers_max == 2 and outcome.wait_s(99) <= 50.0


def test_more_workers_than_can_be_simulated_are_refused() -> None:
    load = poisson(100.0, 1e6, 10.0, Lengths.FIXED, seed=0)
    with pytest.raises(PlanError, match="not even 1,000,000"):
        size_for_waiting(load, one_at_a_time(1.0), scaled(0), wait_p99_s=5.0)


def test_a_fleet_that_scales_has_a_fifth_more_workers() -> None:
    assert [with_headroom(size) for size in (1, 5, 10, 11)] == [2, 6, 12, 14]


def test_a_size_for_a_waiting_time_keeps_it_and_one_worker_less_does_not() -> None:
    load = poisson(3.0, 800.0, 3600, Lengths.EXPONENTIAL, seed=7)
    rule, outcome = size_for_waiting(load, RATES, scaled(1), wait_p99_s=5.0)
    assert outcome.wait_s(99) <= 5.0
    assert simulate(load, RATES, fixed(rule.workers_max - 1)).wait_s(99) > 5.0


# ------------------------------------------------------------------------------------------- factors


def figure(row: str, key: str, value: float, *, samples: int = 1, rows: int | None = None) -> dict[str, Any]:
    better = "less" if key in ("real-time-factor", "ready_s") else "more"
    ours = {"side": "ours", "dtype": "bfloat16", "num_threads": 2, "rows": rows, "samples": [value] * samples}
    return {"row": row, "key": key, "better": better, "ours": ours | {"median": value}, "baseline": None}


def write_benchmark(
    folder: Path, name: str, figures: list[dict[str, Any]], gpu: str | None, size: str = "full"
) -> None:
    machine = {"gpu": gpu, "cores": 16}
    content = {"machine": machine, "device": "cuda:0" if gpu else "cpu", "figures": figures}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content | {"weights": {"model": "turbo", "size": size}}))


SPOKEN = [figure("speak", "chars_per_s", 400.0), figure("speak", "real-time-factor", 0.04)]


def test_a_gpu_that_was_measured_has_its_own_speed_and_curve(tmp_path: Path) -> None:
    more = [figure("throughput", "audio_s_per_s", 200.0, rows=64), figure("cold-start", "ready_s", 9.0)]
    write_benchmark(tmp_path, "turbo-l4.json", SPOKEN + more, "NVIDIA L4")
    measured = read_measured(tmp_path, "turbo")
    speed = measured.speed(Kind(gpus=("NVIDIA L4",)))
    assert speed is not None and speed.ready_s == 9.0
    assert speed.spoken_chars_per_s == 16.0 and speed.points == ((1, 400.0), (64, 3200.0))
    assert speed.rates(64)[[0, 1, 64]].tolist() == [0.0, 400.0, 3200.0] and (np.diff(speed.rates(64)) > 0).all()
    assert measured.speed(Kind(gpus=("NVIDIA H200",))) is None and measured.speed(Kind(vcpus=16)) is None


def test_the_figure_with_most_samples_counts_and_tiny_models_do_not(tmp_path: Path) -> None:
    write_benchmark(tmp_path, "a.json", [*SPOKEN, figure("cold-start", "ready_s", 5.0)], "NVIDIA L4")
    write_benchmark(tmp_path, "b.json", [figure("cold-start", "ready_s", 7.0, samples=3)], "NVIDIA L4")
    write_benchmark(tmp_path, "c.json", [figure("speak", "chars_per_s", 9e9, samples=9)], "NVIDIA L4", size="tiny")
    speed = read_measured(tmp_path, "turbo").speed(Kind(gpus=("NVIDIA L4",)))
    assert speed is not None and speed.ready_s == 7.0 and speed.points == ((1, 400.0),)


def test_the_projects_own_files_hold_no_gpu_and_a_speed_for_two_cores() -> None:
    prices = read_prices(ROOT / "scripts" / "prices.toml")
    measured = read_measured(ROOT / "docs" / "benchmarks", "turbo")
    speed = measured.speed(prices.kinds["CPU_2"])
    assert speed is not None and 5 < speed.points[0][1] < 200
    gpus = {machine.gpu for machine in measured.figures} - {None}
    known = {name for name, kind in prices.kinds.items() if kind.gpus and measured.speed(kind)}
    assert bool(known) == bool(gpus), "no speed without a measurement"


def test_rates_are_level_beyond_what_is_known() -> None:
    speed = Speed(((1, 10.0), (4, 40.0)), 15.0, None, "")
    assert speed.rates(6).tolist() == [0.0, 10.0, 20.0, 30.0, 40.0, 40.0, 40.0]
    assert speed.real_time_factor(4) == 15.0 / 40.0


CURVE = Speed(((1, 100.0), (2, 150.0), (4, 200.0)), 20.0, 9.0, "a file")
PRICED = Kind(flex_per_s=0.002, active_per_s=0.001, pod_per_hour=5.4, vcpus=2)


def test_a_kind_costs_what_a_full_worker_takes_for_it() -> None:
    """Of 200 characters per second a million take 5,000 s; they speak 10 s of audio a second, an hour in 360 s."""
    row = kind_row("X", PRICED, CURVE, 4, "")
    assert row["chars_per_s"] == 200.0 and row["real_time_factor"] == pytest.approx(0.1) and row["ready_s"] == 9.0
    assert row["hours_per_million_characters"] == pytest.approx(5000 / 3600)
    assert row["usd_per_million_characters"] == pytest.approx({"flex": 10.0, "active": 5.0, "pod": 7.5})
    assert row["usd_per_audio_hour"] == pytest.approx({"flex": 0.72, "active": 0.36, "pod": 0.54})
    assert kind_row("X", PRICED, CURVE, 3, "")["usd_per_million_characters"]["flex"] == pytest.approx(2000 / 175)


@pytest.mark.parametrize(
    "text",
    ["ADA_24", "ADA_24=", "ADA_24=fast", "ADA_24=-1", "ADA_24=0:5", "ADA_24=inf", "ADA_24=1:nan", "MOON=5"],
)
def test_a_factor_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--factor"):
        parse_factors([text], {"ADA_24": FLEX})


def test_a_factor_without_the_speed_of_one_job_is_refused() -> None:
    """That one job would be as fast as sixteen together."""
    with pytest.raises(PlanError, match="ADA_24=1:300,16:2000"):
        parse_factors(["ADA_24=16:2000"], {"ADA_24": FLEX})


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    content = {
        "machine": {"gpu": "NVIDIA L4", "cores": 16},
        "device": "cuda:0",
        "weights": {"model": "turbo", "size": "full"},
        "figures": [figure("speak", "chars_per_s", 400.0)],
    }
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "Expecting value"),
        ("[" * 100_000, "recursion"),
        (broken(lambda each: each.update(machine={})), r"machine\.gpu: Field required"),
        (broken(lambda each: each.update(weights=None)), "weights: "),
        (broken(lambda each: each.update(figures=None)), "figures: "),
        (broken(lambda each: each["figures"][0].pop("ours")), r"figures\.0\.ours: Field required"),
        (broken(lambda each: each["figures"][0]["ours"].update(median="fast")), r"figures\.0\.ours\.median: "),
        (broken(lambda each: each["figures"][0]["ours"].update(median=math.nan)), r"figures\.0\.ours\.median: "),
        (broken(lambda each: each["figures"][0]["ours"].update(median=0)), "speak chars_per_s: expected a median"),
    ],
)
def test_a_benchmark_with_a_mistake_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PlanError, match=rf"bad\.json: .*{told}"):
        read_measured(tmp_path, "turbo")


def test_only_a_folder_that_is_there_holds_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"something": "else"}')
    assert read_measured(tmp_path, "turbo").figures == {}
    for nowhere in (tmp_path / "nowhere", tmp_path / "other.json"):
        with pytest.raises(PlanError, match="there is no such folder"):
            read_measured(nowhere, "turbo")


@pytest.mark.parametrize(
    ("text", "value"), [("800", 800.0), ("50M", 50e6), ("1.5k", 1500.0), ("1_000", 1000.0), ("2B", 2e9)]
)
def test_amounts_are_read(text: str, value: float) -> None:
    assert parse_amount(text) == value


@pytest.mark.parametrize(("text", "value"), [("90", 90.0), ("30m", 1800.0), ("8h", 28_800.0), ("0.5d", 43_200.0)])
def test_times_are_read(text: str, value: float) -> None:
    assert parse_seconds(text) == value


@pytest.mark.parametrize("text", ["", "0", "-5", "8 parsecs", "h", "nan", "inf", "9" * 400])
def test_what_is_no_amount_is_refused(text: str) -> None:
    for parse in (parse_amount, parse_seconds):
        with pytest.raises(ValueError, match="expected"):
            parse(text)


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,characters\n1005,300\n1000,200\n\n1010\n")
    load = from_trace(path, job_characters=800)
    assert load.arrivals.tolist() == [0, 5, 10] and load.characters.tolist() == [200, 300, 800]
    path.write_text("0,100\nten,5\n")
    with pytest.raises(PlanError, match=r"line 2: expected seconds,characters, got 'ten,5'"):
        from_trace(path, 800)


@pytest.mark.parametrize("header", ["", "seconds\n", "seconds,characters\n", "seconds, characters\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_trace_keeps_its_first_job_with_and_without_header_and_byte_order_mark(
    tmp_path: Path, header: str, mark: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{mark}{header}0,100\n5,200\n", encoding="utf-8")
    assert from_trace(path, 800).characters.tolist() == [100, 200]


@pytest.mark.parametrize("first", ["O,100", "0s,100", "time,characters", "seconds,chars", "seconds,100"])
def test_a_mistyped_first_line_of_a_trace_is_no_header(tmp_path: Path, first: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{first}\n5,200\n")
    with pytest.raises(PlanError, match=f"line 1: expected seconds,characters, got '{first}'"):
        from_trace(path, 800)


def test_a_trace_that_is_no_csv_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"0,100\n5,{'9' * 200_000}\n")
    with pytest.raises(PlanError, match=r"trace\.csv: field larger"):
        from_trace(path, 800)


# ---------------------------------------------------------------------------------------- the program


Run = Callable[..., Done]


@pytest.fixture
def plan() -> Run:
    def run_it(*arguments: object, before: tuple[str, ...] = ()) -> Done:
        command = [sys.executable, *before, *([] if before else ["scripts/plan.py"]), *map(str, arguments)]
        env = os.environ | {"COLUMNS": "200"}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)

    return run_it


def test_without_a_load_it_tells_costs_and_what_nobody_measured(plan: Run, tmp_path: Path) -> None:
    write_benchmark(tmp_path, "turbo-l4.json", SPOKEN, "NVIDIA L4")
    done = plan("--benchmarks", tmp_path, "--json")
    content = json.loads(done.stdout)
    kinds = {row["kind"]: row for row in content["kinds"]}
    assert done.returncode == 0 and content["assumptions"]
    per_million = kinds["AMPERE_24"]["usd_per_million_characters"]
    assert per_million["flex"] == pytest.approx(0.00019 * 1e6 / 400)
    assert kinds["AMPERE_24"]["usd_per_audio_hour"]["flex"] == pytest.approx(0.00019 * 3600 * 0.04)
    assert kinds["ADA_80_PRO"]["measured"] is False and "benchmark.py speak" in kinds["ADA_80_PRO"]["how_to_measure"]
    shown = plan("--benchmarks", tmp_path).stdout
    assert "not measured" in shown and "Assumed:" in shown and "They change" in shown and "0.475" in shown


def test_a_heap_of_text_is_sized_and_the_size_holds(plan: Run, tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    options = ("--kind", "CPU_2", "--price", "CPU_2=0.36", "--start", "60s", "--plot", picture)
    done = plan("--characters", "5M", "--deadline", "4h", *options, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["plans"]
    assert row["meets_deadline"] and row["finished_s"] <= 4 * 3600 and row["characters"] == pytest.approx(5e6)
    assert row["usd"] == pytest.approx(0.0001 * row["paid_s"]["flex"]["total"]) and row["starts"] == row["workers_max"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_endpoint_under_a_load_is_told_in_tables_with_its_assumptions(plan: Run) -> None:
    options = ("--jobs-per-second", 3, "--factor", "AMPERE_24=1:300,8:1500", "--concurrency", 8, "--kind", "AMPERE_24")
    done = plan(*options, "--duration", "20m", "--flashboot-start", "2s")
    assert done.returncode == 0, done.stderr
    for part in ("always on", "scaled: 0 to", "given with --factor", "not measured: a guess", "FlashBoot: 2 s"):
        assert part in done.stdout, part


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--characters", "50M"), "--deadline"),
        (("--characters", "lots", "--deadline", "8h"), "50M"),
        (("--jobs-per-second", "1", "--trace", "x.csv"), "expected one load"),
        (("--plot", "x.png"), "only a load"),
        (("--model", "nanoo"), "nano"),
        (("--jobs-per-second", "inf"), "--jobs-per-second"),
        (("--jobs-per-second", "nan"), "--jobs-per-second"),
        (
            ("--jobs-per-second", "1", "--scaler-value", "inf", "--kind", "CPU_2", "--workers-max", "3"),
            "--scaler-value",
        ),
        (
            ("--jobs-per-second", "1", "--scaler-value", "nan", "--kind", "CPU_2", "--workers-max", "3"),
            "--scaler-value",
        ),
        (("--jobs-per-second", "1", "--workers-max", "3", "--wait-p99", "5s"), "leave out --workers-max"),
        (("--characters", "1M", "--deadline", "2h", "--wait-p99", "5s"), "has its --deadline"),
        (
            ("--characters", "1M", "--deadline", "2h", "--workers-max", "3", "--workers-min", "4"),
            "over --workers-max 3",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(plan: Run, arguments: tuple[str, ...], told: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--kind", "MOON"), "--kind MOON: unknown; known are AMPERE_16"),
        (("--kind", "ADA_24", "--jobs-per-second", "1"), "no chosen kind has a speed"),
        (("--prices", "nowhere.toml"), "nowhere.toml: No such file"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--price", "CPU_2=cheap"), "expected KIND=DOLLARS_PER_HOUR"),
        (("--benchmarks", "nowhere"), "nowhere: there is no such folder"),
        (
            ("--kind", "CPU_2", "--characters", "1M", "--deadline", "2h", "--workers-max", "3"),
            "CPU_2: with --workers-max",
        ),
        (("--jobs-per-second", "0.1", "--kind", "CPU_2", "--plot", "README.md/y.png"), "--plot README.md/y.png"),
    ],
)
def test_what_cannot_be_planned_is_one_line(plan: Run, arguments: tuple[str, ...], told: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_a_simulated_endpoint_costs_is_its_seconds_at_their_price(plan: Run, tmp_path: Path) -> None:
    """A job of 1,000 characters alone on a worker: asked for after 4 s, ready after 20 s, busy 10 s, idle 5 s.

    The look at 4 s is the first that sees a job 4 s old. 35 flex seconds, in a run of 34 s.
    """
    prices, trace, benchmarks = tmp_path / "prices.toml", tmp_path / "trace.csv", tmp_path / "benchmarks"
    head = 'source = "s"\nurl = "u"\nread = 2026-01-01\n'
    prices.write_text(head + "[kinds.X]\nvcpus = 2\nflex_per_s = 0.002\nactive_per_s = 0.001\npod_per_hour = 5.4\n")
    trace.write_text("seconds,characters\n0,1000\n")
    benchmarks.mkdir()
    options = ("--prices", prices, "--benchmarks", benchmarks, "--factor", "X=1:100,2:150,4:200", "--trace", trace)
    done = plan(*options, "--start", "20s", "--workers-max", 1, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    (kind,), (row,) = content["kinds"], content["plans"]
    assert kind["usd_per_million_characters"] == pytest.approx({"flex": 10.0, "active": 5.0, "pod": 7.5})
    assert row["wait_s"]["p50"] == 24.0 and row["total_s"]["p99"] == row["finished_s"] == 34.0
    assert row["paid_s"]["flex"] == {"busy": 10.0, "idle": 5.0, "starting": 20.0, "total": 35.0}
    assert row["usd"] == pytest.approx(0.07) and row["usd_per_million_characters"] == pytest.approx(70.0)
    assert row["usd_per_hour"] == pytest.approx(0.07 * 3600 / 34) and row["utilisation"] == pytest.approx(10 / 35)
    assert content["load"]["wait_p99_s"] is None, "nothing was sized by it"


def test_a_fleet_that_scales_may_have_a_fifth_more_than_is_enough_always_on(plan: Run) -> None:
    options = ("--kind", "AMPERE_24", "--factor", "AMPERE_24=300", "--concurrency", 1, "--wait-p99", "1m", "--json")
    done = plan(*options, "--jobs-per-second", 3.6, "--duration", "10m")
    assert done.returncode == 0, done.stderr
    always_on, flex = json.loads(done.stdout)["plans"]
    assert always_on["workers_min"] == 10 and (flex["workers_min"], flex["workers_max"]) == (0, 12)


def instead(lines: str) -> tuple[str, str]:
    """How to run the program after some lines of Python."""
    return "-c", f"import sys, runpy; {lines}; runpy.run_path('scripts/plan.py', run_name='__main__')"


def without(module: str) -> tuple[str, str]:
    """How to run the program where a package is not installed."""
    return instead(f"sys.modules['{module}'] = None")


INTERRUPTED = "import os, signal, scripts.planning.simulation as each; {}each.run = lambda *_: os.kill(os.getpid(), 2)"


def test_an_interrupt_ends_a_simulation_without_waiting_for_compiled_code(plan: Run) -> None:
    """By the signal itself: Python's own handler would run only after that code."""
    done = plan("--jobs-per-second", 1, "--kind", "CPU_2", before=instead(INTERRUPTED.format("")))
    assert done.returncode == -signal.SIGINT and not done.stderr


def test_an_interrupt_that_whoever_started_it_ignores_is_ignored(plan: Run) -> None:
    ignoring = INTERRUPTED.format("signal.signal(signal.SIGINT, signal.SIG_IGN); ")
    done = plan("--jobs-per-second", 1, "--kind", "CPU_2", before=instead(ignoring))
    assert done.returncode == 1 and "cannot unpack" in done.stderr, "it went on, with what the stand-in does not give"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no full device")
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_output_that_takes_no_more_is_one_line(form: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "scripts/plan.py", "--kind", "CPU_2", *form]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: standard output: [Errno 28]")
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_a_compiler_the_same_lines_give_the_same(plan: Run) -> None:
    options = ("--jobs-per-second", "0.2", "--kind", "CPU_2", "--workers-max", 3, "--workers-min", 1, "--json")
    compiled, plain = plan(*options), plan(*options, before=without("numba"))
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout) == json.loads(compiled.stdout)


def test_a_plot_without_matplotlib_says_what_to_install(plan: Run) -> None:
    done = plan("--jobs-per-second", "0.1", "--kind", "CPU_2", "--plot", "x.png", before=without("matplotlib"))
    assert done.returncode == 1 and "pip install matplotlib" in done.stderr and "Traceback" not in done.stderr


def test_a_table_of_prices_with_a_mistake_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('source="s"\nurl="u"\nread=2026-01-01\n[kinds.X]\nvcpus=2\nflex_per_second=1\n')
    with pytest.raises(PlanError, match=r"kinds\.X\.flex_per_second"):
        read_prices(path)


@pytest.mark.parametrize(
    ("table", "told"),
    [(b"\xff = 1", "utf-8"), (b"source=", "Invalid value"), (b"[kinds.X]\nvcpus=2\nflex_per_s=inf\n", "finite")],
)
def test_a_table_of_prices_that_cannot_be_read_is_refused_by_name(tmp_path: Path, table: bytes, told: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_bytes(b'source="s"\nurl="u"\nread=2026-01-01\n' + table)
    with pytest.raises(PlanError, match=rf"prices\.toml: .*{told}"):
        read_prices(path)


def test_millions_of_jobs_are_simulated_whole() -> None:
    load = poisson(500.0, 800.0, 2000.0, Lengths.EXPONENTIAL, seed=8)
    outcome: Outcome = simulate(load, np.array([0.0, 300.0, 500.0, 600.0, 700.0]), scaled(2000))
    assert len(outcome.waits_s) == pytest.approx(1e6, rel=0.01) and np.isfinite(outcome.totals_s).all()
