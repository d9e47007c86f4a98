"""What every operation that speaks does: check the text, ask the engine, build the result."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from engine.types import PARAMETERS, Chunk, Speech, SpeechRequest
from jobs import delivery, streaming
from jobs.context import JobContext
from jobs.errors import JobError
from jobs.reference import ResolvedVoice
from jobs.schema import AudioInput, SpeechInput
from jobs.settings import Settings
from jobs.subtitles import write_subtitles

NOT_STREAMED = "this worker does not stream; the whole audio is returned"


def checked_text(text: str, settings: Settings) -> str:
    """The text of a job that is spoken in one go, if there is something in it to say.

    Raises:
        JobError: text_too_long; text_empty for blanks, emoji and control characters alone.
    """
    limit, longer = settings.max_text_chars, settings.max_long_form_chars
    if len(text) > limit:
        way_out = f"; operation long_form takes up to {longer:,}" if longer > limit else ""
        raise JobError("text_too_long", f"text: at most {limit:,} characters, got {len(text):,}{way_out}", "text")
    return checked_speakable(text)


def checked_speakable(text: str) -> str:
    """The text, if there is something in it to say.

    Raises:
        JobError: text_empty for blanks, emoji and control characters alone.
    """
    if not any(character.isalnum() for character in text):
        raise JobError("text_empty", "text: holds nothing that can be spoken", "text")
    return text


def checked_language(language: str, spoken: Sequence[str]) -> str:
    """The code as the engine knows it: `en-US`, `en_us` and `EN` are `en`.

    Raises:
        JobError: language_unsupported, listing what the model speaks.
    """
    code = language.strip().lower()
    for candidate in (code, code.replace("_", "-").partition("-")[0]):
        if candidate in spoken:
            return candidate
    raise JobError(
        "language_unsupported",
        f"language: expected one of {', '.join(sorted(spoken))}, got {language[:40]!r}",
        "language",
    )


async def speak(
    request: SpeechInput,
    text: str,
    language: str,
    voice: ResolvedVoice,
    context: JobContext,
    *,
    fields: tuple[str, ...] = ("audio",),
    room_bytes: int = 0,
) -> dict[str, Any]:
    """Speak `text` and build the result of the job API; its audio is in it or in a bucket, or was streamed.

    Cancelling the coroutine cancels the engine's work.

    Args:
        request: the job.
        text, language: what to say, checked.
        voice: who says it.
        context: the job's surroundings.
        fields, room_bytes: as of `delivery.hand_over`.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    spoken = speech_request(request, language, text=text, voice=voice.spoken)
    if (feed := context.feed) is None:
        start = functools.partial(context.engine.submit, spoken)
        return await answer(request, voice.name, start, context, fields=fields, room_bytes=room_bytes)
    return await _answer(
        request,
        voice.name,
        lambda: streaming.deliver(context.engine.stream(spoken), request, feed, context),
        context,
    )


async def answer(
    request: AudioInput,
    voice_name: str,
    start: Callable[[], Future[Speech]],
    context: JobContext,
    *,
    fields: tuple[str, ...] = ("audio",),
    room_bytes: int = 0,
) -> dict[str, Any]:
    """Have the engine's work done and build the result of the job API, its audio delivered.

    Args:
        request: the job.
        voice_name: what the result calls the voice.
        start: gives the engine its work; not called where the output could not be made.
        context: the job's surroundings.
        fields, room_bytes: as of `delivery.hand_over`.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    delivered = {"fields": fields, "room_bytes": room_bytes}
    return await _answer(request, voice_name, lambda: _whole(start, request), context, **delivered)


async def _whole(start: Callable[[], Future[Speech]], request: AudioInput) -> tuple[Speech, delivery.Encoded]:
    speech = await asyncio.wrap_future(start())
    return speech, await asyncio.to_thread(delivery.encode, speech, request)


async def _answer(
    request: AudioInput,
    voice_name: str,
    make: Callable[[], Awaitable[tuple[Speech, delivery.Encoded]]],
    context: JobContext,
    **delivered: Any,
) -> dict[str, Any]:
    delivery.check_output(request, context.engine.sample_rate, streams=context.feed is not None)
    condition_s = context.elapsed_s  # reading and decoding the reference is part of what a voice costs
    speech, encoded = await make()
    about = await asyncio.to_thread(result, request, voice_name, speech, encoded, condition_s, context)
    return await delivery.hand_over(about, encoded, request, context, **delivered)


def result(
    request: AudioInput,
    voice_name: str,
    speech: Speech,
    encoded: delivery.Encoded,
    condition_s: float,
    context: JobContext,
) -> dict[str, Any]:
    """The result of the job API, without its audio.

    Args:
        request: the job.
        voice_name: what the result calls the voice.
        speech: what was spoken; its waveform is not looked at.
        encoded: its audio.
        condition_s: what was spent on the voice before the engine was asked, seconds.
        context: the job's surroundings.
    """
    return {
        "format": encoded.format,
        "sample_rate": encoded.sample_rate,
        "duration_s": round(encoded.duration_s, 4),
        "model": speech.model,
        "voice": voice_name,
        "seed": speech.seed,
        "chunks": [_chunk(chunk) for chunk in speech.chunks],
        **_subtitles(request, speech),
        "timings": _timings(speech, condition_s, encoded, context.elapsed_s),
        "warnings": _warnings(request, speech, encoded, context),
        "watermarked": speech.watermarked,
    }


def speech_request(request: SpeechInput, language: str, **said: Any) -> SpeechRequest:
    """What the engine is given of a job.

    Args:
        request: the job.
        language: as the engine calls it.
        said: text or segments, the voice, and what differs from the job.
    """
    parameters = {name: getattr(request, name) for name in PARAMETERS if name in type(request).model_fields}
    about = {"seed": request.seed, "pronunciations": request.pronunciations or {}, "language": language}
    return SpeechRequest(**{**parameters, **about, **said})


def _subtitles(request: AudioInput, speech: Speech) -> dict[str, str]:
    if not isinstance(request, SpeechInput) or request.subtitles is None:
        return {}
    return {"subtitles": write_subtitles(speech.chunks, request.subtitles, request.language)}


def _chunk(chunk: Chunk) -> dict[str, Any]:
    fields = dataclasses.asdict(chunk)
    times = {name: round(fields[name], 4) for name in ("start_s", "end_s")}
    return fields | times | {"flags": list(chunk.flags)}


def _timings(speech: Speech, condition_s: float, encoded: delivery.Encoded, total_s: float) -> dict[str, float]:
    stages = ("queue", "condition", "prefill", "decode", "vocode", "master")
    timings = {name: float(speech.timings.get(name, 0.0)) for name in stages}
    timings["condition"] += condition_s
    timings["master"] += encoded.master_s
    timings["encode"] = encoded.encode_s
    timings["total"] = total_s
    timings["real_time_factor"] = total_s / max(encoded.duration_s, 1e-9)
    timings["first_audio_s"] = total_s if encoded.first_audio_s is None else encoded.first_audio_s
    return {name: round(seconds, 4) for name, seconds in timings.items()}


def _warnings(request: AudioInput, speech: Speech, encoded: delivery.Encoded, context: JobContext) -> list[str]:
    streamed = (NOT_STREAMED,) if request.mode == "streaming" and context.feed is None else ()
    return list(dict.fromkeys((*context.warnings, *streamed, *speech.warnings, *encoded.warnings)))
