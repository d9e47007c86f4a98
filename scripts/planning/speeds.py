"""How fast a worker speaks: from the figures that scripts/benchmark.py wrote, or from the user.

A figure belongs to a kind of worker by the name of its GPU, or by its number of CPU cores. Of several figures for the
same thing the one with the most samples counts, of equals the slower.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from scripts.planning.prices import Kind, PlanError, first_mistake

SPOKEN_CHARS_PER_S = 14.0
"""Characters in a second of English audio where nothing was measured: the pace that the engine's guard expects."""
_USED = {("speak", "chars_per_s"), ("speak", "real-time-factor"), ("cold-start", "ready_s")}


@dataclass(frozen=True)
class Speed:
    """What a worker of some kind does.

    Args:
        points: jobs at once → characters per second, all of them together; the first is for one job.
        spoken_chars_per_s: characters in a second of audio.
        ready_s: from the start of the process until it can speak; None where it was not measured.
        source: where the figures are from.
    """

    points: tuple[tuple[int, float], ...]
    spoken_chars_per_s: float
    ready_s: float | None
    source: str

    def __post_init__(self) -> None:
        assert self.points and self.points[0][0] == 1, "a worker with one job would be as fast as one with many"
        assert all(jobs > 0 and rate > 0 for jobs, rate in self.points), self.points

    def rates(self, concurrency: int) -> NDArray[np.float64]:
        """Characters per second of a worker with 0, 1, … jobs: straight lines between points, level beyond them."""
        jobs, rates = zip(*sorted(self.points), strict=True)
        curve = np.interp(np.arange(concurrency + 1), jobs, rates)
        curve[0] = 0.0
        return curve  # (concurrency + 1,)

    def real_time_factor(self, concurrency: int) -> float:
        """Seconds of a full worker for a second of audio."""
        return self.spoken_chars_per_s / float(self.rates(concurrency)[concurrency])


@dataclass(frozen=True)
class Figure:
    """One of ours in a benchmark's file."""

    row: str
    key: str
    value: float
    num_samples: int
    is_better_high: bool
    rows: int | None
    threads: int
    file: str


@dataclass(frozen=True)
class Machine:
    """Where figures were measured: a GPU by name, or so many CPU cores."""

    gpu: str | None
    cores: int

    def is_of(self, kind: Kind) -> bool:
        return self.gpu in kind.gpus if self.gpu else kind.vcpus == self.cores


class _Machine(BaseModel):
    gpu: str | None
    cores: int


