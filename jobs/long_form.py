"""Operation `long_form`: a text of any length, in one voice or in a voice for each segment.

The audio is never in memory as a whole, what is spoken is kept as it comes (`jobs.work`), and a job whose time ends
says how far it came.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from engine.errors import SpeechError
from engine.types import Segment, Speech, SpeechPiece, SpeechRequest, Voice, VoicePrompt
from jobs import delivery, reference, speaking, streaming
from jobs.context import JobContext
from jobs.delivery import Encoded
from jobs.errors import JobError
from jobs.logs import in_context
from jobs.reference import ResolvedVoice
from jobs.schema import LongForm, LongFormSegment
from jobs.settings import Settings
from jobs.spool import Spool
from jobs.work import JobWork

MAX_AUDIO_S = 24 * 3600.0
"""Most that is spoken: half a million characters take some nine hours, pauses can take any time."""

MAX_RECORDINGS = 64
"""Different recordings that a job may give voices by; voices of the library may be as many as there are."""

DEFAULT_SEED = 0
"""Of jobs that name none: with one that is drawn, the job sent again would find nothing of what it has done."""

_REPORT_EVERY_S = 1.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def run(request: LongForm, context: JobContext) -> dict[str, Any]:
    """Speak the request's text or segments.

    Raises:
        JobError, SpeechError: see the job API's codes; those of a segment name it, as in `segments[3].voice_name`.
    """
    rate, limit = context.engine.sample_rate, delivery.max_inline_bytes(request, context)
    delivery.check_output(request, rate, streams=context.feed is not None)
    shortest_s = await asyncio.to_thread(_check_script, request, context.settings)
    delivery.check_length(shortest_s, request, rate, limit)
    cast = await _Cast(request, context).resolved()
    spoken = await asyncio.to_thread(_speech_request, request, cast, context)
    condition_s = context.elapsed_s

    work = None if context.work is None else context.work.for_job()
    with _JobThread() as thread:
        speech, encoded = await _spoken(spoken, request, work, thread, context)
        if work is not None:
            encoded = dataclasses.replace(encoded, warnings=(*encoded.warnings, *work.warnings))
        names = ", ".join(dict.fromkeys(voice.name for voice in cast))
        about = await asyncio.to_thread(speaking.result, request, names, speech, encoded, condition_s, context)
        return await _handed_over(about, encoded, request, work, context)


async def _handed_over(
    about: dict[str, Any], encoded: Encoded, request: LongForm, work: JobWork | None, context: JobContext
) -> dict[str, Any]:
    """The result; where its audio cannot be delivered, the client learns that little was lost."""
    try:
        return await delivery.hand_over(about, encoded, request, context, way_out=_way_out(request, work))
    except JobError as error:
        if error.code != "storage_failed" or work is None or not work.holds_any:
            raise
        kept = "what was spoken is kept in WORK_DIR: the same job sent again costs little more than the encoding"
        raise JobError(error.code, f"{error.message}; {kept}", error.field) from error


async def _spoken(
    spoken: SpeechRequest, request: LongForm, work: JobWork | None, thread: _JobThread, context: JobContext
) -> tuple[Speech, Encoded]:
    """Have it spoken, into a file or into a stream.

    Args:
        spoken: what the engine is given.
        request: the job.
        work: what is kept of it.
        thread: for the file, which is there as long as the thread.
        context: the job's surroundings.
    """
    progress = _Progress(context, work)
    if (feed := context.feed) is not None:
        stream = context.engine.stream(spoken, work=work)

        def note(piece: SpeechPiece, audio_s: float) -> None:
            progress.take(piece, audio_s)
            _check_duration(audio_s, request)

        return await streaming.deliver(stream, request, feed, context, note)
    folder = None if context.work is None else context.work.folder
    spool = await thread.run(Spool, request, context.engine.sample_rate, folder)  # imports scipy
    thread.at_end(spool.close)
    limit = delivery.max_inline_bytes(request, context)
    check_size = functools.partial(_check_size, spool, request, work, limit)
    with contextlib.closing(context.engine.stream(spoken, early=False, work=work)) as pieces:
        speech = await _take(pieces, spool, thread, progress, check_size)
    return speech, await _mastered(spool, thread, progress, check_size)


async def _take(
    pieces: AsyncIterator[SpeechPiece],
    spool: Spool,
    thread: _JobThread,
    progress: _Progress,
    check_size: Callable[[], None],
) -> Speech:
    """Spool a stream to its end; gives the speech that comes with the last piece."""
    async for piece in pieces:
        await thread.run(spool.push, piece.waveform)
        progress.take(piece, spool.duration_s)
        check_size()
        if piece.speech is not None:
            return piece.speech
    raise AssertionError("the stream ended without its speech")


async def _mastered(spool: Spool, thread: _JobThread, progress: _Progress, check_size: Callable[[], None]) -> Encoded:
    """Level and encode what was spooled, block by block, so that the job can end in between."""
    progress.is_spoken = True
    while await thread.run(spool.master):
        check_size()
    return await thread.run(spool.finish)


def _check_size(spool: Spool, request: LongForm, work: JobWork | None, max_bytes: int) -> None:
    """Stop as soon as the audio is surely too much.

    Raises:
        JobError: result_too_large, text_too_long.
    """
    way_out = _way_out(request, work)
    delivery.check_length(spool.duration_s, request, spool.sample_rate, max_bytes, way_out=way_out)
    delivery.check_file(spool.num_encoded_bytes, request.output_format, max_bytes, way_out=way_out)
    _check_duration(spool.duration_s, request)


def _way_out(request: LongForm, work: JobWork | None) -> str | None:
    """What to do about audio that is too large, where that costs little."""
    if work is None or not work.holds_any or request.output_format == "opus":
        return None
    return (
        "what was spoken is kept in WORK_DIR: the same job with output_format opus or mp3 goes on from there "
        "and costs little more than the encoding"
    )


# ---------------------------------------------------------------------------------- what is to be said


def _check_script(request: LongForm, settings: Settings) -> float:
    """Look through everything that is to be said before anything is done. Blocks.

    Returns:
        The least that it will take to say, seconds: its pauses.

    Raises:
        JobError: text_too_long, text_empty, invalid_request.
    """
    segments = _segments(request)
    num_chars = sum(len(segment.text) for _, segment in segments)
    field = "text" if request.segments is None else "segments"
    if num_chars > settings.max_long_form_chars:
        limit = settings.max_long_form_chars
        raise JobError("text_too_long", f"{field}: at most {limit:,} characters, got {num_chars:,}", field)
    shortest_s = 0.0
    for place, segment in segments:
        with _told_of(place):
            shortest_s += _pauses_s(speaking.checked_speakable(segment.text)) + (segment.pause_after_s or 0.0)
    _check_duration(shortest_s, request)
    return shortest_s


def _check_duration(duration_s: float, request: LongForm) -> None:
    if duration_s > MAX_AUDIO_S:
        field = "text" if request.segments is None else "segments"
        message = f"{field}: at most {MAX_AUDIO_S / 3600:g} hours of audio, pauses included"
        raise JobError("text_too_long", message, field)


def _pauses_s(text: str) -> float:
    """Seconds of the pauses marked in a text.

    Raises:
        SpeechError: invalid_request, for what has the form of markup and is none.
    """
    from engine.text.markup import extract_pauses, refuse_unknown

    refuse_unknown(text)
    return sum(seconds for _, seconds in extract_pauses(text).pauses)


def _segments(request: LongForm) -> list[tuple[str, LongFormSegment]]:
    """The request as segments, each with its place in the job, such as `segments[3].`; of a text "" is the place."""
    if request.segments is None:
        return [("", LongFormSegment(text=request.text or ""))]
    return [(f"segments[{index}].", segment) for index, segment in enumerate(request.segments)]


def _speech_request(request: LongForm, cast: Sequence[ResolvedVoice], context: JobContext) -> SpeechRequest:
    """What the engine is given.

    Raises:
        JobError: language_unsupported.
        SpeechError: invalid_request.
    """
    spoken = context.engine.languages
    language = speaking.checked_language(request.language, spoken)
    seed = DEFAULT_SEED if request.seed is None else request.seed
    segments = []
    for (place, segment), voice in zip(_segments(request), cast, strict=True):
        with _told_of(place):
            own = None if segment.language is None else speaking.checked_language(segment.language, spoken)
        segments.append(Segment(segment.text, voice.spoken, own, segment.pause_after_s))
    return speaking.speech_request(request, language, segments=tuple(segments), seed=seed)


# ---------------------------------------------------------------------------------- who says it


class _Cast:
    """The voices of a job's segments, each found once however many speak with it.

    Args:
        request: the job.
        context: its surroundings.
    """

    def __init__(self, request: LongForm, context: JobContext) -> None:
        self._request, self._context = request, context
        self._found: dict[tuple[str, str] | None, ResolvedVoice] = {}
        self._num_recordings = 0

    async def resolved(self) -> list[ResolvedVoice]:
        """A voice for each segment, ready to speak.

        Raises:
            JobError, SpeechError: as `reference.resolve`, with the segment's name; invalid_request for too many
                recordings.
        """
        default = reference.named_voice(self._request)
        cast = []
        for place, segment in _segments(self._request):
            own = reference.named_voice(segment)
            cast.append(await self._voice(own or default, place if own else ""))
        return cast

    async def _voice(self, named: tuple[str, str] | None, place: str) -> ResolvedVoice:
        if named not in self._found:
            with _told_of(place):
                self._found[named] = await self._find(named)
        return self._found[named]

    async def _find(self, named: tuple[str, str] | None) -> ResolvedVoice:
        voice = await reference.resolve(named, self._context)
        if named is None or not isinstance(voice.spoken, VoicePrompt):
            return voice
        field = named[0]
        self._num_recordings += 1
        if self._num_recordings > MAX_RECORDINGS:
            raise JobError("invalid_request", f"{field}: at most {MAX_RECORDINGS} different recordings in a job", field)
        return dataclasses.replace(voice, spoken=await asyncio.to_thread(self._embed, voice.spoken, field))

    def _embed(self, prompt: VoicePrompt, field: str) -> Voice:
        """A recording as what the model makes of it, so that neither hours of it lie in memory nor one that will not
        do is found out late. Blocks."""
        try:
            return self._context.engine.embed(prompt)
        except SpeechError as error:
            raise JobError(error.code, error.message, field) from error


@contextlib.contextmanager
def _told_of(place: str) -> Iterator[None]:
    """Errors of a segment, told with its place."""
    try:
        yield
    except (JobError, SpeechError) as error:
        if not place or error.field is None:
            raise
        field = f"{place}{error.field}"
        told = error.message.removeprefix(f"{error.field}: ")
        raise JobError(error.code, f"{field}: {told}", field) from error


# ---------------------------------------------------------------------------------- while it is said


class _JobThread:
    """A thread for one job's files: what it is given is done one after another, the end after all else.

    Leaving the `with` never waits: a job whose time is over is over, even while its last write still runs.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "long-form")
        self._at_end: Callable[[], None] | None = None

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call what blocks."""
        call = in_context(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def at_end(self, call: Callable[[], None]) -> None:
        """What to do last, whatever happens."""
        self._at_end = call

    def __enter__(self) -> _JobThread:
        return self

    def __exit__(self, *_: object) -> None:
        if self._at_end is not None:
            self._pool.submit(self._at_end)
        self._pool.shutdown(wait=False)


class _Progress:
    """How far a job is: for the platform now and then, for the client if its time ends.

    Args:
        context: the job's surroundings.
        work: what is kept of it; None where that is nothing.
    """

    def __init__(self, context: JobContext, work: JobWork | None) -> None:
        self._context, self._work = context, work
        self._num_done = self._num_chunks = 0
        self._audio_s = self._reported_s = 0.0
        self.is_spoken = False
        context.progress.describe = self.describe

    def take(self, piece: SpeechPiece, audio_s: float) -> None:
        """Note a piece, and report now and then."""
        self._num_done, self._num_chunks, self._audio_s = piece.num_chunks_done, piece.num_chunks, audio_s
        now_s = time.perf_counter()
        if piece.final or now_s - self._reported_s >= _REPORT_EVERY_S:
            self._reported_s = now_s
            self._context.report(
                {
                    "chunks_done": self._num_done,
                    "chunks": self._num_chunks,
                    "audio_s": round(audio_s, 2),
                    "elapsed_s": round(self._context.elapsed_s, 2),
                }
            )

    def describe(self) -> str:
        """In words, with what is gained by sending the job again."""
        return f"{self._spoken()}; {self._sent_again()}"

    def _spoken(self) -> str:
        if not self._num_chunks:
            return "no audio is done yet"
        audio = f"{duration_text(self._audio_s)} of audio"
        if self.is_spoken:
            return f"all {self._num_chunks:,} chunks are spoken, {audio}, and were being encoded"
        return f"{self._num_done:,} of {self._num_chunks:,} chunks, {audio} are done"

    def _sent_again(self) -> str:
        if self._work is None:
            return "the same job sent again starts anew, since this worker keeps nothing of it (WORK_DIR is not set)"
        if not self._work.holds_any:
            return "nothing of it is kept yet, so the same job sent again starts anew"
        if self.is_spoken:
            return "sent again, it need only be marked and encoded, for which JOB_TIMEOUT_S was too short this time"
        return "the same job sent again goes on from there"


def duration_text(seconds: float) -> str:
    """A duration for people: `1 h 32 min`, `3 min 20 s`, `12 s`."""
    hours, minutes = divmod(round(seconds) // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{round(seconds)} s"
