"""What came of a batch: `results.jsonl`, a line for each row, and a summary."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from scripts.batch import files
from scripts.batch.costs import Rates, as_time, as_usd
from scripts.batch.manifest import DONE, FAILED, SENT, WAITING, WRITTEN, Joined, Manifest, Task, digest_of
from scripts.batch.outcomes import JOIN_FAILED
from scripts.console import counted

FILE = "results.jsonl"

_COPIED = ("duration_s", "seed", "format", "sample_rate", "model", "voice", "watermarked", "repeated")
_WORST_FIRST = (FAILED, WAITING, SENT, WRITTEN, DONE)


@dataclass
class Summary:
    """A run's rows as a whole.

    Args:
        rows, done, failed, open: numbers of rows.
        left_out: problems of rows that are not among them.
        audio_s: of all that is done; run_audio_s of what this run did.
        worker_s: of all attempts. Jobs that share a worker count each, so this is more than the worker's time.
        usd: what that costs at most; None where there is no price.
        wall_s: of this run.
        failures: key and why.
        results: the file with all of them.
    """

    rows: int = 0
    done: int = 0
    failed: int = 0
    open: int = 0
    left_out: int = 0
    audio_s: float = 0.0
    run_audio_s: float = 0.0
    worker_s: float = 0.0
    usd: float | None = None
    wall_s: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)
    results: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "failures": [{"key": key, "error": error} for key, error in self.failures]}

    def lines(self) -> Iterator[str]:
        """For people."""
        counts = [f"{self.done:,} of {self.rows:,} rows done"]
        counts += [f"{self.failed:,} failed"] if self.failed else []
        counts += [f"{self.open:,} not done yet"] if self.open else []
        counts += [f"left out for {counted(self.left_out, 'problem')}"] if self.left_out else []
        yield f"{', '.join(counts)}; {as_time(self.audio_s)} of audio"
        if self.run_audio_s and self.wall_s >= 1:
            pace = self.run_audio_s / self.wall_s
            yield f"of it in this run {as_time(self.run_audio_s)} in {as_time(self.wall_s)}, {pace:.1f} × real time"
        cost = f": at most {as_usd(self.usd)} (jobs that shared a worker are counted each)" if self.usd else ""
        yield f"workers spent {as_time(self.worker_s)} on it{cost}"
        if self.failures:
            yield "what failed is tried again with --retry-failed"
        yield f"results: {self.results}"


def write_results(manifest: Manifest, folder: Path, keys: Container[str], rates: Rates) -> Summary:
    """Write `results.jsonl`, of all rows of the batch; gives the summary of those of the run."""
    summary = Summary(results=str(folder / FILE))
    lines = []
    for key, tasks in groupby(manifest.tasks(), key=lambda task: task.key):
        line = _line(key, list(tasks), manifest.joined(key))
        if key in keys:
            _count(summary, line)
        lines.append(json.dumps(line, ensure_ascii=False))
    summary.usd = rates.usd(summary.worker_s)
    text = "".join(f"{line}\n" for line in lines)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a character is written as JSON writes it
    files.write_text(folder / FILE, text)
    return summary


def _line(key: str, tasks: Sequence[Task], joined: Joined) -> dict[str, Any]:
    """A row."""
    worst = min(tasks, key=lambda task: _WORST_FIRST.index(task.state))
    state, file, code, error = _end_of(worst, tasks, joined)
    is_done = state == DONE
    line: dict[str, Any] = {"key": key, "state": state if state in (DONE, FAILED) else "open", "file": file}
    line |= {name: worst.result[name] for name in _COPIED if is_done and name in worst.result}
    if len(tasks) > 1:
        line["duration_s"] = round(sum(_duration_s(task) for task in tasks), 3)
        line["parts"] = [_part(task) for task in tasks]
    line["warnings"] = [*dict.fromkeys(each for task in tasks for each in task.result.get("warnings", ()))]
    line["error_code"], line["error"] = code, error
    line["attempts"] = sum(task.attempts for task in tasks)
    line["worker_s"] = round(sum(task.worker_s for task in tasks), 3)
    line["timings"] = {**worst.result.get("timings", {}), **worst.result.get("platform", {})} if is_done else {}
    line["job_id"] = tasks[0].job_id if len(tasks) == 1 else None
    return line


def _end_of(worst: Task, tasks: Sequence[Task], joined: Joined) -> tuple[str, str | None, str | None, str | None]:
    """State, file, code and error: a text in parts is done when those are one file."""
    if worst.state != DONE:
        return worst.state, None, worst.error_code, worst.error
    if len(tasks) == 1:
        return DONE, worst.file, None, None
    if joined.of != digest_of(tasks):
        return WRITTEN, None, None, None
    return (DONE, joined.file, None, None) if joined.file else (FAILED, None, JOIN_FAILED, joined.error)


def _part(task: Task) -> Mapping[str, Any]:
    names = ("state", "file", "job_id", "attempts", "error_code", "error")
    return {**{name: getattr(task, name) for name in names}, "duration_s": _duration_s(task)}


def _duration_s(task: Task) -> float:
    return float(task.result.get("duration_s", 0.0)) if task.state == DONE else 0.0


def _count(summary: Summary, line: Mapping[str, Any]) -> None:
    summary.rows += 1
    summary.done += line["state"] == DONE
    summary.failed += line["state"] == FAILED
    summary.open += line["state"] == "open"
    summary.worker_s += line["worker_s"]
    if line["state"] == DONE:
        summary.audio_s += line.get("duration_s") or 0.0
    elif line["state"] == FAILED:
        summary.failures.append((line["key"], f"{line['error_code']}: {line['error']}"))
