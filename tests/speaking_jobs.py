"""Jobs that can be told apart by their audio, and what each has to sound like: what this process makes of it alone."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile

from jobs.settings import Settings
from jobs.worker import Worker

RATE = 24_000
SUBJECTS = ("A heron", "The baker", "Our neighbour", "Some old clock", "My sister", "Every sailor", "One thin cat")
VERBS = ("counts", "forgets", "repairs", "admires", "follows", "sells", "remembers", "paints")
OBJECTS = ("seven lanterns", "a broken violin", "the last train", "red apples", "a long letter", "the harbour wall")
LONG = "This is a sentence of a text that is a good deal longer than anybody would like to wait for. " * 50
"""Some seconds of work for the draft voice."""


def sentence(number: int) -> str:
    """A different one for every number."""
    parts = (SUBJECTS[number % 7], VERBS[number // 7 % 8], OBJECTS[number // 56 % 6])
    return f"{' '.join(parts)}, and this is number {number}."


def recording(f0_hz: float) -> str:
    """Six seconds of a voice of some pitch, base64 of a wav file."""
    times = np.arange(6 * RATE) / RATE
    wave = 0.2 * sum(np.sin(2 * np.pi * f0_hz * k * times) / k for k in range(1, 8))
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV")
    return base64.b64encode(file.getvalue()).decode("ascii")


class Alone:
    """A worker in this process, which runs one job at a time: the same input is run once."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._results: dict[str, dict[str, Any]] = {}

    def result(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker answers."""
        name = repr(sorted(fields.items()))
        if name not in self._results:
            self._results[name] = asyncio.run(self._worker.run({"id": "alone", "input": dict(fields)}))
        return self._results[name]


@contextmanager
def alone(**settings: Any) -> Iterator[Alone]:
    """A worker that is told nothing by the environment."""
    worker = Worker.load(Settings(**{"model": "draft", **settings}))
    try:
        yield Alone(worker)
    finally:
        worker.close()


def samples(result: Mapping[str, Any]) -> Any:
    """Of a result's audio, int16 (T,)."""
    return soundfile.read(io.BytesIO(base64.b64decode(result["audio"])), dtype="int16")[0]
