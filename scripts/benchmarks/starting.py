"""Rows cold-start and memory: each side in fresh processes, from their start until they can speak.

Ready means that the weights are loaded and the built-in voice can be spoken: ours by the worker's own way of
loading, upstream's by `from_local`. What a side leaves for later shows in the second figure of each row, taken
when the first chunk's audio is whole: ours by a job, up to the encoded file, upstream's by `generate`. The weight
files lie in the system's cache from the warm-up on, for both sides alike, and the platform's SDK is on neither.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from engine.models import SPEECH_TOKEN_RATE
from jobs.settings import Settings
from scripts.benchmarks.figures import BenchmarkError, Figure, Outcome, Runner, Values, take_turns
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.speaking import make_text
from scripts.benchmarks.targets import target
from scripts.benchmarks.weights import speaking_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 60
"""Of the first chunk, where no other number is asked for: a short answer."""

_GIB = 1 << 30
_TAIL = 2000
_MOST_DIFFERENCE_S = 0.25
"""Between what was asked for and what was spoken: silence is added by some models, and trimmed by us."""

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
    spoken = f"{options.chunk_tokens(NUM_TOKENS)} tokens decoded, rendered, marked; ours encoded too"
    titles = (
        ("ready_s", "cold-start", "Process start to ready", "weights loaded, built-in voice"),
        ("spoken_s", "cold-start-spoken", "Process start to first audio", spoken),
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
    folder = speaking_checkpoint(options, options.chunk_tokens(NUM_TOKENS))

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
    num_tokens = options.chunk_tokens(NUM_TOKENS)
    asked = {
        "side": contender.side,
        "model": options.model,
        "device": str(options.place),
        "size": options.size,
        "folder": str(folder.resolve()),
        "text": make_text(num_tokens, 0),
        "num_threads": contender.num_threads,
    }
    command = [sys.executable, "-m", "scripts.benchmarks.child", json.dumps(asked)]
    values: dict[str, float] = {}
    dtype = ""
    with tempfile.TemporaryFile("w+") as said:
        for event, seconds, report in _listen(command, worker_environment(options, folder, contender), said):
            dtype = report.get("dtype", "")
            check_length(report.get("audio_s"), num_tokens, contender)
            values[f"{event}_s"] = seconds
            for name in ("resident", "anonymous", "unique"):
                if name in report:
                    values[f"{event}-{name}"] = report[name] / _GIB
        if "spoken_s" not in values:
            said.seek(0)
            raise BenchmarkError(f"the process of {contender.side} failed: {said.read()[-_TAIL:]}")
    return values, dtype


def worker_environment(options: Options, folder: Path, contender: Contender) -> dict[str, str]:
    """A worker's settings, and no others."""
    ours = {name.upper() for name in Settings.model_fields}
    others = {name: value for name, value in os.environ.items() if name.upper() not in ours}
    return others | {
        "MODEL": options.model,
        "MODEL_DIR": str(folder.resolve()),
        "DEVICE": str(options.place),
        "DTYPE": contender.dtype,
        "LOG_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(contender.num_threads),
    }


def check_length(audio_s: float | None, num_tokens: int, contender: Contender) -> None:
    """Raises: BenchmarkError when a side spoke more or less than it was to."""
    expected_s = num_tokens / SPEECH_TOKEN_RATE
    if audio_s is not None and abs(audio_s - expected_s) > _MOST_DIFFERENCE_S:
        raise BenchmarkError(f"{contender.side} spoke {audio_s:.2f} s, expected {expected_s:.2f} s")


def _listen(
    command: list[str], environment: dict[str, str], said: IO[str]
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Each report of a process: its event, seconds since the start, and all that it says."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            report = json.loads(line)
            yield report["event"], time.perf_counter() - started, report
