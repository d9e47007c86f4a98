"""A request on its way through the engine: its chunks, its passes, and what is left to do.

Made by the front end (text planned, voices resolved), then owned by the engine's thread alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from engine import guard, noise
from engine.audio.assembly import Clip, Joiner, Joins
from engine.errors import SpeechError
from engine.models import SILENCE_TOKEN, SPEECH_VOCAB_SIZE, START_SPEECH_TOKEN, ModelSpec
from engine.t3.decoder import DecodedRow
from engine.t3.sampling import SamplingSettings
from engine.types import Conditionals, IntArray, Speech

_log = logging.getLogger(__name__)

NUM_CLOSING_SILENCES = 3
"""Silence tokens that upstream appends for Turbo and Nano before S3Gen."""

PASS_TOKENS = 400
"""Consecutive chunks of one voice share a pass of S3Gen, and so its prompt, up to so many expected tokens."""


@dataclass
class ChunkWork:
    """One chunk and its attempts.

    Args:
        text: as the caller wrote it.
        text_tokens: for T3.
        conditionals: of its voice.
        expectation: how many speech tokens the text can need.
        max_new_tokens: where decoding is cut off.
        seed: of the chunk; each attempt derives its own.
        pause_before_s, pause_after_s: silence around it.
    """

    text: str
    text_tokens: IntArray
    conditionals: Conditionals
    expectation: guard.Expectation
    max_new_tokens: int
    seed: int
    pause_before_s: float = 0.0
    pause_after_s: float = 0.0
    attempts: int = 0
    tokens: IntArray | None = None
    flags: tuple[str, ...] = ()
    is_done: bool = False
    kept_as: str = ""  # key of its tokens in a work store
    so_far: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))  # of the attempt under way, if it is heard
    num_given: int = 0  # of them, rendered already: they can be taken back no more

    @property
    def attempt_seed(self) -> int:
        return noise.derive_seed(self.seed, "attempt", self.attempts)

    @property
    def spoken_tokens(self) -> IntArray:
        """The kept attempt's tokens."""
        assert self.tokens is not None
        return self.tokens

    def rendered_tokens(self, spec: ModelSpec) -> IntArray:
        """The tokens as S3Gen speaks them; of a chunk that is not done, those so far."""
        if not self.is_done:
            return self.so_far
        if spec.family != "turbo":
            return self.spoken_tokens
        closing = np.full(NUM_CLOSING_SILENCES, SILENCE_TOKEN, dtype=self.spoken_tokens.dtype)
        return np.concatenate((self.spoken_tokens, closing))

    def num_kept_tokens(self, spec: ModelSpec) -> int:
        """Of how many of the rendered tokens the audio is kept: multilingual models decode the last to noise."""
        num_rendered = len(self.rendered_tokens(spec))
        return max(1, num_rendered - 1) if spec.trim_last_token else num_rendered

    def record(self, row: DecodedRow, spec: ModelSpec) -> bool:
        """Take in a finished attempt; whether the chunk is done (else it is to be decoded again)."""
        self.attempts += 1
        tokens = valid_tokens(row.tokens, spec)
        flags = guard.judge(tokens, self.expectation, has_stopped=row.has_stopped)
        if self.tokens is None or self.num_given or guard.is_better(flags, self.flags):
            self.tokens, self.flags = self._after_what_is_given(guard.trim_loop(tokens, flags)), flags
        self.is_done = not self.flags or self.attempts >= guard.MAX_ATTEMPTS or self.num_given > 0
        self.so_far = self.so_far[:0]
        return self.is_done

    def _after_what_is_given(self, tokens: IntArray) -> IntArray:
        """The tokens, or where they do not continue what was heard already, that alone."""
        given = self.so_far[: self.num_given]
        return tokens if np.array_equal(tokens[: len(given)], given) else given


def valid_tokens(tokens: IntArray, spec: ModelSpec) -> IntArray:
    """The tokens that S3Gen may see, as upstream cuts them.

    Original and multilingual keep what follows a start token; all drop control tokens.
    """
    starts = np.flatnonzero(tokens == START_SPEECH_TOKEN)
    if spec.uses_cfg and len(starts):
        tokens = tokens[starts[0] + 1 :]
    return tokens[tokens < SPEECH_VOCAB_SIZE]


