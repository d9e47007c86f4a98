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
from engine.keeping import Keeper
from engine.models import SPEECH_TOKEN_RATE, ModelSpec
from engine.outlet import Outlet
from engine.rendering import Rendering, Serving
from engine.s3gen.renderer import Renderer
from engine.scheduler import Scheduler, Ticket
from engine.t3.decoder import DecodedRow, Decoder, DecodeRequest
from engine.utterance import Utterance, as_speech_error, fail, is_out_of_memory, valid_tokens
from engine.voices import PreparedVoices
from engine.watch import DeviceWatch, lost

STEPS_PER_LOOK = 8
"""Decoding steps between two looks at which rows have ended."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Add:
    serving: Serving


@dataclass(frozen=True)
class _Cancel:
    utterance_id: int


@dataclass(frozen=True)
class _Close:
    drain: bool


@dataclass(frozen=True)
class _Do:
    """Something for the engine's thread to do between two steps."""

    work: Callable[[], None]


_Message = _Add | _Cancel | _Close | _Do


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
        watch: knows whether the device still works.
        render_beside: render in a thread of its own, beside decoding (CUDA), not between steps (CPU).
    """

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        renderer: Renderer,
        voices: PreparedVoices,
        watch: DeviceWatch,
        *,
        render_beside: bool = False,
    ) -> None:
        self._spec, self._decoder, self._voices, self._watch = spec, decoder, voices, watch
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._scheduler = Scheduler()
        self._served: dict[int, Serving] = {}
        self._rows: dict[int, Ticket] = {}  # by handle of the decoder
        self._rendering = Rendering(
            spec,
            renderer,
            voices,
            post=lambda work: self._inbox.put(_Do(work)),
            end=lambda serving: self._forget(serving.utterance.id),
            fail=lambda serving, error: self._fail(serving.utterance, error),
            beside=render_beside,
        )
        self._is_closing = self._has_ended = False
        self._num_tokens = self._num_retries = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------ called from any thread

    def submit(self, utterance: Utterance, outlet: Outlet, keeper: Keeper | None = None) -> None:
        """Serve an utterance: its audio goes to `outlet`, its work to `keeper`."""
        self._inbox.put(_Add(Serving.of(utterance, outlet, keeper)))
        # After the utterance, so that a cancellation is never read before what it cancels. Whatever else ends it,
        # such as an outlet that cannot go on, ends its work here too.
        utterance.future.add_done_callback(lambda _: self._inbox.put(_Cancel(utterance.id)))
        if self._has_ended:  # nobody reads the inbox any more; what came before was read
            fail(utterance, SpeechError("cancelled", "the engine is closed"))

    def look(self) -> None:
        """Tell that an outlet which was far ahead may be so no more."""
        self._inbox.put(_Do(lambda: None))

    def close(self, *, drain: bool) -> None:
        """Finish (drain) or cancel what is there, then end the thread."""
        self._inbox.put(_Close(drain))
        self._thread.join()
        self._rendering.close()

    def stats(self) -> CoreStats:
        return CoreStats(len(self._served), len(self._scheduler), len(self._rows), self._num_tokens, self._num_retries)

    # ------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while not (self._is_closing and not self._served):
            try:
                self._turn()
            except Exception as error:  # a fault of ours: no request may wait for ever because of it
                self._fail_all(error)
        self._has_ended = True
        self._read_inbox(wait=False)  # what came since the last look is refused

    def _turn(self) -> None:
        is_idle = not self._rows and not len(self._scheduler)
        self._read_inbox(wait=is_idle and not self._rendering.has_work)
        self._admit()
        self._decode()
        self._rendering.render()

    def _fail_all(self, error: Exception) -> None:
        """Let go of every utterance, even where the device no longer answers."""
        if self._watch.look(error):
            error = lost()
        for serving in list(self._served.values()):
            utterance = serving.utterance
            try:
                self._drop(utterance.id)
            except Exception:
                _log.exception("the engine could not let go of an utterance")
                self._forget(utterance.id)
            fail(utterance, as_speech_error(error))
        if self._watch.is_lost:  # what is in a row can no longer be told to leave it
            self._rows = {}

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
            case _Add(serving) if self._is_closing:
                fail(serving.utterance, SpeechError("cancelled", "the engine is closing"))
            case _Add(serving) if self._watch.is_lost:
                fail(serving.utterance, lost())
            case _Add(serving):
                self._served[serving.utterance.id] = serving
                self._queue(serving)
            case _Cancel(utterance_id):
                self._drop(utterance_id)
            case _Do(work):
                work()
            case _Close(drain):
                self._is_closing = self._rendering.is_draining = True
                for serving in [] if drain else list(self._served.values()):
                    self._fail(serving.utterance, SpeechError("cancelled", "the engine was closed"))

    def _queue(self, serving: Serving) -> None:
        """Have the chunks decoded; what has its tokens already, as a recording has, goes on to be rendered."""
        utterance = serving.utterance
        if utterance.settings is not None:
            num_rows = self._decoder.rows_for(utterance.settings)
            waiting = [index for index, chunk in enumerate(utterance.chunks) if not chunk.is_done]
            tickets = [Ticket(utterance.id, index, num_rows) for index in waiting]
            self._scheduler.add(tickets, is_stream=utterance.is_early)
        self._rendering.add(serving)

    def _admit(self) -> None:
        while True:
            ticket = self._scheduler.next(self._decoder.num_adjacent_free_rows)
            if ticket is None:
                return
            utterance = self._served[ticket.job].utterance
            try:
                self._admit_one(ticket, utterance)
            except Exception as error:  # one bad request never harms the one beside it
                if is_out_of_memory(error) and self._shrink():
                    self._scheduler.put_back(ticket, is_stream=utterance.is_early)
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
                if job in self._served:  # else an error before it spoiled the device, and ended all
                    self._fail(self._served[job].utterance, error)
            return
        elapsed = time.perf_counter() - started
        for job in {ticket.job for ticket in self._rows.values()}:
            self._served[job].utterance.add_time("decode", elapsed)
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
            self._scheduler.put_back(ticket, is_stream=self._served[ticket.job].utterance.is_early)
        return True

    def _look_at(self, handle: int, row: DecodedRow) -> None:
        ticket = self._rows.get(handle)
        if ticket is None:  # its utterance failed a moment ago
            return
        utterance = self._served[ticket.job].utterance
        if row.is_broken:
            self._fail(utterance, SpeechError("generation_failed", "the model gave numbers that are not finite"))
        elif row.has_ended or _is_looping(row):
            self._release(handle)
            self._num_tokens += len(row.tokens)
            self._take(ticket, utterance, row)
        elif utterance.is_early:
            chunk, tokens = utterance.chunks[ticket.chunk], valid_tokens(row.tokens, self._spec)
            if len(tokens) > len(chunk.so_far):  # decoded anew after running out of memory, it is behind itself
                chunk.so_far = tokens

    def _take(self, ticket: Ticket, utterance: Utterance, row: DecodedRow) -> None:
        chunk = utterance.chunks[ticket.chunk]
        if not chunk.record(row, self._spec):
            self._num_retries += 1
            self._scheduler.put_back(ticket, is_stream=utterance.is_early)
        elif guard.FLAG_EMPTY in chunk.flags:
            self._fail(utterance, SpeechError("generation_failed", f"no speech came out for {chunk.text!r}", "text"))
        else:
            self._rendering.take_decoded(self._served[ticket.job], ticket.chunk)

    def _release(self, handle: int) -> None:
        self._decoder.release(handle)
        del self._rows[handle]

    def _drop(self, utterance_id: int) -> None:
        """Forget an utterance and free all that it holds."""
        self._scheduler.cancel(utterance_id)
        for handle in [handle for handle, ticket in self._rows.items() if ticket.job == utterance_id]:
            self._release(handle)
        self._forget(utterance_id)

    def _forget(self, utterance_id: int) -> None:
        serving = self._served.pop(utterance_id, None)
        if serving is not None:
            self._rendering.drop(serving)

    def _fail(self, utterance: Utterance, error: Exception) -> None:
        """End one request, and where its error spoiled the device, all of them."""
        if self._watch.look(error):
            fail(utterance, as_speech_error(error))
            self._fail_all(lost())
        else:
            self._drop(utterance.id)
            fail(utterance, as_speech_error(error))


def _is_looping(row: DecodedRow) -> bool:
    """Looked at about once a second of speech: a loop found a little later costs little."""
    return len(row.tokens) % SPEECH_TOKEN_RATE < STEPS_PER_LOOK and guard.find_loop(row.tokens) is not None
