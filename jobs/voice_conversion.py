"""Operation `voice_conversion`: a recording in another voice."""

from __future__ import annotations

import asyncio
from typing import Any

from engine.errors import SpeechError
from engine.types import ConversionRequest, FloatArray
from jobs import delivery, reference, speaking
from jobs.context import JobContext
from jobs.schema import VoiceConversion
from jobs.settings import Settings

MIN_INPUT_S = 0.1

_SHORTER_S = 1.0
"""By how much less than the recording's a result's length may be, generously, when its size is foretold."""


async def run(request: VoiceConversion, context: JobContext) -> dict[str, Any]:
    """Say `request.input_audio` again in the voice that the request names.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    recording = await reference.load(request.input_audio, "input_audio", context)
    audio, sample_rate = await asyncio.to_thread(_read_input, recording, context.settings)
    shortest_s = audio.size / sample_rate - _SHORTER_S
    limit = delivery.max_inline_bytes(request, context)
    delivery.check_length(shortest_s, request, context.engine.sample_rate, limit)
    voice = await reference.resolve_voice(request, context)

    conversion = await asyncio.to_thread(  # which copies the recording
        ConversionRequest, audio=audio, sample_rate=sample_rate, voice=voice.spoken, seed=request.seed
    )
    try:
        return await speaking.answer(request, voice.name, lambda: context.engine.submit_conversion(conversion), context)
    except SpeechError as error:
        raise SpeechError(error.code, error.message, _field_of_job(error.field, request)) from error


def _read_input(recording: bytes, settings: Settings) -> tuple[FloatArray, int]:
    """The recording to convert, refused by its length before it is decoded whole."""
    from engine.audio.reading import check_reference

    audio, rate = reference.read_recording(recording, "input_audio", settings.max_input_s)
    check_reference(audio, rate, min_s=MIN_INPUT_S, field="input_audio")
    return audio, rate


def _field_of_job(field: str | None, request: VoiceConversion) -> str | None:
    """The engine calls the recording `audio` and the target `reference_audio`; the job has names of its own."""
    if field == "audio":
        return "input_audio"
    if field not in ("reference_audio", "voice"):
        return field
    named = (name for name in ("target_audio", "voice_id", "voice_name") if getattr(request, name) is not None)
    return next(named, field)