def plan_passes(chunks: Sequence[ChunkWork], max_tokens: int = PASS_TOKENS) -> tuple[range, ...]:
    """Which consecutive chunks S3Gen speaks in one pass.

    The text and the voices alone decide, so that a resumed or changed job has the same boundaries.
    """
    passes: list[range] = []
    expected = 0
    for index, chunk in enumerate(chunks):
        joins = (
            bool(passes)
            and expected + chunk.expectation.likely_tokens <= max_tokens
            and chunk.conditionals.key == chunks[index - 1].conditionals.key
        )
        expected = expected + chunk.expectation.likely_tokens if joins else chunk.expectation.likely_tokens
        start = passes.pop().start if joins else index
        passes.append(range(start, index + 1))
    return tuple(passes)


@dataclass
class Utterance:
    """A request being served.

    Args:
        id: unique in the engine.
        future: stays pending until the result is set, so that it can be cancelled at any time.
        seed: the request's, drawn if it named none.
        settings: sampling; None where nothing is to be decoded.
        exaggeration: emotion intensity, None for models without.
        chunks: in order.
        warnings: what could not be done.
        timings: seconds by stage so far.
        is_early: its audio is given out while its chunks are still decoding; goes before batch work.
    """

    id: int
    future: Future[Speech]
    seed: int
    settings: SamplingSettings | None
    exaggeration: float | None
    chunks: Sequence[ChunkWork]
    warnings: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    is_early: bool = False
    submitted_s: float = field(default_factory=time.perf_counter)
    settling: threading.RLock = field(default_factory=threading.RLock)
    passes: tuple[range, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.passes = self.plan()

    def plan(self) -> tuple[range, ...]:
        """Which chunks share a pass of S3Gen."""
        return plan_passes(self.chunks)

    def joiner(self) -> Joins:
        """Puts its chunks together."""
        clips = [Clip(c.pause_before_s, c.pause_after_s, c.conditionals.key) for c in self.chunks]
        return Joiner(clips, even_levels=not self.is_early)

    def add_time(self, stage: str, seconds: float) -> None:
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds

    def pass_of(self, chunk: int) -> int:
        """Index of the pass that speaks a chunk."""
        return next(index for index, chunks in enumerate(self.passes) if chunk in chunks)

    def is_pass_decoded(self, index: int) -> bool:
        return all(self.chunks[chunk].is_done for chunk in self.passes[index])


def chunk_seeds(seed: int, texts: Sequence[str]) -> list[int]:
    """A seed per chunk from the request's seed, the chunk's text and how often that text came before.

    A changed sentence changes its own seed only.
    """
    seen: dict[str, int] = {}
    seeds = []
    for text in texts:
        occurrence = seen[text] = seen.get(text, -1) + 1
        seeds.append(noise.derive_seed(seed, "chunk", text, occurrence))
    return seeds


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory: an error class on CUDA, a message of the allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def as_speech_error(error: BaseException) -> SpeechError:
    """The error that a caller sees; what is not one of ours is logged here, in full."""
    if isinstance(error, SpeechError):
        return error
    if is_out_of_memory(error):
        return SpeechError("out_of_memory", "the request does not fit in the device's memory")
    _log.error("a request failed inside the engine", exc_info=error)
    return SpeechError("generation_failed", f"the engine failed on this request: {type(error).__name__}")


def fail(utterance: Utterance, error: BaseException) -> None:
    """End a request with an error, unless it has ended."""
    _settle(utterance, lambda future: future.set_exception(error))


def succeed(utterance: Utterance, speech: Speech) -> None:
    """End a request with its audio, unless it has ended."""
    _settle(utterance, lambda future: future.set_result(speech))


def _settle(utterance: Utterance, settle: Callable[[Future[Speech]], None]) -> None:
    """Several threads may end a request; the first does."""
    with utterance.settling:
        if not utterance.future.done() and utterance.future.set_running_or_notify_cancel():
            settle(utterance.future)


def rounded(timings: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(seconds, 6) for stage, seconds in timings.items()}
