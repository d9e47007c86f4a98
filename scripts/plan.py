"""Plans cost and capacity: `python scripts/plan.py --characters 50M --deadline 8h`.

Without a load, what a million characters and an hour of audio cost with each kind of worker. With --characters and
--deadline, how many workers a heap of text needs. With --jobs-per-second or --trace, a simulated endpoint: how long
jobs wait, how many workers run, and what that costs. Speeds are those that scripts/benchmark.py measured
(docs/benchmarks) or yours (--factor); prices are in scripts/prices.toml. How it is built:
`scripts/planning/__init__.py`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a file, Python looks for packages beside it; they are in the folder above

import typer  # noqa: E402

from engine.models import MODELS  # noqa: E402
from scripts.console import complain, print_json  # noqa: E402
from scripts.planning import report  # noqa: E402
from scripts.planning.arrivals import (  # noqa: E402
    MOST_JOBS,
    Lengths,
    Load,
    batch,
    from_trace,
    parse_amount,
    parse_seconds,
    poisson,
)
from scripts.planning.kernel import Floats, Rule  # noqa: E402
from scripts.planning.plot import write_plot  # noqa: E402
from scripts.planning.prices import Kind, PlanError, Prices, read_prices  # noqa: E402
from scripts.planning.simulation import Outcome, simulate  # noqa: E402
from scripts.planning.sizing import MOST_WORKERS, size_for_deadline, size_for_waiting, with_headroom  # noqa: E402
from scripts.planning.speeds import (  # noqa: E402
    SPOKEN_CHARS_PER_S,
    Speed,
    parse_factors,
    read_measured,
    with_factor,
)

UNKNOWN_START_S = 30.0
"""Assumed, and said so, where neither a measurement nor the user tells how long a worker takes to start."""
CHECK_S = 1.0
WAIT_P99_S = 10.0
ALWAYS_ON, SCALED = "always on", "scaled"


class Scaler(StrEnum):
    """RunPod's two."""

    QUEUE_DELAY = "queue-delay"
    REQUEST_COUNT = "request-count"


def amount(text: str | float) -> float:
    return _parsed(parse_amount, text)


def seconds(text: str | float) -> float:
    return _parsed(parse_seconds, text)


def _parsed(parse: Callable[[str], float], text: str | float) -> float:
    try:
        return parse(str(text))  # defaults come as numbers
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


SPEED, LOAD, SCALING, OUTPUT = "Speeds and prices", "The load", "The endpoint", "Output"


