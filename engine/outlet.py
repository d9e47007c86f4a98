"""The last hands that an utterance passes: its audio is joined, marked and given out while the rest is being made.

Everything happens in a pool's threads, beside the decoding, and for one utterance in order, one thing at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.audio.assembly import Joins
from engine.audio.watermark import Marking
from engine.errors import SpeechError
from engine.stream import SpeechStream
from engine.types import SAMPLE_RATE, UNVERIFIED_MARK, Chunk, FloatArray, Speech
from engine.utterance import Utterance, as_speech_error, fail, rounded, succeed

MOST_QUEUED_S = 60.0
"""Audio that may wait here for its mark before a stream's renderer waits too."""


@dataclass(frozen=True)
class Rendered:
    """Audio of one chunk, behind what was given of it before.

    Args:
        waveform: float32 (samples,) on the device.
        is_end: whether the chunk ends with it.
    """

    waveform: Tensor
    is_end: bool


class Outlet:
    """Takes an utterance's audio in order, from the engine's thread, and makes its speech.

    Args:
        utterance: whose.
        joiner: puts its chunks together.
        marking: puts the watermark in; None where the configuration turned it off.
        stream: gets the audio as it becomes final; None to keep it for the result.
        pool: does the work, one thing of each utterance in turn.
        on_taken: called when a stream that was far ahead may be so no more.
        on_error: told of what went wrong here, before the request ends with it.
        model: name of the model that speaks.
        warnings: what the result has to say beside the utterance's own.
    """

    def __init__(
        self,
        utterance: Utterance,
        joiner: Joins,
        marking: Marking | None,
        stream: SpeechStream | None,
        pool: Executor,
        *,
        on_taken: Callable[[], None],
        on_error: Callable[[BaseException], object],
        model: str,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self._utterance, self._joiner, self._marking, self._stream = utterance, joiner, marking, stream
        self._pool, self._on_taken, self._on_error = pool, on_taken, on_error
        self._model, self._warnings = model, warnings
        self._kept: list[FloatArray] = []
        self._to_do: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._is_running = False
        self._queued_s = 0.0

    # ------------------------------------------------------------------------------ the engine's thread

    def put(self, rendered: Rendered) -> None:
        """Give the next audio; returns at once."""
        seconds = len(rendered.waveform) / SAMPLE_RATE
        with self._lock:
            self._queued_s += seconds
        self._do(lambda: self._take(rendered, seconds))

    def end(self) -> None:
        """All was given; returns at once."""
        self._do(self._finish)

    @property
    def is_far_ahead(self) -> bool:
        """Whether whoever takes the audio has so much before them that more should wait."""
        return self._stream is not None and (self._queued_s > MOST_QUEUED_S or self._stream.is_far_ahead)

    # ------------------------------------------------------------------------------ the pool's threads

    def _do(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._to_do.append(work)
            if self._is_running:
                return
            self._is_running = True
        self._pool.submit(self._run)

    def _run(self) -> None:
        """One thing, and then whatever else the pool has to do before the next."""
        while True:
            with self._lock:
                work = self._to_do.popleft()
            if not self._utterance.future.done():
                self._try(work)
            with self._lock:
                self._is_running = bool(self._to_do)
                if not self._is_running:
                    return
            try:
                self._pool.submit(self._run)
                return
            except RuntimeError:  # it is being closed and takes nothing more: the rest is done here
                continue

    def _try(self, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            work()
        except BaseException as error:
            self._on_error(error)
            fail(self._utterance, as_speech_error(error))
        self._utterance.add_time("master", time.perf_counter() - started)

    def _take(self, rendered: Rendered, seconds: float) -> None:
        self._give(self._joiner.push(rendered.waveform, is_end=rendered.is_end))
        was_far_ahead = self.is_far_ahead
        with self._lock:
            self._queued_s -= seconds
        if was_far_ahead and not self.is_far_ahead:
            self._on_taken()

    def _give(self, joined: Tensor) -> None:
        audio: FloatArray = joined.cpu().numpy()
        if not np.isfinite(audio).all():
            raise SpeechError("generation_failed", "the model gave numbers that are not finite")
        self._hand_on(self._marking.push(audio) if self._marking is not None else audio)

    def _hand_on(self, audio: FloatArray) -> None:
        if self._stream is None:
            self._kept.append(audio)
        elif audio.size:
            if "first_audio" not in self._utterance.timings:
                self._utterance.add_time("first_audio", time.perf_counter() - self._utterance.submitted_s)
            self._stream.put_audio(audio, SAMPLE_RATE, self._joiner.num_joined, len(self._utterance.chunks))

    def _finish(self) -> None:
        self._give(self._joiner.finish())
        is_marked, warnings = False, list(self._utterance.warnings)
        if self._marking is not None:
            rest, is_marked = self._marking.finish()
            self._hand_on(rest)
            warnings += [] if is_marked else [UNVERIFIED_MARK]
        self._utterance.add_time("total", time.perf_counter() - self._utterance.submitted_s)
        succeed(self._utterance, self._speech(is_marked, tuple(warnings)))

    def _speech(self, is_marked: bool, warnings: tuple[str, ...]) -> Speech:
        utterance = self._utterance
        spans = zip(utterance.chunks, self._joiner.spans_s, strict=True)
        return Speech(
            waveform=np.concatenate(self._kept) if self._kept else np.zeros(0, np.float32),
            sample_rate=SAMPLE_RATE,
            chunks=tuple(
                Chunk(index, chunk.text, *span, attempts=chunk.attempts, flags=chunk.flags)
                for index, (chunk, span) in enumerate(spans)
            ),
            seed=utterance.seed,
            model=self._model,
            watermarked=is_marked,
            timings=rounded(utterance.timings),
            warnings=(*self._warnings, *warnings),
        )
