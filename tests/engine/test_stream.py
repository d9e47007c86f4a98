"""A stream hands pieces from one thread to another, or to an event loop, in order, and ends in one way only."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import numpy as np
import pytest

from engine.errors import SpeechError
from engine.stream import MAX_AHEAD_S, SpeechStream
from engine.types import Chunk, Speech, SpeechPiece

RATE = 24_000


def speech() -> Speech:
    chunks = (Chunk(0, "One.", 0.0, 1.0), Chunk(1, "Two.", 1.0, 2.0))
    return Speech(np.zeros(0, np.float32), RATE, chunks, 1, "turbo", False)


def put(stream: SpeechStream, value: float, seconds: float = 0.1, done: int = 0) -> None:
    stream.put_audio(np.full(round(seconds * RATE), value, np.float32), RATE, done, 2)


def test_pieces_come_in_order_and_the_last_carries_the_speech() -> None:
    future: Future[Speech] = Future()
    stream = SpeechStream(future)
    put(stream, 0.1)
    put(stream, 0.2, done=1)
    future.set_result(speech())
    first, second, last = stream
    assert [piece.seq for piece in (first, second, last)] == [0, 1, 2]
    assert [float(piece.waveform[0]) for piece in (first, second)] == pytest.approx([0.1, 0.2])
    assert (second.num_chunks_done, second.num_chunks) == (1, 2)
    assert last.final and last.speech is not None and not last.waveform.size
    assert list(stream) == [], "it ends once"


def test_a_piece_without_audio_is_no_piece() -> None:
    stream = SpeechStream(Future())
    stream.put_audio(np.zeros(0, np.float32), RATE, 0, 1)
    put(stream, 0.5)
    assert next(stream).seq == 0


def test_whoever_waits_gets_what_another_thread_puts() -> None:
    future: Future[Speech] = Future()
    stream = SpeechStream(future)
    taken: list[SpeechPiece] = []
    taker = threading.Thread(target=lambda: taken.extend(stream))
    taker.start()
    for value in (0.1, 0.2, 0.3):
        put(stream, value)
    future.set_result(speech())
    taker.join(10)
    assert [piece.seq for piece in taken] == [0, 1, 2, 3]


def test_an_event_loop_takes_pieces_without_a_thread() -> None:
    future: Future[Speech] = Future()
    stream = SpeechStream(future)

    def make() -> None:
        for value in (0.1, 0.2, 0.3):
            put(stream, value)
        future.set_result(speech())

    async def take() -> list[SpeechPiece]:
        maker = threading.Timer(0.05, make)
        maker.start()
        return [piece async for piece in stream]

    assert [piece.seq for piece in asyncio.run(take())] == [0, 1, 2, 3]


def test_what_went_wrong_comes_after_the_pieces_before_it() -> None:
    future: Future[Speech] = Future()
    stream = SpeechStream(future)
    put(stream, 0.1)
    future.set_exception(SpeechError("generation_failed", "broken"))
    assert next(stream).seq == 0
    with pytest.raises(SpeechError, match="broken"):
        next(stream)


def test_closing_cancels_the_work_and_wakes_whoever_waits() -> None:
    future: Future[Speech] = Future()
    stream = SpeechStream(future)
    put(stream, 0.1)
    errors: list[str] = []

    def take() -> None:
        try:
            list(stream)
        except SpeechError as error:
            errors.append(error.code)

    taker = threading.Thread(target=take)
    taker.start()
    stream.close()
    taker.join(10)
    assert future.cancelled() and errors == ["cancelled"]


def test_an_event_loop_that_gives_up_waiting_can_take_again() -> None:
    stream = SpeechStream(Future())

    async def take() -> SpeechPiece:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        put(stream, 0.4)
        return await anext(stream)

    assert asyncio.run(take()).seq == 0


def test_a_stream_that_nobody_takes_says_that_it_is_far_ahead_and_tells_when_it_is_so_no_more() -> None:
    told: list[int] = []
    stream = SpeechStream(Future(), on_taken=lambda: told.append(1))
    while not stream.is_far_ahead:
        put(stream, 0.1, seconds=60.0)
    num_pieces = int(MAX_AHEAD_S // 60) + 1
    next(stream)
    assert told == [1]
    for _ in range(num_pieces - 1):
        next(stream)
    assert told == [1]