class _Series(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    median: float
    samples: tuple[float, ...]
    rows: int | None
    num_threads: int


class _Row(BaseModel):
    row: str
    key: str
    better: str
    ours: _Series


class _Benchmark(BaseModel):
    """What is read of a file that scripts/benchmark.py wrote."""

    machine: _Machine
    weights: dict[str, Any]
    device: str
    figures: tuple[_Row, ...]

    def is_of(self, model: str) -> bool:
        return self.weights.get("model") == model and self.weights.get("size") == "full"


@dataclass
class Measured:
    """All figures of a model, by machine."""

    model: str
    figures: dict[Machine, list[Figure]] = field(default_factory=dict)

    def speed(self, kind: Kind) -> Speed | None:
        """The speed of the slowest machine of a kind; None where none was measured."""
        speeds = [_speed(figures) for machine, figures in self.figures.items() if machine.is_of(kind)]
        found = [speed for speed in speeds if speed is not None]
        return min(found, key=lambda speed: speed.points[0][1], default=None)


def read_measured(folder: Path, model: str) -> Measured:
    """All figures of a model's full size in a folder of benchmark files; what is no such file is passed over.

    Raises:
        PlanError: when there is no such folder, or a file in it has a mistake, naming what is wrong where.
    """
    if not folder.is_dir():
        raise PlanError(f"--benchmarks {folder}: there is no such folder")
    measured = Measured(model)
    for path in sorted(folder.glob("*.json")):
        content = _benchmark(path)
        if content is None or not content.is_of(model):
            continue
        machine = Machine(content.machine.gpu if content.device.startswith("cuda") else None, content.machine.cores)
        measured.figures.setdefault(machine, []).extend(_figures(content, path))
    return measured


def _benchmark(path: Path) -> _Benchmark | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_one = isinstance(content, dict) and set(_Benchmark.model_fields) <= set(content)
        return _Benchmark.model_validate(content) if is_one else None
    except ValidationError as error:
        raise PlanError(f"{path}: {first_mistake(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: {error}") from error


def _figures(content: _Benchmark, path: Path) -> Iterator[Figure]:
    """Those that a speed is made of."""
    for each in content.figures:
        if each.row != "throughput" and (each.row, each.key) not in _USED:
            continue
        if each.ours.median <= 0:
            raise PlanError(f"{path}: {each.row} {each.key}: expected a median above 0, got {each.ours.median:g}")
        yield Figure(
            row=each.row,
            key=each.key,
            value=each.ours.median,
            num_samples=len(each.ours.samples),
            is_better_high=each.better == "more",
            rows=each.ours.rows,
            threads=each.ours.num_threads,
            file=path.name,
        )


def _speed(figures: Sequence[Figure]) -> Speed | None:
    """From row speak, which every speed needs, and rows throughput and cold-start, where they were measured."""
    spoken = [each for each in figures if (each.row, each.key) == ("speak", "chars_per_s")]
    if not spoken:
        return None
    threads = max(spoken, key=lambda each: each.value).threads  # what a worker would be set to
    alone = _trusted(each for each in spoken if each.threads == threads)
    factor = _trusted(
        each for each in figures if (each.row, each.key, each.threads) == ("speak", "real-time-factor", threads)
    )
    if alone is None or factor is None:
        return None
    spoken_chars_per_s = alone.value * factor.value
    ready = _trusted(each for each in figures if (each.row, each.key) == ("cold-start", "ready_s"))
    together = [each for each in figures if each.row == "throughput" and each.rows and each.rows > 1]
    points = {1: alone.value}
    for rows in sorted({each.rows for each in together if each.rows}):
        best = _trusted(each for each in together if each.rows == rows)
        points[rows] = best.value * spoken_chars_per_s if best else points[1]
    files = {each.file for each in (alone, factor, ready, *together) if each is not None}
    return Speed(
        points=tuple(points.items()),
        spoken_chars_per_s=spoken_chars_per_s,
        ready_s=None if ready is None else ready.value,
        source=", ".join(sorted(files)),
    )


def _trusted(figures: Iterator[Figure]) -> Figure | None:
    """Most samples first; of equals the slower."""
    return max(
        figures,
        key=lambda each: (each.num_samples, -each.value if each.is_better_high else each.value),
        default=None,
    )


def parse_factors(texts: Sequence[str], kinds: Mapping[str, Kind]) -> dict[str, tuple[tuple[int, float], ...]]:
    """ "ADA_24=300" or "ADA_24=1:300,16:2000" → points by kind.

    Raises:
        PlanError: naming what was expected.
    """
    return dict(_parse_factor(text, kinds) for text in texts)


def _parse_factor(text: str, kinds: Mapping[str, Kind]) -> tuple[str, tuple[tuple[int, float], ...]]:
    name, _, value = text.partition("=")
    if name not in kinds:
        raise PlanError(f"--factor {text}: unknown kind {name!r}; known are {', '.join(kinds)}")
    points = {}
    try:
        for part in value.split(","):
            jobs, colon, rate = part.rpartition(":")
            points[int(jobs) if colon else 1] = float(rate)
    except ValueError:
        points = {}
    if not points or min(points) < 1 or not all(0 < rate < float("inf") for rate in points.values()):
        raise PlanError(f"--factor {text}: expected KIND=CHARS_PER_S or KIND=1:300,16:2000 (jobs at once : characters)")
    if 1 not in points:
        raise PlanError(
            f"--factor {text}: say too how fast a worker with one job at once is, as in {name}=1:300,{value}"
        )
    return name, tuple(sorted(points.items()))


def with_factor(speed: Speed | None, points: tuple[tuple[int, float], ...], spoken_chars_per_s: float) -> Speed:
    """The user's speed; what the user does not say stays as measured."""
    if speed is None:
        return Speed(points, spoken_chars_per_s, None, "given with --factor")
    return dataclasses.replace(speed, points=points, source="given with --factor")
