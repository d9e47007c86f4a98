"""Voices, reports and progress for people; JSON for machines. Without a terminal there is no progress to watch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scripts.console import complain as complain
from scripts.console import err, table
from scripts.console import print_json as print_json
from scripts.console import say as say
from voice_library import Problem, Voice
from voice_library.legacy import ImportReport


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
