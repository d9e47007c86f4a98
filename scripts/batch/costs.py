"""What a batch may take: characters → seconds of audio → dollars. Before it is done, an estimate that says so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.guard import CHARS_PER_SECOND, DEFAULT_CHARS_PER_SECOND
from engine.text import base_language
from scripts.batch.errors import BatchError
from scripts.planning.prices import PlanError, read_prices
from scripts.planning.speeds import read_measured


def spoken_s(num_chars: int, language: str) -> float:
    """How long a text may take to say, seconds: at the pace that the engine's guard expects."""
    return num_chars / CHARS_PER_SECOND.get(base_language(language), DEFAULT_CHARS_PER_SECOND)


@dataclass(frozen=True)
class Rates:
    """What a second of a worker costs, and what it does.

    Args:
        usd_per_s: None where nobody said.
        chars_per_s: characters that a worker speaks in a second, jobs one by one; None where it is not known.
        source: where the speed is from.
    """

    usd_per_s: float | None = None
    chars_per_s: float | None = None
    source: str = ""

    @classmethod
    def of(
        cls,
        gpu: str | None,
        usd_per_s: float | None,
        chars_per_s: float | None,
        model: str,
        table: Path,
        measured: Path,
    ) -> Rates:
        """What was said, else the price of a GPU in a table and the speed that was measured on it.

        Raises:
            BatchError: for a GPU that is not in the table.
        """
        if gpu is None:
            return cls(usd_per_s, chars_per_s, "given")
        try:
            kinds = read_prices(table).kinds
            if gpu not in kinds:
                raise BatchError(f"--gpu {gpu}: expected one of {', '.join(kinds)}")
            speed = read_measured(measured, model).speed(kinds[gpu])
        except PlanError as error:
            raise BatchError(str(error)) from error
        price = kinds[gpu].flex_per_s if usd_per_s is None else usd_per_s
        if chars_per_s is not None or speed is None:
            return cls(price, chars_per_s, "given")
        return cls(price, speed.points[0][1], speed.source)

    def usd(self, worker_s: float) -> float | None:
        """Of seconds of workers."""
        return None if self.usd_per_s is None else worker_s * self.usd_per_s

    def expected_usd(self, num_chars: int) -> float | None:
        """Of speaking so many characters."""
        return None if self.chars_per_s is None else self.usd(num_chars / self.chars_per_s)


def as_time(seconds: float) -> str:
    """Such as 7.3 s, 4 min 10 s, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def as_usd(amount: float) -> str:
    """With as many digits as say something."""
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"


def total_spoken_s(texts: Iterable[tuple[int, str]]) -> float:
    """Of texts by (characters, language)."""
    return sum(spoken_s(num_chars, language) for num_chars, language in texts)
