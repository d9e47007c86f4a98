"""All rows of figures, by the name of their subcommand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from enum import StrEnum

from scripts.benchmarks.figures import Figure
from scripts.benchmarks.options import Options


class Row(StrEnum):
    """A subcommand."""

    T3 = "t3"
    FLOW = "flow"
    VOCODER = "vocoder"
    UTTERANCE = "utterance"
    LONG_FORM = "long-form"
    STREAM = "stream"
    PLAN = "plan"
    THROUGHPUT = "throughput"
    VOICE = "voice"
    VOICES = "voices"
    COLD_START = "cold-start"
    MEMORY = "memory"
    SPEAK = "speak"
    ALL = "all"


_MEASURES = {
    Row.T3: "decoding.measure_t3",
    Row.FLOW: "rendering.measure_flow",
    Row.VOCODER: "rendering.measure_vocoder",
    Row.UTTERANCE: "speaking.measure_utterance",
    Row.LONG_FORM: "speaking.measure_long_form",
    Row.STREAM: "streaming.measure_stream",
    Row.PLAN: "streaming.measure_plan",
    Row.THROUGHPUT: "speaking.measure_throughput",
    Row.VOICE: "voices.measure_voice",
    Row.VOICES: "library.measure_voices",
    Row.COLD_START: "starting.measure_cold_start",
    Row.MEMORY: "starting.measure_memory",
    Row.SPEAK: "speaking.measure_speak",
}
_BOTH_STARTS = "starting.measure_both"


def measure(row: Row, options: Options, progress: Callable[[str], None]) -> Iterator[list[Figure]]:
    """Measure a row, or all of them one after another; each is given out as soon as it is done."""
    for name in _functions(row, options):
        module, function = name.split(".")
        # Imported when needed: they import torch, and a mistake in the arguments should be told at once.
        run = getattr(importlib.import_module(f"scripts.benchmarks.{module}"), function)
        yield run(options, lambda text, module=module: progress(f"{module}: {text}"))


def _functions(row: Row, options: Options) -> list[str]:
    if row is not Row.ALL:
        return [_MEASURES[row]]
    left_out = {Row.COLD_START, Row.MEMORY} | (set() if options.is_on_gpu else {Row.THROUGHPUT})
    return [_BOTH_STARTS, *(name for each, name in _MEASURES.items() if each not in left_out)]
