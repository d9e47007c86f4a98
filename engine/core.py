"""The engine's thread: chunks wait, decode in rows, are judged, rendered, and handed on.

One thread owns the models. Others only put messages into its queue (`submit`, `cancel`, `close`), so no
lock is held while a model runs and nothing of a request lies on a shared object.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine import guard
from engine.errors import SpeechError
from engine.models import SPEECH_TOKEN_RATE, ModelSpec
from engine.s3gen.renderer import Pass, Renderer
from engine.scheduler import Scheduler, Ticket, in_turns
from engine.t3.decoder import DecodedRow, Decoder, DecodeRequest
from engine.types import SAMPLE_RATE, IntArray
from engine.utterance import Utterance, as_speech_error, fail, is_out_of_memory
from engine.voices import PreparedVoices

STEPS_PER_LOOK = 8
"""Decoding steps between two looks at which rows have ended."""

SAMPLES_PER_TOKEN = SAMPLE_RATE // SPEECH_TOKEN_RATE

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
class _PassWork:
    utterance: Utterance
    index: int
    request: Pass


@dataclass(frozen=True)
class _RenderedPass:
    work: _PassWork
    outcome: Tensor | Exception
    elapsed_s: float


@dataclass(frozen=True)
class _Rendered:
    passes: list[_RenderedPass]


_Message = _Add | _Cancel | _Close | _Rendered


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
        render_beside: render in a thread of its own, beside decoding (CUDA), not between steps (CPU).
    """

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        renderer: Renderer,
        voices: PreparedVoices,
        finish: Callable[[Utterance], None],
        *,
        render_beside: bool = False,
    ) -> None:
        self._spec, self._decoder, self._renderer = spec, decoder, renderer
        self._voices, self._finish = voices, finish
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._scheduler = Scheduler()
        self._utterances: dict[int, Utterance] = {}
        self._rows: dict[int, Ticket] = {}  # by handle of the decoder
        self._ready: list[tuple[int, int]] = []  # utterance and pass, decoded and not yet rendered
        self._render_pool = ThreadPoolExecutor(1, "renderer") if render_beside else None
        self._is_rendering = False
        self._is_closing = False
        self._num_tokens = self._num_retries = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------ called from any thread

    def submit(self, utterance: Utterance) -> None:
        self._inbox.put(_Add(utterance))
        # After the utterance, so that a cancellation is never read before what it cancels.
        utterance.future.add_done_callback(
            lambda future: self._inbox.put(_Cancel(utterance.id)) if future.cancelled() else None
        )

    def close(self, *, drain: bool) -> None:
        """Finish (drain) or cancel what is there, then end the thread."""
        self._inbox.put(_Close(drain))
        self._thread.join()
        if self._render_pool is not None:
            self._render_pool.shutdown()

    def stats(self) -> CoreStats:
        return CoreStats(
            len(self._utterances), len(self._scheduler), len(self._rows), self._num_tokens, self._num_retries
        )

    # ------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while not (self._is_closing and not self._utterances):
            try:
                self._turn()
            except Exception as error:  # a fault of ours: no request may wait for ever because of it
                self._fail_all(error)

    def _turn(self) -> None:
        is_idle = not self._rows and not len(self._scheduler)
        self._read_inbox(wait=is_idle and (self._is_rendering or not self._ready))
        self._admit()
        self._decode()
        self._render()

    def _fail_all(self, error: Exception) -> None:
        """Let go of every utterance, even where the device no longer answers."""
        for utterance in list(self._utterances.values()):
            try:
                self._fail(utterance, error)
            except Exception:
                _log.exception("the engine could not let go of an utterance")
                self._utterances.pop(utterance.id, None)
                fail(utterance, SpeechError("generation_failed", "the engine failed on this request"))

    def _read_inbox(self, *, wait: bool) -> None:
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._handle(message)

    def _handle(self, message: _Message) -> None:
        match message:
            case _Add(utterance) if self._is_closing:
                fail(utterance, SpeechError("cancelled", "the engine is closing"))
            case _Add(utterance):
                self._utterances[utterance.id] = utterance
                self._queue(utterance)
            case _Cancel(utterance_id):
                self._drop(utterance_id)
            case _Rendered(passes):
                self._is_rendering = False
                self._receive(passes)
            case _Close(drain):
                self._is_closing = True
                for utterance in [] if drain else list(self._utterances.values()):
                    self._fail(utterance, SpeechError("cancelled", "the engine was closed"))

    def _queue(self, utterance: Utterance) -> None:
        """Have the chunks decoded; what has its tokens already, as a recording has, goes on to be rendered."""
        if utterance.settings is not None:
            num_rows = self._decoder.rows_for(utterance.settings)
            waiting = [index for index, chunk in enumerate(utterance.chunks) if not chunk.is_done]
            tickets = [Ticket(utterance.id, index, num_rows) for index in waiting]
            self._scheduler.add(tickets, is_stream=utterance.is_stream)
        passes = range(len(utterance.passes))
        self._ready += [(utterance.id, index) for index in passes if utterance.is_pass_decoded(index)]

    def _admit(self) -> None:
        while True:
            ticket = self._scheduler.next(self._decoder.num_adjacent_free_rows)
            if ticket is None:
                return
            utterance = self._utterances[ticket.job]
            try:
                self._admit_one(ticket, utterance)
            except Exception as error:  # one bad request never harms the one beside it
                if is_out_of_memory(error) and self._shrink():
                    self._scheduler.put_back(ticket, is_stream=utterance.is_stream)
                else:
                    self._fail(utterance, error)

    def _admit_one(self, ticket: Ticket, utterance: Utterance) -> None:
        started = time.perf_counter()
        utterance.timings.setdefault("queue", started - utterance.submitted_s)
        chunk = utterance.chunks[ticket.chunk]
        assert utterance.settings is not None, ticket
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
            if is_out_of_memory(error) and self._shrink():
                return
            for job in {ticket.job for ticket in self._rows.values()}:
                self._fail(self._utterances[job], error)
            return
        elapsed = time.perf_counter() - started
        for job in {ticket.job for ticket in self._rows.values()}:
            self._utterances[job].add_time("decode", elapsed)
        for handle, row in rows.items():
            self._look_at(handle, row)

    def _shrink(self) -> bool:
        """After running out of memory: go on with half the rows, the chunks in them to be decoded again.

        Returns:
            Whether there was anything to give up; if not, the one chunk that is left does not fit.
        """
        if not self._decoder.shrink():
            return False
        tickets, self._rows = list(self._rows.values()), {}
        _log.warning("out of memory: going on with %d rows", self._decoder.num_rows)
        for ticket in reversed(tickets):
            self._scheduler.put_back(ticket, is_stream=self._utterances[ticket.job].is_stream)
        return True

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
        elif utterance.is_pass_decoded(index := utterance.pass_of(ticket.chunk)):
            self._ready.append((ticket.job, index))

    def _render(self) -> None:
        """Start on passes that are decoded: here, or in the renderer's own thread when it is free."""
        if not self._ready or self._is_rendering:
            return
        work = self._take_ready()
        if not work:
            return
        if self._render_pool is None:
            self._receive(self._render_all(work))
        else:
            self._is_rendering = True
            self._render_pool.submit(lambda: self._inbox.put(_Rendered(self._render_all(work))))

    def _take_ready(self) -> list[_PassWork]:
        """As many passes as the renderer takes in one batch, at least one; the rest waits for the next turn.

        Utterances take turns, so that a long recording, whose passes are all ready at once, holds up nobody.
        """
        work: list[_PassWork] = []
        budget = self._renderer.max_frames
        for job, index in in_turns(self._ready):
            if budget <= 0 or job not in self._utterances:  # or it failed a moment ago, and its passes went with it
                continue
            self._ready.remove((job, index))
            utterance = self._utterances[job]
            try:
                work.append(_PassWork(utterance, index, self._pass(utterance, index)))
            except Exception as error:
                self._fail(utterance, error)
            else:
                budget -= work[-1].request.num_frames
        served = {item.utterance.id for item in work}
        self._ready.sort(key=lambda ready: ready[0] in served)  # whoever was served goes behind the others
        return work

    def _pass(self, utterance: Utterance, index: int) -> Pass:
        first = utterance.chunks[utterance.passes[index].start]
        return Pass(self._voices.flow(first.conditionals), self._pass_tokens(utterance, index), first.seed)

    def _pass_tokens(self, utterance: Utterance, index: int) -> IntArray:
        chunks = [utterance.chunks[chunk] for chunk in utterance.passes[index]]
        return np.concatenate([chunk.rendered_tokens(self._spec) for chunk in chunks])

    def _render_all(self, work: list[_PassWork]) -> list[_RenderedPass]:
        """Render together, or one by one when that fails, so that only the bad one fails."""
        started = time.perf_counter()
        try:
            waveforms = self._renderer.render([item.request for item in work])
            assert len(waveforms) == len(work), (len(waveforms), len(work))
        except Exception as error:
            if len(work) == 1:
                return [_RenderedPass(work[0], error, 0.0)]
            return [rendered for item in work for rendered in self._render_all([item])]
        elapsed = (time.perf_counter() - started) / len(work)
        return [_RenderedPass(item, waveform, elapsed) for item, waveform in zip(work, waveforms, strict=True)]

    def _receive(self, rendered: list[_RenderedPass]) -> None:
        for item in rendered:
            utterance = item.work.utterance
            if utterance.id not in self._utterances:
                continue
            if isinstance(item.outcome, Exception):
                self._fail(utterance, item.outcome)
                continue
            utterance.add_time("vocode", item.elapsed_s)
            utterance.waveforms.update(self._cut(utterance, item.work.index, item.outcome))
            if utterance.is_rendered:
                del self._utterances[utterance.id]
                self._finish(utterance)

    def _cut(self, utterance: Utterance, index: int, waveform: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A pass's waveform by chunk.

        A prompt of an odd number of frames takes one frame off the front.
        """
        start = len(waveform) - len(self._pass_tokens(utterance, index)) * SAMPLES_PER_TOKEN
        for number in utterance.passes[index]:
            chunk = utterance.chunks[number]
            yield number, waveform[max(0, start) : start + chunk.num_kept_tokens(self._spec) * SAMPLES_PER_TOKEN]
            start += len(chunk.rendered_tokens(self._spec)) * SAMPLES_PER_TOKEN

    def _release(self, handle: int) -> None:
        self._decoder.release(handle)
        del self._rows[handle]

    def _drop(self, utterance_id: int) -> None:
        """Forget an utterance and free all that it holds."""
        self._scheduler.cancel(utterance_id)
        for handle in [handle for handle, ticket in self._rows.items() if ticket.job == utterance_id]:
            self._release(handle)
        self._ready = [(job, index) for job, index in self._ready if job != utterance_id]
        self._utterances.pop(utterance_id, None)

    def _fail(self, utterance: Utterance, error: Exception) -> None:
        self._drop(utterance.id)
        fail(utterance, as_speech_error(error))


def _is_looping(row: DecodedRow) -> bool:
    """Looked at about once a second of speech: a loop found a little later costs little."""
    return len(row.tokens) % SPEECH_TOKEN_RATE < STEPS_PER_LOOK and guard.find_loop(row.tokens) is not None
