"""Voices, reports and progress for people; JSON for machines. Without a terminal there is no progress to watch."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from voice_library import Problem, Voice
from voice_library.legacy import ImportReport

WIDTH = 160
"""Where there is no terminal to ask."""


def out() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def err() -> Console:
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH, highlight=False)


def say(text: str) -> None:
    """A line on standard output, in which nothing is taken for markup, and which no width cuts."""
    out().print(text, markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """A line on standard error."""
    err().print(text, markup=False, soft_wrap=True)


def print_json(content: object) -> None:
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


@contextlib.contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on standard error while the block runs. Call what is given with steps done, or with `total=`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def step(done: int = 1, *, total: int | None = None) -> None:
            bar.update(task, advance=done, total=total)

        yield step


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(_plain(cell) for cell in row))
    out().print(shown)


def _plain(text: str) -> Any:
    """Text in which brackets are brackets."""
    from rich.text import Text

    return Text(text)


def print_voices(voices: Sequence[Voice], total: int) -> None:
    rows = [
        (v.voice_id, v.name, v.language or "", v.gender or "", f"{v.duration_s:.1f} s", ", ".join(v.tags), v.created)
        for v in voices
    ]
    title = f"{total} voices" if len(voices) == total else f"{len(voices)} of {total} voices"
    table(title, ("id", "name", "language", "gender", "length", "tags", "created"), rows)


def print_voice(voice: Voice) -> None:
    facts = [(name, _readable(value)) for name, value in voice.to_dict().items() if name != "quality"]
    table(voice.name, ("", ""), facts)
    if voice.quality:
        table("quality", ("", ""), [(name, _readable(value)) for name, value in voice.quality.items()])


def _readable(value: object) -> str:
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return "–" if value in (None, "") else str(value)


def print_problems(problems: Sequence[Problem]) -> None:
    table(f"{len(problems)} problems", ("voice", "what is wrong"), [(each.voice_id, each.what) for each in problems])


def print_import(report: ImportReport) -> None:
    """A line of counts, and a table of all that a person may want to look at."""
    remarkable = [voice for voice in report.voices if voice.outcome == "refused" or voice.notes]
    rows = [
        (v.legacy_id, v.outcome, v.voice_id, v.name, "; ".join(filter(None, (v.why, *v.notes)))) for v in remarkable
    ]
    if rows:
        table("to look at", ("id there", "outcome", "id here", "name", "why"), rows)
    for problem in report.problems:
        complain(f"warning: {problem}")
    counts = ", ".join(f"{report.count(outcome)} {outcome}" for outcome in ("imported", "skipped", "refused"))
    say(f"{len(report.voices)} voices found: {counts}")
