"""Streams: the answer of a streaming worker (STREAMING), in pieces that can be heard while the rest is being made.

    {"seq": 0, "final": false, "audio": "<base64>", "format": "wav", "sample_rate": 24000,
     "chunks_done": 0, "chunks_total": 7}
    …
    {"seq": 9, "final": true, "audio": "", "format": "wav", "sample_rate": 24000,
     "duration_s": 41.2, "chunks": […], "timings": {…}, …}

- The audio of all pieces, each decoded, in the order of `seq`, is one file, playable from its start on. A gap in `seq`
  means that a piece was lost on its way.
- The last piece has all that a plain worker's result has, but no audio. `chunks`, `subtitles` or `voices` that would
  make it too large for the platform lie in pieces of their own just before it, in parts to be joined in order (`join`).
- Every operation streams, whatever `mode` says: a worker is of one kind. Those that speak are heard while they speak;
  audio that is made whole (voice_conversion) is cut; what has no audio is the one and final piece.
- Saving a voice comes when all of its audio has been given: the last piece says that it is done.
- What the level of the whole decides is not known ahead: audio_normalization and loudness_lufs give a warning.
- An error ends the stream: `{"error": "<an error result as JSON>"}`. The SDK sends no such piece but ends the job as
  FAILED, with its text as the job's error. (Of an object it would send Python's notation, and of a raised error a
  traceback.)
- The SDK is not asked to aggregate the pieces into the job's output: that would be the whole again, too large to send.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.audio.mastering import Resampler, StreamEncoder
from engine.stream import SpeechStream
from engine.types import FloatArray, Speech, SpeechPiece
from jobs.audio_file import AUDIO_FIELDS, AudioFile
from jobs.delivery import Encoded, Level
from jobs.errors import JobError, error_result
from jobs.schema import SpeechInput

if TYPE_CHECKING:
    from jobs.context import JobContext

MAX_PIECE_BYTES = 1_000_000
"""Of a piece as JSON: the platform takes no more of a generator at once (docs.runpod.io, operation /stream), and what
it does not take the SDK only logs."""

SPREAD_FIELDS = ("chunks", "subtitles", "voices")
"""Lists and texts of a result that may lie in several pieces."""

_AUDIO_BYTES = 720_000
"""Of audio in one piece, 960,000 characters of base64. A multiple of 6: whole samples, and no padding."""

_MAX_WAITING_BYTES = 4 * _AUDIO_BYTES
_PART_BYTES = 900_000  # of a field that is spread
_MAX_CHAR_BYTES = 6  # of text in JSON: "\u0000"


class Feed:
    """Audio on its way from the operation that makes it to the pieces that carry it, on one event loop.

    Iterate over it for the pieces, then over `closing`. What waits goes into one piece, so that pieces grow where they
    are made faster than they are taken; where much waits, whoever makes more waits too.
    """

    def __init__(self) -> None:
        self._seq = itertools.count()
        self._waiting = bytearray()
        self._about: dict[str, Any] = {}
        self._is_over = False
        self._has_news, self._has_room = asyncio.Event(), asyncio.Event()
        self._tell()

    # ------------------------------------------------------------------------------ whoever makes it

    async def put(self, data: bytes, **about: Any) -> None:
        """Give the next bytes of the file.

        Args:
            data: any number of bytes.
            about: fields of the pieces from now on.
        """
        await self._has_room.wait()
        self._waiting += data
        self._about = about
        self._tell()

    def end(self) -> None:
        """No more comes."""
        self._is_over = True
        self._tell()

    # ------------------------------------------------------------------------------ whoever takes it

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        await self._has_news.wait()
        if not self._waiting:
            raise StopAsyncIteration
        audio = self._waiting[:_AUDIO_BYTES]
        del self._waiting[:_AUDIO_BYTES]
        self._tell()
        return self._piece({"audio": base64.b64encode(audio).decode("ascii"), **self._about})

    def closing(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The pieces behind the audio, when the job is done.

        Args:
            result: the job's, with what of its audio was not put here; or an error result.
        """
        if "error" in result:
            return [error_piece(result)]
        pieces = [self._piece(part) for part in _parts(result)]
        pieces[-1]["final"] = True
        num_bytes = max(map(_num_bytes, pieces))
        if num_bytes <= MAX_PIECE_BYTES:
            return pieces
        message = f"the result holds {num_bytes / 1e6:.1f} MB beside its audio, and a piece of a stream at most 1 MB"
        return [error_piece(error_result(JobError("result_too_large", message)))]

    def _piece(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"seq": next(self._seq), "final": False, **fields}

    def _tell(self) -> None:
        _set(self._has_news, self._is_over or len(self._waiting) > 0)
        _set(self._has_room, len(self._waiting) < _MAX_WAITING_BYTES)


def _set(event: asyncio.Event, holds: bool) -> None:
    if holds:
        event.set()
    else:
        event.clear()


def error_piece(error: Mapping[str, Any]) -> dict[str, Any]:
    """The piece that ends a stream with an error result."""
    return {"error": json.dumps(error, ensure_ascii=False)}


