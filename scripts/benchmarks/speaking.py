"""Rows utterance, long-form, throughput and speak: text to finished audio, watermark included.

T3's weights are planted so that every chunk says a known number of tokens and stops by itself (weights.py):
both sides then do the same work, and neither is cut short nor runs on. Texts are as long as so much speech
reads, so that the guard finds nothing to have decoded again; a run in which it did is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import Engine, EngineConfig, Segment, Speech, SpeechRequest
from engine.guard import DEFAULT_CHARS_PER_SECOND
from engine.models import SPEECH_TOKEN_RATE
from engine.types import SAMPLE_RATE
from engine.utterance import NUM_CLOSING_SILENCES
from scripts.benchmarks.figures import BenchmarkError, Better, Figure, Outcome, Runner, Stopwatch, Values, take_turns
from scripts.benchmarks.options import MOST_TINY_TOKENS, Contender, Options
from scripts.benchmarks.targets import target
from scripts.benchmarks.upstream import generate, load_speaker
from scripts.benchmarks.weights import speaking_checkpoint

NUM_TOKENS = 200
NUM_CHUNKS = 16
MOST_THREADS = 16
MOST_TINY_CHARS = 200
"""Of a chunk of a tiny model, which cannot say as much (`MOST_TINY_TOKENS`) as 280 characters need."""

Progress = Callable[[str], None]

WORDS = (
    "the harbour lay quiet in the morning light and the boats rocked slowly against the old stone wall while gulls "
    "called over the water someone had left a lamp burning in the window above the bakery and its glow fell across "
    "the wet street where a dog slept beside an empty cart nobody hurried here for the tide kept better time than "
    "any clock and when it turned the whole town would wake at once with doors and voices and the smell of bread"
)
LONG_TEXT = (
    "The harbour lay quiet in the morning light, and the boats rocked slowly against the old stone wall while gulls "
    "called over the water. Someone had left a lamp burning in the window above the bakery, and its glow fell across "
    "the wet street, where a dog slept beside an empty cart. Nobody hurried here, for the tide kept better time than "
    "any clock, and when it turned, the whole town would wake at once with doors and voices and the smell of bread. "
    "A boy ran down the steps with a letter in his hand, past the nets that hung to dry and the women who mended them, "
    "and he did not stop until he reached the end of the pier, where the ferry from the island was just coming in with "
    "its flags up and its old brass bell ringing again."
)
"""724 characters."""


def measure_utterance(options: Options, progress: Progress) -> list[Figure]:
    num_tokens = options.chunk_tokens(NUM_TOKENS)
    outcome = _compare(options, progress, options.contenders(), [make_text(num_tokens, 0)], num_tokens)
    note = f"one chunk of {num_tokens} tokens, known voice"
    title, row = "One utterance, end to end", "utterance"
    return [
        *_figures(outcome, options, row, "seconds", title, "s", note),
        *_figures(outcome, options, row, "real-time-factor", f"{title}, real-time factor", "s/s", note),
    ]


def measure_long_form(options: Options, progress: Progress) -> list[Figure]:
    num_tokens = options.chunk_tokens(NUM_TOKENS)
    texts = [make_text(num_tokens, index) for index in range(NUM_CHUNKS)]
    outcome = _compare(options, progress, options.contenders(options.rows or (None,)), texts, num_tokens)
    note = f"{NUM_CHUNKS} chunks of {num_tokens} tokens; upstream one after another"
    return _figures(outcome, options, "long-form", "seconds", f"Long form, {NUM_CHUNKS} chunks, end to end", "s", note)


def measure_throughput(options: Options, progress: Progress) -> list[Figure]:
    """Many requests at once; twice as many as there are rows, so that rows are taken again."""
    num_tokens = options.chunk_tokens(NUM_TOKENS)
    contenders = options.contenders((64,) if options.is_on_gpu else (8,))
    folder = speaking_checkpoint(options, num_tokens)

    def load(contender: Contender) -> Runner:
        if contender.side == "upstream":
            return upstream_runner(options, folder, [make_text(num_tokens, 0)], num_tokens)
        engine = load_engine(options, folder, contender)
        texts = [make_text(num_tokens, index) for index in range(2 * (contender.rows or 1))]
        return Runner(lambda: _speak_all(engine, texts), dtypes_of(engine), close=engine.close)

    outcome = _take_turns(options, contenders, load, progress)
    note = f"chunks of {num_tokens} tokens, two requests per row"
    return [
        Figure(
            row="throughput",
            key="audio_s_per_s",
            title=f"Many requests, {ours.contender.rows} rows, end to end",
            unit="s/s",
            better="more",
            ours=ours,
            baseline=baseline,
            target=target(options, "throughput", ours.contender.rows),
            note=note,
        )
        for ours, baseline in outcome.compare("audio_s_per_s")
    ]


def measure_speak(options: Options, progress: Progress) -> list[Figure]:
    """Ours alone, a long text with several numbers of threads: which is best on this machine."""
    threads = options.threads or ((options.thread_counts[0],) if options.is_on_gpu else _thread_choices())
    folder = speaking_checkpoint(options, _speak_tokens(options))
    contenders = options.replace(threads=threads, against="nothing").contenders()
    # One after another, not in turns: an engine per number of threads would not fit in memory.
    outcomes = [
        take_turns(
            [contender],
            lambda contender: _long_text_runner(options, folder, contender),
            options.repeats,
            has_baseline=False,
            progress=progress,
        )
        for contender in contenders
    ]
    figures = [figure for outcome in outcomes for figure in _speak_figures(outcome)]
    return [*figures, _best_threads(outcomes)] if len(threads) > 1 else figures


# ---------------------------------------------------------------------------------------- comparing


def _compare(
    options: Options, progress: Progress, contenders: Sequence[Contender], texts: list[str], num_tokens: int
) -> Outcome:
    folder = speaking_checkpoint(options, num_tokens)

    def load(contender: Contender) -> Runner:
        if contender.side == "upstream":
            return upstream_runner(options, folder, texts, num_tokens)
        return _our_runner(options, folder, contender, texts)

    return _take_turns(options, contenders, load, progress)


def _take_turns(
    options: Options, contenders: Sequence[Contender], load: Callable[[Contender], Runner], progress: Progress
) -> Outcome:
    has_baseline = options.against != "nothing"
    return take_turns(contenders, load, options.repeats, has_baseline=has_baseline, progress=progress)


def _figures(outcome: Outcome, options: Options, row: str, key: str, title: str, unit: str, note: str) -> list[Figure]:
    goal = target(options, row if key == "seconds" else key)
    return [
        Figure(row, key, title, unit, "less", ours, baseline, target=goal, note=note)
        for ours, baseline in outcome.compare(key)
    ]


def make_text(num_tokens: int, index: int) -> str:
    """A sentence that takes about so many tokens to read; another index, another sentence."""
    wanted = num_tokens / SPEECH_TOKEN_RATE * DEFAULT_CHARS_PER_SECOND
    text = ""
    for word in itertools.islice(itertools.cycle(WORDS.split()), 3 * index, None):
        if len(text) + len(word) + 1 > wanted and text:
            break
        text = f"{text} {word}".strip()
    return text.capitalize() + "."


# ---------------------------------------------------------------------------------------- ours


def load_engine(options: Options, folder: Path, contender: Contender) -> Engine:
    """An engine of the contender's kind, with the weights of a folder."""
    most_chars = EngineConfig().max_chunk_chars if options.size == "full" else MOST_TINY_CHARS
    return Engine.load(
        EngineConfig(
            model=options.model,
            model_dir=folder,
            device=options.device,
            dtype=contender.dtype,
            max_rows=contender.rows,
            num_threads=contender.num_threads,
            max_chunk_chars=most_chars,
        )
    )


