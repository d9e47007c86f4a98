"""When jobs come and how long their texts are: drawn, all at once, or from a file."""

from __future__ import annotations

import csv
import math
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from scripts.planning.kernel import Floats
from scripts.planning.prices import PlanError

MOST_JOBS = 100_000_000
MOST_SECONDS = 366 * 86_400.0
HEADER = ("seconds", "characters")
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


class Lengths(StrEnum):
    """How texts differ in length."""

    FIXED = "fixed"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True)
class Load:
    """Jobs to be done.

    Args:
        arrivals: (jobs,) seconds, in order.
        characters: (jobs,) the length of each job's text.
        duration_s: how long jobs keep coming.
        goes_on: whether it is a piece of a load that does not end there.
    """

    arrivals: Floats
    characters: Floats
    duration_s: float
    goes_on: bool = False

    def __post_init__(self) -> None:
        assert len(self.arrivals) == len(self.characters) > 0
        assert (self.characters > 0).all() and (np.diff(self.arrivals) >= 0).all() and self.arrivals[0] >= 0

    @property
    def total_characters(self) -> float:
        return float(self.characters.sum())

    @property
    def characters_per_s(self) -> float:
        return self.total_characters / self.duration_s if self.duration_s else math.inf


def poisson(per_s: float, mean_characters: float, duration_s: float, lengths: Lengths, seed: int) -> Load:
    """Jobs that come independently of each other, as those of many users do."""
    if not per_s * duration_s < MOST_JOBS:
        raise PlanError(f"{per_s:g} jobs a second for {duration_s:g} s are over {MOST_JOBS:,} jobs; shorten --duration")
    generator = np.random.default_rng(seed)
    count = int(generator.poisson(per_s * duration_s))
    if count == 0:
        raise PlanError(f"no job came in {duration_s:g} s at {per_s:g} jobs a second; lengthen --duration")
    arrivals = np.sort(generator.uniform(0.0, duration_s, count))
    return Load(arrivals, _characters(mean_characters, count, lengths, generator), duration_s, goes_on=True)


def batch(characters: float, job_characters: float, lengths: Lengths, seed: int) -> Load:
    """A heap of text, all of it there at once."""
    count = math.ceil(characters / job_characters)
    if count > MOST_JOBS:
        raise PlanError(f"{characters:g} characters are over {MOST_JOBS:,} jobs; raise --job-characters")
    sizes = _characters(job_characters, count, lengths, np.random.default_rng(seed))
    return Load(np.zeros(count), sizes * characters / sizes.sum(), 0.0)


def _characters(mean: float, count: int, lengths: Lengths, generator: np.random.Generator) -> Floats:
    if lengths is Lengths.FIXED:
        return np.full(count, float(mean))
    return np.maximum(generator.exponential(mean, count), 1e-9 * mean)


def from_trace(path: Path, job_characters: float) -> Load:
    """Jobs of a CSV file: seconds, and optionally characters; a first line of just these names is passed over.

    Raises:
        PlanError: naming the line at fault.
    """
    rows: list[tuple[float, float]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel marks its UTF-8
            for number, cells in enumerate(csv.reader(file), start=1):
                if cells and not (number == 1 and _is_header(cells)):
                    rows.append(_row(cells, job_characters, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f"{path}: {error}") from error
    if not rows:
        raise PlanError(f"{path}: expected lines of seconds,characters; there are none")
    seconds, characters = (np.array(column) for column in zip(*sorted(rows), strict=True))
    return Load(seconds - seconds[0], characters, float(seconds[-1] - seconds[0]))


def _row(cells: list[str], job_characters: float, where: str) -> tuple[float, float]:
    numbers = [float(cell) for cell in cells[:2] if _is_number(cell)]
    seconds, characters = numbers[0] if numbers else math.nan, numbers[1] if len(numbers) > 1 else job_characters
    if len(numbers) != min(len(cells), 2) or not math.isfinite(seconds) or not 0 < characters < math.inf:
        raise PlanError(f"{where}: expected seconds,characters, got {','.join(cells)!r}")
    return seconds, characters


def _is_header(cells: list[str]) -> bool:
    return tuple(cell.strip() for cell in cells[:2]) == HEADER[: len(cells)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_amount(text: str) -> float:
    """ "50M" → 50,000,000; "800" → 800.

    Raises:
        ValueError: naming what was expected.
    """
    return _parse(text, _SCALES, "a number above 0 such as 800, 50k or 50M", sys.float_info.max)


def parse_seconds(text: str) -> float:
    """ "8h" → 28,800; "90" → 90.

    Raises:
        ValueError: naming what was expected.
    """
    return _parse(text, {"": 1.0, **_SECONDS}, "a time above 0, up to a year, such as 90s, 30m, 8h or 2d", MOST_SECONDS)


def _parse(text: str, units: dict[str, float], expected: str, at_most: float) -> float:
    match = re.fullmatch(r"\s*([\d_,]*\.?\d+)\s*([a-z]*)\s*", text.lower())
    unit = units.get(match[2]) if match else None
    number = float(match[1].replace("_", "").replace(",", "")) if match else 0.0
    if unit is None or not 0 < number * unit <= at_most:
        raise ValueError(f"expected {expected}, got {text!r}")
    return number * unit