def main(
    characters: Annotated[
        float | None,
        typer.Option(parser=amount, metavar="N", help="A heap of text, such as 50M.", rich_help_panel=LOAD),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(parser=seconds, metavar="TIME", help="When it is to be done.", rich_help_panel=LOAD)
    ] = None,
    jobs_per_second: Annotated[
        float | None,
        typer.Option(min=1e-9, max=MOST_JOBS, help="Jobs that keep coming, at random.", rich_help_panel=LOAD),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jobs of a CSV file: seconds,characters.", rich_help_panel=LOAD),
    ] = None,
    job_characters: Annotated[
        float, typer.Option(parser=amount, metavar="N", help="Of a job, on average.", rich_help_panel=LOAD)
    ] = 800,
    lengths: Annotated[
        Lengths, typer.Option(help="Whether jobs are equally long or vary.", rich_help_panel=LOAD)
    ] = Lengths.EXPONENTIAL,
    duration: Annotated[
        float, typer.Option(parser=seconds, metavar="TIME", help="How long they come.", rich_help_panel=LOAD)
    ] = 3600,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.", rich_help_panel=LOAD)] = 0,
    wait_p99: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help=f"99 of 100 jobs wait no longer ({WAIT_P99_S:g}).",
            rich_help_panel=LOAD,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, help="MAX_CONCURRENCY: jobs at once per worker.", rich_help_panel=SCALING)
    ] = 4,
    workers_min: Annotated[
        int, typer.Option(min=0, max=MOST_WORKERS, help="Always running.", rich_help_panel=SCALING)
    ] = 0,
    workers_max: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_WORKERS,
            help="Else as many as --deadline takes, or --wait-p99 and 20 % more.",
            rich_help_panel=SCALING,
        ),
    ] = None,
    scaler: Annotated[Scaler, typer.Option(help="RunPod's.", rich_help_panel=SCALING)] = Scaler.QUEUE_DELAY,
    scaler_value: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=1e6,
            help="Seconds (4), or jobs for a worker (--concurrency).",
            rich_help_panel=SCALING,
        ),
    ] = None,
    idle_timeout: Annotated[
        float, typer.Option(parser=seconds, metavar="TIME", help="Of a worker without jobs.", rich_help_panel=SCALING)
    ] = 5,
    start: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help="From asking for a worker until it takes jobs; else the measured start of the process alone.",
            rich_help_panel=SCALING,
        ),
    ] = None,
    flashboot_start: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="TIME", help="The same with FlashBoot.", rich_help_panel=SCALING),
    ] = None,
    flashboot_window: Annotated[
        float,
        typer.Option(
            parser=seconds, metavar="TIME", help="How long after a stop FlashBoot helps.", rich_help_panel=SCALING
        ),
    ] = 300,
    kind: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="Only this kind; several times.", rich_help_panel=SPEED)
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(MODELS)}.", rich_help_panel=SPEED)
    ] = "turbo",
    factor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=CHARS_PER_S",
            help="Your own measurement; KIND=1:300,16:2000 for jobs at once.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=USD", help="Dollars an hour, instead of the table's.", rich_help_panel=SPEED),
    ] = None,
    prices_file: Annotated[
        Path, typer.Option("--prices", metavar="FILE", help="The table of prices.", rich_help_panel=SPEED)
    ] = ROOT / "scripts" / "prices.toml",
    benchmarks: Annotated[
        Path, typer.Option(metavar="FOLDER", help="What scripts/benchmark.py wrote.", rich_help_panel=SPEED)
    ] = ROOT / "docs" / "benchmarks",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw workers and queue over time.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Plan cost and capacity: of a million characters, of a heap of text, of an endpoint under a load."""
    check_together(characters, deadline, jobs_per_second, trace, plot)
    check_workers(workers_min, workers_max, wait_p99, deadline)
    if model not in MODELS:
        raise typer.BadParameter(f"expected one of {', '.join(MODELS)}, got {model!r}", param_hint="--model")
    scaling = Rule(
        workers_min=workers_min,
        workers_max=workers_max or 0,
        by_requests=int(scaler is Scaler.REQUEST_COUNT),
        scaler_value=scaler_value or (4.0 if scaler is Scaler.QUEUE_DELAY else float(concurrency)),
        check_s=CHECK_S,
        start_s=UNKNOWN_START_S,
        revive_s=flashboot_start or 0.0,
        revivable_s=flashboot_window if flashboot_start else 0.0,
        idle_s=idle_timeout,
    )
    try:
        prices = with_prices(read_prices(prices_file), price or [])
        kinds = chosen(prices.kinds, kind)
        speeds = known_speeds(kinds, benchmarks, model, factor or [])
        contents = cost_document(model, concurrency, prices, kinds, speeds)
        load = make_load(characters, jobs_per_second, trace, job_characters, lengths, duration, seed)
        if load is not None:
            known = {name: (kinds[name], speed) for name, speed in speeds.items() if speed is not None}
            with interruptible():
                add_plans(contents, load, known, concurrency, scaling, start, deadline, wait_p99 or WAIT_P99_S)
        if plot is not None:
            write_plot(plot, contents["plans"])
    except PlanError as error:
        complain(f"error: {error}")
        raise typer.Exit(1) from error
    print_all(contents, as_json)


# ------------------------------------------------------------------------------------ what was asked


def check_together(
    characters: float | None, deadline: float | None, per_second: float | None, trace: Path | None, plot: Path | None
) -> None:
    """Refuse options that say different things, or too little."""
    if (characters is None) != (deadline is None):
        raise typer.BadParameter("say both --characters and --deadline", param_hint="--deadline")
    loads = [name for name, value in (("--characters", characters), ("--trace", trace)) if value is not None]
    loads += ["--jobs-per-second"] if per_second is not None else []
    if len(loads) > 1:
        raise typer.BadParameter(f"expected one load, got {' and '.join(loads)}", param_hint=loads[0])
    if plot is not None and not loads:
        raise typer.BadParameter("only a load can be plotted: say --characters, --jobs-per-second or --trace")


def check_workers(fewest: int, most: int | None, wait_p99_s: float | None, deadline_s: float | None) -> None:
    if most is not None and fewest > most:
        raise typer.BadParameter(f"--workers-min {fewest} is over --workers-max {most}", param_hint="--workers-min")
    if wait_p99_s is not None and deadline_s is not None:
        raise typer.BadParameter("a heap of text has its --deadline", param_hint="--wait-p99")
    if wait_p99_s is not None and most is not None:
        raise typer.BadParameter("it says how many workers: leave out --workers-max", param_hint="--wait-p99")


def with_prices(prices: Prices, texts: list[str]) -> Prices:
    """The table with the user's own prices, dollars an hour."""
    kinds = dict(prices.kinds)
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise PlanError(f"--price {text}: unknown kind {name!r}; known are {', '.join(kinds)}")
        try:
            usd = float(value)
        except ValueError:
            usd = -1.0
        if not 0 <= usd < float("inf"):
            raise PlanError(f"--price {text}: expected KIND=DOLLARS_PER_HOUR")
        kinds[name] = kinds[name].at_price(usd)
    return prices.model_copy(update={"kinds": kinds})


