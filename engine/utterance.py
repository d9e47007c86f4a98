"""A request on its way through the engine: its chunks, its passes, and what is left to do.

Made by the front end (text planned, voices resolved), then owned by the engine's thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from engine import guard, noise
from engine.models import SILENCE_TOKEN, SPEECH_VOCAB_SIZE, START_SPEECH_TOKEN, ModelSpec
from engine.t3.decoder import DecodedRow
from engine.t3.sampling import SamplingSettings
from engine.types import Conditionals, IntArray, Speech

NUM_CLOSING_SILENCES = 3
"""Silence tokens that upstream appends for Turbo and Nano before S3Gen."""


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

    @property
    def attempt_seed(self) -> int:
        return noise.derive_seed(self.seed, "attempt", self.attempts)

    def record(self, row: DecodedRow, spec: ModelSpec) -> bool:
        """Take in a finished attempt; whether the chunk is done (else it is to be decoded again)."""
        self.attempts += 1
        tokens = valid_tokens(row.tokens, spec)
        flags = guard.judge(tokens, self.expectation, has_stopped=row.has_stopped)
        if self.tokens is None or guard.is_better(flags, self.flags):
            self.tokens, self.flags = guard.trim_loop(tokens, flags), flags
        self.is_done = not self.flags or self.attempts >= guard.MAX_ATTEMPTS
        return self.is_done


def valid_tokens(tokens: IntArray, spec: ModelSpec) -> IntArray:
    """The tokens that S3Gen may see, as upstream cuts them.

    Original and multilingual keep what follows a start token; all drop control tokens.
    """
    starts = np.flatnonzero(tokens == START_SPEECH_TOKEN)
    if spec.uses_cfg and len(starts):
        tokens = tokens[starts[0] + 1 :]
    return tokens[tokens < SPEECH_VOCAB_SIZE]


def rendered_tokens(tokens: IntArray, spec: ModelSpec) -> IntArray:
    """A chunk's tokens as S3Gen speaks them."""
    if spec.family != "turbo":
        return tokens
    return np.concatenate((tokens, np.full(NUM_CLOSING_SILENCES, SILENCE_TOKEN, dtype=tokens.dtype)))


@dataclass
class Utterance:
    """A request being served.

    Args:
        id: unique in the engine.
        future: stays pending until the result is set, so that it can be cancelled at any time.
        seed: the request's, drawn if it named none.
        settings: sampling.
        exaggeration: emotion intensity, None for models without.
        chunks: in order.
        warnings: what could not be done.
        timings: seconds by stage so far.
        is_stream: goes before batch work.
    """

    id: int
    future: Future[Speech]
    seed: int
    settings: SamplingSettings
    exaggeration: float | None
    chunks: list[ChunkWork]
    warnings: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    is_stream: bool = False
    submitted_s: float = field(default_factory=time.perf_counter)
    waveforms: dict[int, Tensor] = field(default_factory=dict)  # by chunk

    def add_time(self, stage: str, seconds: float) -> None:
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds

    @property
    def is_decoded(self) -> bool:
        return all(chunk.is_done for chunk in self.chunks)

    @property
    def is_rendered(self) -> bool:
        return len(self.waveforms) == len(self.chunks)


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


def fail(utterance: Utterance, error: BaseException) -> None:
    """End a request with an error, unless it was cancelled."""
    if utterance.future.set_running_or_notify_cancel():
        utterance.future.set_exception(error)


def succeed(utterance: Utterance, speech: Speech) -> None:
    """End a request with its audio, unless it was cancelled."""
    if utterance.future.set_running_or_notify_cancel():
        utterance.future.set_result(speech)


def rounded(timings: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(seconds, 6) for stage, seconds in timings.items()}
