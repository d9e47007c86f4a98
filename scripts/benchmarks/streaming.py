"""Rows stream and plan: how soon a listener hears something, and how long a book takes to be cut into chunks.

Upstream cannot stream: its first audio is a whole chunk, so that is what a first piece is held against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine import Segment, SpeechRequest
from engine.text import plan
from engine.types import SAMPLE_RATE
from scripts.benchmarks.figures import BenchmarkError, Figure, Runner, Stopwatch, Values, take_turns
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.speaking import LONG_TEXT, NUM_TOKENS, check, dtypes_of, load_engine, make_text, upstream_runner
from scripts.benchmarks.targets import target
from scripts.benchmarks.weights import speaking_checkpoint

PLANNED_CHARS = 500_000

Progress = Callable[[str], None]


def measure_stream(options: Options, progress: Progress) -> list[Figure]:
    """One chunk, in a voice that is known, until its first piece."""
    num_tokens = options.chunk_tokens(NUM_TOKENS)
    folder = speaking_checkpoint(options, num_tokens)

    def load(contender: Contender) -> Runner:
        if contender.side == "upstream":
            return _upstream_runner(options, folder, num_tokens)
        return _our_runner(options, folder, contender, num_tokens)

    has_baseline = options.against != "nothing"
    contenders = options.contenders()
    outcome = take_turns(contenders, load, options.repeats, has_baseline=has_baseline, progress=progress)
    note = f"one chunk of {num_tokens} tokens, known voice; upstream's first audio is the whole chunk"
    titles = {"first_audio_s": "Stream, first audio", "total_s": "Stream, all of it"}
    return [
        Figure("stream", key, title, "s", "less", ours, baseline, target=target(options, key), note=note)
        for key, title in titles.items()
        for ours, baseline in outcome.compare(key)
    ]


def measure_plan(options: Options, progress: Progress) -> list[Figure]:
    """Ours alone, on the host: no model takes part."""

    def run() -> Values:
        paragraphs = (f"Part {number}. {LONG_TEXT}" for number in itertools.count(1))
        text = "\n\n".join(itertools.islice(paragraphs, PLANNED_CHARS // len(LONG_TEXT)))
        with Stopwatch() as watch:
            chunks = plan([Segment(text)], language="en")
        if sum(len(chunk.text) for chunk in chunks) < 0.99 * len(text):
            raise BenchmarkError("the plan lost text")
        return {"seconds": watch.seconds}

    (contender,) = options.replace(against="nothing", dtypes=("auto",), rows=(), threads=(1,)).contenders()
    outcome = take_turns(
        [contender], lambda _: Runner(run, "no model"), options.repeats, has_baseline=False, progress=progress
    )
    title = f"Planning {PLANNED_CHARS:,} characters"
    ours = outcome.series(0, "seconds")
    return [Figure("plan", "seconds", title, "s", "less", ours, target=target(options, "plan"))]


def _our_runner(options: Options, folder: Path, contender: Contender, num_tokens: int) -> Runner:
    engine, seeds = load_engine(options, folder, contender), itertools.count(1)

    def run() -> Values:
        request = SpeechRequest(text=make_text(num_tokens, 0), seed=next(seeds))
        with Stopwatch() as total:
            with Stopwatch() as first:
                stream = engine.stream(request)
                pieces = [next(stream)]
            pieces += stream
        speech = pieces[-1].speech
        assert speech is not None
        check(speech, 1)
        if sum(piece.waveform.size for piece in pieces) != round(speech.chunks[-1].end_s * SAMPLE_RATE):
            raise BenchmarkError("the stream lost audio")
        if len(pieces) < 3 or not np.abs(pieces[0].waveform).max():
            raise BenchmarkError("the first piece is not a piece of speech")
        return {"first_audio_s": first.seconds, "total_s": total.seconds}

    return Runner(run, dtypes_of(engine), close=engine.close)


def _upstream_runner(options: Options, folder: Path, num_tokens: int) -> Runner:
    whole = upstream_runner(options, folder, [make_text(num_tokens, 0)], num_tokens)

    def run() -> Values:
        seconds = whole.run()["seconds"]
        return {"first_audio_s": seconds, "total_s": seconds}

    return Runner(run, whole.dtype, close=whole.close)