def chosen(kinds: dict[str, Kind], names: list[str] | None) -> dict[str, Kind]:
    unknown = set(names or []) - set(kinds)
    if unknown:
        raise PlanError(f"--kind {min(unknown)}: unknown; known are {', '.join(kinds)}")
    return {name: kind for name, kind in kinds.items() if not names or name in names}


def known_speeds(kinds: dict[str, Kind], folder: Path, model: str, factors: list[str]) -> dict[str, Speed | None]:
    """What was measured of each kind, or what the user says of it; None where nobody knows."""
    measured = read_measured(folder, model)
    speeds = {name: measured.speed(kind) for name, kind in kinds.items()}
    paces = [speed.spoken_chars_per_s for speed in speeds.values() if speed is not None]
    for name, points in parse_factors(factors, kinds).items():
        speeds[name] = with_factor(speeds[name], points, paces[0] if paces else SPOKEN_CHARS_PER_S)
    return speeds


def make_load(
    characters: float | None,
    per_second: float | None,
    trace: Path | None,
    job_characters: float,
    lengths: Lengths,
    duration_s: float,
    seed: int,
) -> Load | None:
    if characters is not None:
        return batch(characters, min(job_characters, characters), lengths, seed)
    if trace is not None:
        return from_trace(trace, job_characters)
    return None if per_second is None else poisson(per_second, job_characters, duration_s, lengths, seed)


# ------------------------------------------------------------------------------------ what comes out


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the program at once, as a shell expects it.

    Python would wait for compiled code to return, and what it then raises inside of that crashes the process. Whoever
    started the program with interrupts ignored, as with `nohup … &`, has them ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_all(contents: dict[str, Any], as_json: bool) -> None:
    try:
        if as_json:
            print_json(contents)
        else:
            show(contents)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever read has read enough: typer ends with 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # at its end Python would try once more
        complain(f"error: standard output: {error}")
        raise typer.Exit(1) from error


