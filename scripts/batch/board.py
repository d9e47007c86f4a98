"""What happens, as it happens: a bar for people, plain lines where nobody watches, events as JSON for programs."""

from __future__ import annotations

import collections
import json
import sys
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from scripts.batch.checking import Row
from scripts.batch.costs import Rates, as_time, as_usd
from scripts.batch.manifest import DONE, FAILED, Task
from scripts.batch.outcomes import Failure
from scripts.console import complain, err

_LINE_EVERY_S = 10.0
_TROUBLE_EVERY_S = 5.0
_SHOWN_FAILURES = 10
_PACE_S = 600.0
"""Over so long the pace is taken: a job may take minutes."""


class Style(StrEnum):
    """How to show it."""

    PEOPLE = "people"
    QUIET = "quiet"
    JSON = "json"


class Board:
    """Told of everything by the runner.

    Args:
        style: how to show it.
        rates: for what it costs.

    Attributes:
        audio_s: of what was done until now.
    """

    def __init__(self, style: Style, rates: Rates) -> None:
        self._style, self._rates = style, rates
        self._began_s = self._line_s = time.monotonic()
        self._trouble_s = -_TROUBLE_EVERY_S
        self.audio_s = self._worker_s = 0.0
        self._num_done = self._num_failed = self._num_jobs = self._num_rows = 0
        self._num_chars = self._num_chars_done = 0
        self._jobs_left: collections.Counter[str] = collections.Counter()  # by row
        self._chars: dict[tuple[str, int], int] = {}
        self._warnings: set[str] = set()
        self._told: set[str] = set()  # keys of rows that failed
        self._bar: Progress | None = None

    # ------------------------------------------------------------------------------ the runner's side

    def begin(self, tasks: Sequence[Task], rows: Mapping[str, Row]) -> None:
        """What there is to do; of what is done already nothing is told but the number."""
        self._chars = {(task.key, task.part): rows[task.key].parts[task.part].num_chars or 1 for task in tasks}
        todo = [task for task in tasks if task.state not in (DONE, FAILED)]
        self._num_jobs, num_before = len(todo), sum(task.state == DONE for task in tasks)
        self._num_chars = sum(self._chars[task.key, task.part] for task in todo)
        self._jobs_left = collections.Counter(task.key for task in todo)
        self._num_rows = len(self._jobs_left)
        self._event("begin", rows=len(rows), jobs=len(todo), done_before=num_before)
        if num_before:
            self.say(f"{num_before:,} of {len(tasks):,} jobs are done already")
        if self._style is Style.PEOPLE and err().is_terminal and todo:
            self._open_bar()

    def sent(self, task: Task) -> None:
        self._event("sent", task, job_id=task.job_id, attempt=task.attempts)

    def done(self, task: Task) -> None:
        self._num_done += 1
        self.audio_s += task.result.get("duration_s") or 0.0
        self._end(task)
        self._event("done", task, file=task.file, duration_s=task.result.get("duration_s"), job_id=task.job_id)
        self._warn(task)
        self._tick()

    def failed(self, task: Task) -> None:
        self._num_failed += 1
        self._end(task)
        self._event("failed", task, error_code=task.error_code, error=task.error)
        self._told.add(task.key)
        self._complain(f"failed: {task.name}: {task.error_code}: {task.error}")
        self._tick()

    def again(self, task: Task, failure: Failure) -> None:
        self._event("again", task, error_code=failure.code, error=failure.message)

    def progress(self, task: Task, told: Any) -> None:
        self._event("progress", task, told=told)

    def joining(self, row: Row) -> None:
        self._event("joining", key=row.key)
        self.say(f"joining {row.key} ({len(row.parts)} parts)")

    def joined(self, row: Row, path: Path) -> None:
        self._event("joined", key=row.key, file=path.name)

    def not_joined(self, row: Row, error: str) -> None:
        self._event("not_joined", key=row.key, error=error)
        self._told.add(row.key)
        self._complain(f"not joined: {row.key}: {error}")

    def trouble(self, operation: str, message: str) -> None:
        """What is waited out, or could not be done; not more often than somebody wants to read."""
        self._event("trouble", operation=operation, message=message)
        if time.monotonic() - self._trouble_s >= _TROUBLE_EVERY_S:
            self._trouble_s = time.monotonic()
            self.say(f"waiting: {operation}: {message}")

    # ------------------------------------------------------------------------------ the program's side

    def say(self, text: str) -> None:
        """A line for people."""
        if self._style is Style.PEOPLE:
            self._print(text)

    def _complain(self, text: str) -> None:
        """A line of what went wrong, which --quiet leaves."""
        if self._style is not Style.JSON:
            self._print(text)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            complain(text)

    def close(self) -> None:
        """No more bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def failed_before(self, failures: Sequence[tuple[str, str]]) -> None:
        """Rows of the run that have failed, by key and why: those of which this run has told nothing."""
        told = [f"failed before: {key}: {error}" for key, error in failures if key not in self._told]
        for line in told[:_SHOWN_FAILURES]:
            self._complain(line)
        if len(told) > _SHOWN_FAILURES:
            self._complain(f"and {len(told) - _SHOWN_FAILURES:,} more")

    def event(self, name: str, **about: Any) -> None:
        """An event for programs."""
        self._event(name, **about)

    # ------------------------------------------------------------------------------

    def _event(self, event: str, task: Task | None = None, **about: Any) -> None:
        if self._style is not Style.JSON:
            return
        place = {} if task is None else {"key": task.key, "part": task.part}
        sys.stdout.write(json.dumps({"event": event, **place, **about}) + "\n")
        sys.stdout.flush()

    def _end(self, task: Task) -> None:
        self._worker_s += task.worker_s
        self._num_chars_done += self._chars[task.key, task.part]
        self._jobs_left[task.key] -= 1
        if not self._jobs_left[task.key]:
            del self._jobs_left[task.key]

    def _warn(self, task: Task) -> None:
        """Each warning once: in a batch they are all the same."""
        for warning in task.result.get("warnings", ()):
            if warning not in self._warnings:
                self._warnings.add(warning)
                self.say(f"warning: {task.name}: {warning}")

    def _open_bar(self) -> None:
        columns = (
            TextColumn("speaking"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=err(), speed_estimate_period=_PACE_S)
        told = ", ".join(self._counts())
        self._bar_task = self._bar.add_task("", total=self._num_chars, told=told)  # rows are not alike: characters
        self._bar.start()

    def _tick(self) -> None:
        if self._bar is not None:
            told = ", ".join((*self._counts(), *self._facts()))
            self._bar.update(self._bar_task, completed=self._num_chars_done, told=told)
        elif time.monotonic() - self._line_s >= _LINE_EVERY_S:
            self._line_s = time.monotonic()
            self.say(", ".join((*self._counts(), *self._facts(), f"about {as_time(self._left_s())} left")))

    def _counts(self) -> list[str]:
        counts = [f"{self._num_rows - len(self._jobs_left):,} of {self._num_rows:,} rows"]
        if self._num_jobs != self._num_rows:
            counts.append(f"{self._num_done + self._num_failed:,} of {self._num_jobs:,} jobs")
        return counts

    def _facts(self) -> list[str]:
        elapsed_s = max(time.monotonic() - self._began_s, 1e-3)
        facts = [f"{as_time(self.audio_s)} of audio", f"{self.audio_s / elapsed_s:.1f} × real time"]
        usd = self._rates.usd(self._worker_s)
        facts += [f"≤ {as_usd(usd)}"] if usd is not None else []
        return [*facts, f"{self._num_failed:,} failed"] if self._num_failed else facts

    def _left_s(self) -> float:
        if not self._num_chars_done:
            return float("inf")
        elapsed_s = time.monotonic() - self._began_s
        return elapsed_s * (self._num_chars - self._num_chars_done) / self._num_chars_done
