"""Taking turns, and what comes of it: medians with their spread, ratios, and whether a target is met."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scripts.benchmarks.options import Contender

Values = Mapping[str, float]
"""What one measurement gives, by name, such as {"seconds": 1.5}."""

Better = Literal["more", "less"]


class BenchmarkError(Exception):
    """The two sides did not do the same work, so that a figure would say nothing."""


@dataclass(frozen=True)
class Runner:
    """One contender, loaded and ready.

    Args:
        run: measures once.
        dtype: what it truly runs in, in words.
        warm_up: done once before the rounds that count; None for a whole run.
        close: frees what it holds.
    """

    run: Callable[[], Values]
    dtype: str
    warm_up: Callable[[], object] | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Series:
    """A contender's measurements of one quantity."""

    contender: Contender
    dtype: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def to_json(self) -> dict[str, Any]:
        spread = {"median": self.median, "min": min(self.samples), "max": max(self.samples)}
        contender = self.contender
        return {
            "side": contender.side,
            "dtype": self.dtype,
            "num_threads": contender.num_threads,
            "rows": contender.rows,
            "samples": list(self.samples),
            **spread,
        }


@dataclass(frozen=True)
class Target:
    """What a figure should reach; what is None is not asked for."""

    ratio_at_least: float | None = None
    ratio_at_most: float | None = None
    value_at_least: float | None = None
    value_at_most: float | None = None

    def is_met(self, value: float, ratio: float | None) -> bool | None:
        """Whether all that is asked for is reached; None when a ratio is asked for and there is no upstream."""
        asked_of_ratio = (self.ratio_at_least, self.ratio_at_most) != (None, None)
        if asked_of_ratio and ratio is None:
            return None
        return _is_within(value, self.value_at_least, self.value_at_most) and (
            ratio is None or _is_within(ratio, self.ratio_at_least, self.ratio_at_most)
        )

    def to_json(self) -> dict[str, float]:
        return {name: bound for name, bound in vars(self).items() if bound is not None}


def _is_within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Args:
        row: the subcommand that measured it.
        key: name of the quantity within the row.
        title: for people.
        unit: of the samples.
        better: whether more or less of it is better.
        ours: our samples.
        baseline: upstream's, or our first setting's; None when there is none.
        ratio_is: "gain" (times better than the baseline) or "share" (of the baseline's).
        target: to be reached, or None.
        note: what was measured, in words.
    """

    row: str
    key: str
    title: str
    unit: str
    better: Better
    ours: Series
    baseline: Series | None = None
    ratio_is: Literal["gain", "share"] = "gain"
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if self.baseline is None:
            return None
        ours, theirs = self.ours.median, self.baseline.median
        return theirs / ours if self._is_inverted else ours / theirs

    @property
    def _is_inverted(self) -> bool:
        return self.ratio_is == "gain" and self.better == "less"

    @property
    def is_met(self) -> bool | None:
        return None if self.target is None else self.target.is_met(self.ours.median, self.ratio)

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("row", "key", "title", "unit", "better", "note", "ratio")},
            "ratio_is": "baseline / ours" if self._is_inverted else "ours / baseline",
            "ours": self.ours.to_json(),
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "target": None if self.target is None else self.target.to_json(),
            "met": self.is_met,
        }


@dataclass(frozen=True)
class Outcome:
    """What all contenders of a row measured, in the order of `Options.contenders`."""

    contenders: Sequence[Contender]
    dtypes: Sequence[str]
    values: Sequence[Sequence[Values]]
    has_baseline: bool
    notes: Mapping[str, str] = field(default_factory=dict)

    def series(self, index: int, key: str) -> Series:
        samples = tuple(values[key] for values in self.values[index])
        return Series(self.contenders[index], self.dtypes[index], samples)

    def compare(self, key: str) -> list[tuple[Series, Series | None]]:
        """Each of our settings beside the baseline; the baseline's own line, if it is ours, has none."""
        baseline = self.series(0, key) if self.has_baseline else None
        pairs: list[tuple[Series, Series | None]] = []
        for index, contender in enumerate(self.contenders):
            if contender.side == "ours":
                pairs.append((self.series(index, key), baseline if index else None))
        return pairs


def take_turns(
    contenders: Sequence[Contender],
    load: Callable[[Contender], Runner],
    repeats: int,
    *,
    has_baseline: bool,
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Load all contenders, warm each up, then measure them in turn: A B C A B C …"""
    runners = []
    for contender in contenders:
        progress(f"loading {contender.side}")
        runners.append(load(contender))
    try:
        values = _measure(contenders, runners, repeats, progress)
    finally:
        for runner in runners:
            runner.close()
    return Outcome(contenders, [runner.dtype for runner in runners], values, has_baseline)


def _measure(
    contenders: Sequence[Contender], runners: Sequence[Runner], repeats: int, progress: Callable[[str], None]
) -> list[list[Values]]:
    import torch

    values: list[list[Values]] = [[] for _ in runners]
    for turn in range(repeats + 1):
        for contender, runner, kept in zip(contenders, runners, values, strict=True):
            round_name = f"round {turn} of {repeats}" if turn else "warming up"
            progress(f"{round_name}: {contender.side}")
            torch.set_num_threads(contender.num_threads)  # a contender before may have had another number
            if turn:
                kept.append(runner.run())
            else:
                (runner.warm_up or runner.run)()
    return values


class Stopwatch:
    """Seconds on the wall, waiting for a GPU's work at both ends.

    with Stopwatch(device) as watch: ...; watch.seconds
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._wait()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