def cost_document(
    model: str, concurrency: int, prices: Prices, kinds: dict[str, Kind], speeds: dict[str, Speed | None]
) -> dict[str, Any]:
    """What each kind costs, with what is assumed."""
    command = f"python scripts/benchmark.py speak --model {model} --json docs/benchmarks/{model}-KIND.json"
    how = f"run on such a machine: {command}"
    rows = [report.kind_row(name, kinds[name], speeds[name], concurrency, how) for name in kinds]
    assumed = report.assumptions_of_prices(prices)
    for name, speed in speeds.items():
        if speed is not None:
            assumed += report.assumptions_of_speed(name, kinds[name], speed, concurrency)
    return {
        "model": model,
        "concurrency": concurrency,
        "prices": {"source": prices.source, "url": prices.url, "read": str(prices.read)},
        "kinds": rows,
        "assumptions": assumed,
    }


def add_plans(
    contents: dict[str, Any],
    load: Load,
    known: dict[str, tuple[Kind, Speed]],
    concurrency: int,
    scaling: Rule,
    start_s: float | None,
    deadline_s: float | None,
    wait_p99_s: float,
) -> None:
    """Simulate the load with every kind whose speed is known."""
    if not known:
        raise PlanError(
            "no chosen kind has a speed: measure it (scripts/benchmark.py speak) or say --factor KIND=CHARS_PER_S"
        )
    starts = {name: starting(speed, start_s) for name, (_, speed) in known.items()}
    plans: list[report.Plan] = []
    for name, (kind, speed) in known.items():
        rule = scaling._replace(start_s=starts[name][0])
        try:
            for mode, sized, outcome in make_plans(load, speed.rates(concurrency), rule, deadline_s, wait_p99_s):
                plans.append(report.Plan(name, kind, mode, sized, outcome))
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
    contents["load"] = {
        "jobs": len(load.arrivals),
        "characters": load.total_characters,
        "duration_s": load.duration_s,
        "deadline_s": deadline_s,
        "wait_p99_s": None if deadline_s or scaling.workers_max else wait_p99_s,
    }
    contents["plans"] = [report.plan_row(plan, deadline_s) for plan in plans]
    contents["assumptions"] += report.assumptions_of_simulation(scaling, starts)


def starting(speed: Speed, start_s: float | None) -> tuple[float, str]:
    """How long a worker takes to start, and how that is known."""
    if start_s is not None:
        return start_s, "as given"
    if speed.ready_s is None:
        return UNKNOWN_START_S, "not measured: a guess, say --start"
    on_top = "finding a machine and pulling the image come on top, say --start"
    return speed.ready_s, f"measured, of the process alone with weights on disk; {on_top}"


def make_plans(
    load: Load, rates: Floats, rule: Rule, deadline_s: float | None, wait_p99_s: float
) -> Iterator[tuple[str, Rule, Outcome]]:
    """A name, the endpoint's settings and what comes of them, for each way to meet the load."""
    if deadline_s is not None:
        yield (SCALED, *size_for_deadline(load, rates, rule, deadline_s))
        return
    if not rule.workers_max:
        fixed, outcome = size_for_waiting(load, rates, rule, wait_p99_s)
        yield ALWAYS_ON, fixed, outcome
        rule = rule._replace(workers_max=max(with_headroom(fixed.workers_max), rule.workers_min))
    yield SCALED, rule, simulate(load, rates, rule)


def show(contents: dict[str, Any]) -> None:
    report.print_kinds(contents["kinds"], contents["model"], contents["concurrency"])
    if "plans" in contents:
        load = contents["load"]
        jobs = f"{load['jobs']:,} jobs, {load['characters']:,.0f} characters"
        if load["deadline_s"]:
            title = f"{jobs}, to be done in {report.duration(load['deadline_s'])}"
        else:
            title = f"{jobs} in {report.duration(load['duration_s'])}"
        report.print_plans(contents["plans"], title)
    report.print_assumptions(contents["assumptions"])


if __name__ == "__main__":
    typer.run(main)
