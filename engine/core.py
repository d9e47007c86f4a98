"""The engine's thread: chunks wait, decode in rows, are judged, rendered, and handed on.

One thread owns the models. Others only put messages into its queue (`submit`, `cancel`, `close`), so no
lock is held while a model runs and nothing of a request lies on a shared object.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine import guard
from engine.errors import SpeechError
from engine.models import SPEECH_TOKEN_RATE, ModelSpec
from engine.s3gen.renderer import Pass, Renderer
from engine.scheduler import Scheduler, Ticket
from engine.t3.decoder import DecodedRow, Decoder, DecodeRequest
from engine.types import SAMPLE_RATE
from engine.utterance import ChunkWork, Utterance, fail, rendered_tokens
from engine.voices import PreparedVoices

STEPS_PER_LOOK = 8
"""Decoding steps between two looks at which rows have ended."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Add:
    utterance: Utterance


@dataclass(frozen=True)
class _Cancel:
    utterance_id: int


@dataclass(frozen=True)
class _Close:
    drain: bool


@dataclass(frozen=True)
class CoreStats:
    """How busy the rows are."""

    num_utterances: int
    num_waiting_chunks: int
    num_decoding_chunks: int
    num_tokens: int
    num_retries: int


class Core:
    """Decoding and rendering of all utterances.

    Args:
        spec: the model.
        decoder: T3's rows.
        renderer: S3Gen.
        voices: prepared voices.
        finish: takes an utterance whose chunks are all rendered; must return at once.
    """

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        renderer: Renderer,
        voices: PreparedVoices,
        finish: Callable[[Utterance], None],
    ) -> None:
        self._spec, self._decoder, self._renderer = spec, decoder, renderer
        self._voices, self._finish = voices, finish
        self._inbox: queue.SimpleQueue[_Add | _Cancel | _Close] = queue.SimpleQueue()
        self._scheduler = Scheduler()
        self._utterances: dict[int, Utterance] = {}
        self._rows: dict[int, Ticket] = {}  # by handle of the decoder
        self._ready: list[Ticket] = []  # decoded, not yet rendered
        self._is_closing = False
        self._num_tokens = self._num_retries = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------ called from any thread

    def submit(self, utterance: Utterance) -> None:
        utterance.future.add_done_callback(
            lambda future: self._inbox.put(_Cancel(utterance.id)) if future.cancelled() else None
        )
        self._inbox.put(_Add(utterance))

    def close(self, *, drain: bool) -> None:
        """Finish (drain) or cancel what is there, then end the thread."""
        self._inbox.put(_Close(drain))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> CoreStats:
        return CoreStats(
            len(self._utterances), len(self._scheduler), len(self._rows), self._num_tokens, self._num_retries
        )

    # ------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while not (self._is_closing and not self._utterances):
            self._read_inbox(wait=not self._rows and not self._ready and not len(self._scheduler))
            self._admit()
            self._decode()
            self._render()

    def _read_inbox(self, *, wait: bool) -> None:
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._handle(message)

    def _handle(self, message: _Add | _Cancel | _Close) -> None:
        match message:
            case _Add(utterance) if self._is_closing:
                fail(utterance, SpeechError("cancelled", "the engine is closing"))
            case _Add(utterance):
                self._utterances[utterance.id] = utterance
                num_rows = self._decoder.rows_for(utterance.settings)
                tickets = [Ticket(utterance.id, index, num_rows) for index in range(len(utterance.chunks))]
                self._scheduler.add(tickets, is_stream=utterance.is_stream)
            case _Cancel(utterance_id):
                self._drop(utterance_id)
            case _Close(drain):
                self._is_closing = True
                for utterance in [] if drain else list(self._utterances.values()):
                    self._fail(utterance, SpeechError("cancelled", "the engine was closed"))

    def _admit(self) -> None:
        while True:
            ticket = self._scheduler.next(self._decoder.num_adjacent_free_rows)
            if ticket is None:
                return
            utterance = self._utterances[ticket.job]
            try:
                self._admit_one(ticket, utterance)
            except Exception as error:  # one bad request never harms the one beside it
                self._fail(utterance, error)

    def _admit_one(self, ticket: Ticket, utterance: Utterance) -> None:
        started = time.perf_counter()
        utterance.timings.setdefault("queue", started - utterance.submitted_s)
        chunk = utterance.chunks[ticket.chunk]
        prepared = self._voices.get(chunk.conditionals, utterance.exaggeration)
        request = DecodeRequest(
            prefix=prepared.prefix,
            text_tokens=chunk.text_tokens,
            settings=utterance.settings,
            seed=chunk.attempt_seed,
            max_new_tokens=chunk.max_new_tokens,
        )
        handle = self._decoder.admit(request)
        assert handle is not None, "the scheduler gave more than there are rows"
        self._rows[handle] = ticket
        utterance.add_time("prefill", time.perf_counter() - started)

    def _decode(self) -> None:
        if not self._rows:
            return
        started = time.perf_counter()
        try:
            self._decoder.step(STEPS_PER_LOOK)
            rows = self._decoder.read()
        except Exception as error:
            for ticket in list(self._rows.values()):
                self._fail(self._utterances[ticket.job], error)
            return
        elapsed = time.perf_counter() - started
        for job in {ticket.job for ticket in self._rows.values()}:
            self._utterances[job].add_time("decode", elapsed)
        for handle, row in rows.items():
            self._look_at(handle, row)

    def _look_at(self, handle: int, row: DecodedRow) -> None:
        ticket = self._rows.get(handle)
        if ticket is None:  # its utterance failed a moment ago
            return
        utterance = self._utterances[ticket.job]
        if row.is_broken:
            self._fail(utterance, SpeechError("generation_failed", "the model gave numbers that are not finite"))
        elif row.has_ended or _is_looping(row):
            self._release(handle)
            self._num_tokens += len(row.tokens)
            self._take(ticket, utterance, row)

    def _take(self, ticket: Ticket, utterance: Utterance, row: DecodedRow) -> None:
        chunk = utterance.chunks[ticket.chunk]
        if not chunk.record(row, self._spec):
            self._num_retries += 1
            self._scheduler.put_back(ticket, is_stream=utterance.is_stream)
        elif guard.FLAG_EMPTY in chunk.flags:
            self._fail(utterance, SpeechError("generation_failed", f"no speech came out for {chunk.text!r}", "text"))
        else:
            self._ready.append(ticket)

    def _render(self) -> None:
        ready, self._ready = self._ready, []
        if not ready:
            return
        started = time.perf_counter()
        try:
            waveforms = self._renderer.render([self._pass_of(ticket) for ticket in ready])
        except Exception as error:
            if len(ready) == 1:
                self._fail(self._utterances[ready[0].job], error)
            for ticket in ready if len(ready) > 1 else []:  # alone, so that only the bad one fails
                self._ready = [ticket]
                self._render()
            return
        elapsed = time.perf_counter() - started
        for ticket, waveform in zip(ready, waveforms, strict=True):
            utterance = self._utterances.get(ticket.job)
            if utterance is None:
                continue
            utterance.add_time("vocode", elapsed / len(ready))
            utterance.waveforms[ticket.chunk] = waveform[: self._num_samples(utterance.chunks[ticket.chunk], waveform)]
            if utterance.is_rendered:
                del self._utterances[ticket.job]
                self._finish(utterance)

    def _pass_of(self, ticket: Ticket) -> Pass:
        utterance = self._utterances[ticket.job]
        chunk = utterance.chunks[ticket.chunk]
        assert chunk.tokens is not None
        voice = self._voices.get(chunk.conditionals, utterance.exaggeration).flow
        return Pass(voice, rendered_tokens(chunk.tokens, self._spec), chunk.seed)

    def _num_samples(self, chunk: ChunkWork, waveform: object) -> int:
        """All samples, or without the last token's, which multilingual models decode to noise."""
        assert chunk.tokens is not None
        num_tokens = len(rendered_tokens(chunk.tokens, self._spec))
        kept = max(1, num_tokens - 1) if self._spec.trim_last_token else num_tokens
        return kept * SAMPLE_RATE // SPEECH_TOKEN_RATE

    def _release(self, handle: int) -> None:
        self._decoder.release(handle)
        del self._rows[handle]

    def _drop(self, utterance_id: int) -> None:
        """Forget an utterance and free all that it holds."""
        self._scheduler.cancel(utterance_id)
        for handle in [handle for handle, ticket in self._rows.items() if ticket.job == utterance_id]:
            self._release(handle)
        self._ready = [ticket for ticket in self._ready if ticket.job != utterance_id]
        self._utterances.pop(utterance_id, None)

    def _fail(self, utterance: Utterance, error: Exception) -> None:
        self._drop(utterance.id)
        if not isinstance(error, SpeechError):
            _log.error("an utterance failed inside the engine", exc_info=error)
            error = SpeechError("generation_failed", f"the engine failed on this request: {type(error).__name__}")
        fail(utterance, error)


def _is_looping(row: DecodedRow) -> bool:
    """Looked at about once a second of speech: a loop found a little later costs little."""
    return len(row.tokens) % SPEECH_TOKEN_RATE < STEPS_PER_LOOK and guard.find_loop(row.tokens) is not None