def join(result: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add what a piece says to what those before it said; audio, which is best joined as bytes, is left out."""
    for name, value in piece.items():
        if name in SPREAD_FIELDS:
            result[name] = result[name] + value if name in result else value
        elif name not in ("seq", "final", "audio", "chunks_done", "chunks_total"):
            result[name] = value


def _parts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A result's fields in parts that are small enough, the last of them what is neither audio nor spread."""
    last = {name: value for name, value in result.items() if name not in AUDIO_FIELDS}
    about = {name: result[name] for name in ("format", "sample_rate") if name in result}
    audio = result.get("audio", "")
    parts = [{"audio": part, **about} for part in _cut(audio, _AUDIO_BYTES // 3 * 4)]
    if "audio" in result:
        about["audio"] = last["audio"] = ""
    for name in SPREAD_FIELDS:
        if name in last and _num_bytes(last) > _PART_BYTES:
            parts += [{name: part, **about} for part in _spread(last[name])]
            last[name] = type(last[name])()
    return [*parts, last]


def _spread(value: list[Any] | str) -> Iterator[list[Any] | str]:
    if isinstance(value, str):
        yield from _cut(value, _PART_BYTES // _MAX_CHAR_BYTES)
        return
    part: list[Any] = []
    num_bytes = 0
    for item in value:
        num_more = _num_bytes(item)
        if part and num_bytes + num_more > _PART_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(item)
        num_bytes += num_more
    yield part


def _cut(text: str, max_chars: int) -> Iterator[str]:
    return (text[start : start + max_chars] for start in range(0, len(text), max_chars))


def _num_bytes(value: Any) -> int:
    """As the SDK sends it, with what it puts around a piece."""
    return len(json.dumps({"output": value}, ensure_ascii=False).encode("utf-8"))


def _ignored(request: SpeechInput) -> Iterator[str]:
    """What a stream that is sent while it is spoken cannot have."""
    level = Level.of(request).mode
    if level != "none":
        yield f"audio_normalization {level} was ignored: a stream is sent before its level is known"
    if request.title is not None:
        yield "title was ignored: what is streamed has no tags"


async def deliver(
    stream: SpeechStream,
    request: SpeechInput,
    feed: Feed,
    context: JobContext,
    note: Callable[[SpeechPiece, float], None] = lambda _piece, _audio_s: None,
) -> tuple[Speech, Encoded]:
    """Hand an utterance to a feed while it is spoken, encoded as the job asked.

    Args:
        stream: what the engine speaks; closed at the end, however that comes.
        request: the job, whose output has been checked.
        feed: where the audio goes.
        context: the job's surroundings.
        note: told of each piece and of the seconds of audio up to its end; may raise.

    Returns:
        What was spoken, and all about its audio but the audio.

    Raises:
        SpeechError: what the engine stops with.
    """
    encoding = _Encoding(request, context.engine.sample_rate)
    first_audio_s: float | None = None
    with stream:
        async for piece in stream:
            data = await asyncio.to_thread(encoding.push, piece)
            if data and first_audio_s is None:
                first_audio_s = context.elapsed_s
            note(piece, encoding.duration_s)
            context.figures.num_inline_bytes += len(data)
            await feed.put(data, **encoding.about, chunks_done=piece.num_chunks_done, chunks_total=piece.num_chunks)
            if piece.speech is not None:
                return piece.speech, encoding.summary(first_audio_s)
    raise AssertionError("the stream ended without its speech")


class _Encoding:
    """What the samples of a stream go through on their way to the client: rate, format. Blocks: call it in a thread.

    Args:
        request: the job.
        from_hz: sample rate of what the engine gives.
    """

    def __init__(self, request: SpeechInput, from_hz: int) -> None:
        self._request, self._from_hz = request, from_hz
        self._rate = request.sample_rate or from_hz
        self._resampler = None if self._rate == from_hz else Resampler(from_hz, self._rate)
        self._encoder = StreamEncoder(self._rate, request.output_format)
        self._num_samples = 0
        self._master_s = self._encode_s = 0.0

    @property
    def about(self) -> dict[str, Any]:
        """What a client needs to know to play it."""
        return {"format": self._request.output_format, "sample_rate": self._rate}

    @property
    def duration_s(self) -> float:
        """Seconds of audio so far."""
        return self._num_samples / self._from_hz

    def push(self, piece: SpeechPiece) -> bytes:
        """The file's next bytes; with the final piece its last."""
        started_s = time.perf_counter()
        self._num_samples += piece.waveform.size
        samples = self._resampled(piece)
        mastered_s = time.perf_counter()
        data = self._encoder.push(samples) if samples.size else b""
        if piece.final:
            data += self._encoder.finish()
        self._master_s += mastered_s - started_s
        self._encode_s += time.perf_counter() - mastered_s
        return data

    def summary(self, first_audio_s: float | None) -> Encoded:
        """All about the audio, which is empty here."""
        return Encoded(
            audio=AudioFile.of_bytes(b""),
            **self.about,
            duration_s=self.duration_s,
            master_s=self._master_s,
            encode_s=self._encode_s,
            warnings=tuple(_ignored(self._request)),
            first_audio_s=first_audio_s,
        )

    def _resampled(self, piece: SpeechPiece) -> FloatArray:
        if self._resampler is None:
            return piece.waveform
        samples = self._resampler.push(piece.waveform)
        return np.concatenate([samples, self._resampler.finish()]) if piece.final else samples