def dtypes_of(engine: Engine) -> str:
    """What it runs in, in words."""
    stats = engine.stats()
    return f"{stats['dtype']}, flow {stats['flow_dtype']}" if stats["dtype"] != stats["flow_dtype"] else stats["dtype"]


def _our_runner(options: Options, folder: Path, contender: Contender, texts: list[str]) -> Runner:
    engine, seeds = load_engine(options, folder, contender), itertools.count(1)

    def speak(spoken: list[str]) -> Values:
        request = SpeechRequest(segments=tuple(Segment(text) for text in spoken), seed=next(seeds))
        with Stopwatch() as watch:
            speech = engine.speak(request)
        check(speech, len(spoken))
        return _values(watch.seconds, speech.duration_s)

    return Runner(lambda: speak(texts), dtypes_of(engine), lambda: speak(texts[:1]), engine.close)


def _speak_all(engine: Engine, texts: list[str]) -> Values:
    with Stopwatch() as watch:
        futures = [engine.submit(SpeechRequest(text=text, seed=index)) for index, text in enumerate(texts)]
        speeches = [future.result() for future in futures]
    for speech in speeches:
        check(speech, 1)
    return _values(watch.seconds, sum(speech.duration_s for speech in speeches))


def _values(seconds: float, audio_s: float) -> Values:
    return {"seconds": seconds, "real-time-factor": seconds / audio_s, "audio_s_per_s": audio_s / seconds}


