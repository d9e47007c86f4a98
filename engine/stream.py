"""A stream of speech: pieces that one thread makes and another thread, or an event loop, takes.

The work behind a stream is a future like any other: it stays pending until all is said, and cancelling it, at
any time, frees what it holds. Closing the stream does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

import numpy as np

from engine.errors import SpeechError
from engine.types import FloatArray, Speech, SpeechPiece

MAX_AHEAD_S = 300.0
"""Audio that may wait to be taken; beyond it the engine renders nothing more for this stream."""


class SpeechStream:
    """Iterates over `SpeechPiece`s, with `for` or with `async for`; the last one is final and carries the `Speech`.

    Raises what went wrong, after all pieces that came before it. Close it (or leave its `with`) when it is not
    wanted any more. One taker at a time.

    Args:
        future: the work.
        on_taken: called by whoever takes pieces when a stream that was far ahead is so no more.
    """

    def __init__(self, future: Future[Speech], on_taken: Callable[[], None] = lambda: None) -> None:
        self._future, self._on_taken = future, on_taken
        self._pieces: deque[SpeechPiece] = deque()
        self._changed = threading.Condition()
        self._waiting: Callable[[], object] | None = None
        self._ahead_s = 0.0
        self._num_pieces = 0
        self._is_over = False
        future.add_done_callback(lambda _: self._wake())

    # ------------------------------------------------------------------------------ whoever makes it

    def put_audio(self, waveform: FloatArray, sample_rate: int, num_chunks_done: int, num_chunks: int) -> None:
        """Add a piece, where there is any audio in it; the last comes by itself, with the future's result."""
        if not waveform.size:
            return
        with self._changed:
            piece = SpeechPiece(self._num_pieces, waveform, sample_rate, False, num_chunks_done, num_chunks)
            self._pieces.append(piece)
            self._num_pieces += 1
            self._ahead_s += waveform.size / sample_rate
        self._wake()

    @property
    def is_far_ahead(self) -> bool:
        """Whether so much waits that more should not be made."""
        return self._ahead_s > MAX_AHEAD_S

    # ------------------------------------------------------------------------------ whoever takes it

    def __iter__(self) -> SpeechStream:
        return self

    def __next__(self) -> SpeechPiece:
        with self._changed:
            self._changed.wait_for(self._has_news)
        piece = self._take()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> SpeechStream:
        return self

    async def __anext__(self) -> SpeechPiece:
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        with self._changed:
            self._waiting = lambda: _tell(loop, news)
            if self._has_news():
                news.set()
        try:
            await news.wait()
        finally:
            with self._changed:
                self._waiting = None
        piece = self._take()
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Stop: what is still to be made is not, and what was made is dropped. Does nothing when all was taken."""
        self._future.cancel()
        with self._changed:
            self._pieces.clear()

    def __enter__(self) -> SpeechStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------ between the two

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            if self._waiting is not None:
                self._waiting()

    def _has_news(self) -> bool:
        return bool(self._pieces) or self._future.done()

    def _take(self) -> SpeechPiece | None:
        """The next piece, the final one, or None at the end.

        Raises:
            SpeechError: what the work ended with.
        """
        with self._changed:
            if self._pieces:
                was_far_ahead = self.is_far_ahead
                piece = self._pieces.popleft()
                self._ahead_s -= piece.waveform.size / piece.sample_rate
                is_released = was_far_ahead and not self.is_far_ahead
            elif self._is_over:
                return None
            else:
                return self._final()
        if is_released:
            self._on_taken()
        return piece

    def _final(self) -> SpeechPiece:
        self._is_over = True
        if self._future.cancelled():
            raise SpeechError("cancelled", "the stream was closed")
        speech = self._future.result()
        num_chunks = len(speech.chunks)
        nothing = np.zeros(0, np.float32)
        return SpeechPiece(self._num_pieces, nothing, speech.sample_rate, True, num_chunks, num_chunks, speech)


def _tell(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(news.set)
