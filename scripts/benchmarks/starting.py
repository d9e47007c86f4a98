"""Rows cold-start and memory: each side in fresh processes, from their start until they can speak.

Ready means that the weights are loaded and the built-in voice can be spoken. What a side leaves for later
shows in the second figure of each row, taken after the first few tokens are spoken. The weight files lie in
the system's cache from the warm-up on, for both sides alike.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from scripts.benchmarks.figures import BenchmarkError, Figure, Outcome, Runner, Values, take_turns
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.targets import target
from scripts.benchmarks.weights import random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
_GIB = 1 << 30
_TAIL = 2000

Progress = Callable[[str], None]

_MEMORY_TITLES = (
    ("ready-resident", "memory", "Resident memory when ready", "every page in memory (VmRSS), mapped weights too"),
    ("ready-anonymous", "memory-anonymous", "… not backed by a file", "RssAnon: what the process allocated"),
    ("ready-unique", "memory-unique", "… shared with nobody", "private pages: what one more process costs"),
    ("spoken-resident", "memory-spoken", "Resident memory after speaking", "all weights have been touched"),
)


def measure_cold_start(options: Options, progress: Progress) -> list[Figure]:
    return _cold_start_figures(options, _start_all(options, progress))


def measure_memory(options: Options, progress: Progress) -> list[Figure]:
    return _memory_figures(options, _start_all(options, progress))


def measure_both(options: Options, progress: Progress) -> list[Figure]:
    """Both rows from the same processes."""
    outcome = _start_all(options, progress)
    return [*_cold_start_figures(options, outcome), *_memory_figures(options, outcome)]


def _cold_start_figures(options: Options, outcome: Outcome) -> list[Figure]:
    titles = (
        ("ready_s", "cold-start", "Process start to ready", "weights loaded, built-in voice"),
        ("spoken_s", "cold-start-spoken", "Process start to first speech", "8 tokens decoded, rendered and marked"),
    )
    return [
        Figure("cold-start", key, title, "s", "less", ours, baseline, target=target(options, goal), note=note)
        for key, goal, title, note in titles
        for ours, baseline in outcome.compare(key)
    ]


def _memory_figures(options: Options, outcome: Outcome) -> list[Figure]:
    if any("ready-resident" not in values for samples in outcome.values for values in samples):
        raise BenchmarkError("memory is measured by Linux's counters, which this system does not have")
    return [
        Figure("memory", key, title, "GiB", "less", ours, baseline, "share", target(options, goal), note)
        for key, goal, title, note in _MEMORY_TITLES
        for ours, baseline in outcome.compare(key)
    ]


def _start_all(options: Options, progress: Progress) -> Outcome:
    folder = random_checkpoint(options)

    def load(contender: Contender) -> Runner:
        # A process of each before the rounds: it brings the files into memory, and says what it runs in.
        run = functools.partial(start, options, folder, contender)
        return Runner(lambda: run()[0], run()[1], lambda: None)

    has_baseline = options.against != "nothing"
    return take_turns(options.contenders(), load, options.repeats, has_baseline=has_baseline, progress=progress)


def start(options: Options, folder: Path, contender: Contender) -> tuple[Values, str]:
    """Run one process from its start to its end.

    Returns:
        Seconds to ready and to spoken with the memory then, and what it ran in.

    Raises:
        BenchmarkError: when it failed, with the end of what it said.
    """
    asked = {
        "side": contender.side,
        "model": options.model,
        "device": str(options.place),
        "size": options.size,
        "folder": str(folder.resolve()),
        "dtype": contender.dtype,
        "num_threads": contender.num_threads,
    }
    command = [sys.executable, "-m", "scripts.benchmarks.child", json.dumps(asked)]
    values: dict[str, float] = {}
    dtype = ""
    with tempfile.TemporaryFile("w+") as said:
        for event, seconds, report in _listen(command, said):
            dtype = report["dtype"]
            values[f"{event}_s"] = seconds
            for name in ("resident", "anonymous", "unique"):
                if name in report:
                    values[f"{event}-{name}"] = report[name] / _GIB
        if "spoken_s" not in values:
            said.seek(0)
            raise BenchmarkError(f"the process of {contender.side} failed: {said.read()[-_TAIL:]}")
    return values, dtype


def _listen(command: list[str], said: IO[str]) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Each report of a process: its event, seconds since the start, and all that it says."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            report = json.loads(line)
            yield report["event"], time.perf_counter() - started, report