def check(speech: Speech, num_chunks: int | None) -> None:
    """Raises BenchmarkError where the work was not what both sides should do."""
    if num_chunks is not None and len(speech.chunks) != num_chunks:
        raise BenchmarkError(f"the text became {len(speech.chunks)} chunks, expected {num_chunks}")
    for chunk in speech.chunks:
        if chunk.attempts != 1 or chunk.flags:
            raise BenchmarkError(f"a chunk was decoded {chunk.attempts} times ({', '.join(chunk.flags)})")


# ---------------------------------------------------------------------------------------- upstream


def upstream_runner(options: Options, folder: Path, texts: list[str], num_tokens: int) -> Runner:
    """Upstream's own class, which speaks the texts one after another."""
    speaker = load_speaker(options, folder)
    closing = NUM_CLOSING_SILENCES if options.spec.family == "turbo" else 0
    num_samples = (num_tokens + closing) * SAMPLE_RATE // SPEECH_TOKEN_RATE

    def speak(spoken: list[str]) -> Values:
        with Stopwatch() as watch:
            audio = _join([generate(speaker, text) for text in spoken])
        if len(audio) != num_samples * len(spoken):
            raise BenchmarkError(f"upstream gave {len(audio)} samples, expected {num_samples * len(spoken)}")
        return _values(watch.seconds, len(audio) / SAMPLE_RATE)

    return Runner(lambda: speak(texts), "float32", lambda: speak(texts[:1]))


def _join(pieces: list[Any]) -> Any:
    import torch

    return torch.cat(pieces)


# ---------------------------------------------------------------------------------------- speak


def _speak_tokens(options: Options) -> int:
    """Tokens of a chunk so that the text is read at an unhurried pace; it becomes about four chunks."""
    unhurried = round(len(LONG_TEXT) / 4 / DEFAULT_CHARS_PER_SECOND * SPEECH_TOKEN_RATE)
    return min(unhurried, MOST_TINY_TOKENS) if options.size == "tiny" else unhurried


def _thread_choices() -> tuple[int, ...]:
    """1, 2, 4 … and the number of cores."""
    from engine.machine import probe

    cores = min(MOST_THREADS, probe().num_cores)
    return tuple(sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores}))


def _long_text_runner(options: Options, folder: Path, contender: Contender) -> Runner:
    engine = load_engine(options, folder, contender)
    first_text: list[str] = []

    def warm_up() -> object:
        """Finds out, too, which text the first chunk has."""
        first_text[:] = [engine.speak(SpeechRequest(text=LONG_TEXT, seed=1)).chunks[0].text]
        return None

    def run() -> Values:
        with Stopwatch() as first:
            engine.speak(SpeechRequest(text=first_text[0], seed=1))
        with Stopwatch() as total:
            speech = engine.speak(SpeechRequest(text=LONG_TEXT, seed=1))
        check(speech, None)
        return {
            "first_chunk_s": first.seconds,
            "total_s": total.seconds,
            "chars_per_s": len(LONG_TEXT) / total.seconds,
            "real-time-factor": total.seconds / speech.duration_s,
        }

    return Runner(run, dtypes_of(engine), warm_up, engine.close)


def _speak_figures(outcome: Outcome) -> list[Figure]:
    def figure(key: str, title: str, unit: str, better: Better) -> Figure:
        return Figure("speak", key, f"{len(LONG_TEXT)} characters: {title}", unit, better, outcome.series(0, key))

    return [
        figure("first_chunk_s", "first chunk, by itself", "s", "less"),
        figure("total_s", "total", "s", "less"),
        figure("chars_per_s", "characters per second", "chars/s", "more"),
        figure("real-time-factor", "real-time factor", "s/s", "less"),
    ]


def _best_threads(outcomes: Sequence[Outcome]) -> Figure:
    """The setting with the least total, its number of threads as the value."""
    best = min((outcome.series(0, "total_s") for outcome in outcomes), key=lambda series: series.median)
    series = dataclasses.replace(best, samples=(float(best.contender.num_threads),))
    note = "by the total; each number of threads with an engine of its own, one after another"
    return Figure("speak", "best_threads", "Best number of threads here", "threads", "less", series, note=note)
