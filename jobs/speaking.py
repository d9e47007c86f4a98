"""What every operation that speaks does: check the text, ask the engine, build the result."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from engine.types import PARAMETERS, Chunk, Speech, SpeechRequest
from jobs import delivery
from jobs.context import JobContext
from jobs.errors import JobError
from jobs.reference import ResolvedVoice
from jobs.schema import AudioInput, SpeechInput

NOT_STREAMED = "this worker does not stream; the whole audio is returned"


def checked_text(text: str, max_chars: int) -> str:
    """The text, if there is something in it to say.

    Raises:
        JobError: text_too_long; text_empty for blanks, emoji and control characters alone.
    """
    if len(text) > max_chars:
        raise JobError("text_too_long", f"text: at most {max_chars:,} characters, got {len(text):,}", "text")
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
    request: SpeechInput, text: str, language: str, voice: ResolvedVoice, context: JobContext
) -> dict[str, Any]:
    """Speak `text` and build the result of the job API, audio included.

    Cancelling the coroutine cancels the engine's work.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    spoken = _speech_request(request, text, language, voice)
    return await answer(request, voice.name, lambda: context.engine.submit(spoken), context)


async def answer(
    request: AudioInput, voice_name: str, start: Callable[[], Future[Speech]], context: JobContext
) -> dict[str, Any]:
    """Have the engine's work done and build the result of the job API, audio included.

    Args:
        request: the job.
        voice_name: what the result calls the voice.
        start: gives the engine its work; not called where the output could not be made.
        context: the job's surroundings.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    delivery.check_output(request, context.engine.sample_rate)
    condition_s = context.elapsed_s  # reading and decoding the reference is part of what a voice costs
    speech = await asyncio.wrap_future(start())
    encoded = await asyncio.to_thread(delivery.encode, speech, request)
    return {
        "audio": encoded.audio_base64,
        "format": encoded.format,
        "sample_rate": encoded.sample_rate,
        "duration_s": round(encoded.duration_s, 4),
        "model": speech.model,
        "voice": voice_name,
        "seed": speech.seed,
        "chunks": [_chunk(chunk) for chunk in speech.chunks],
        "timings": _timings(speech, condition_s, encoded, context.elapsed_s),
        "warnings": _warnings(request, speech, encoded, context),
        "watermarked": speech.watermarked,
    }


def _speech_request(request: SpeechInput, text: str, language: str, voice: ResolvedVoice) -> SpeechRequest:
    parameters = {name: getattr(request, name) for name in PARAMETERS if name in type(request).model_fields}
    return SpeechRequest(text=text, voice=voice.spoken, language=language, seed=request.seed, **parameters)


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
    timings["first_audio_s"] = total_s  # nothing is heard before the whole result is there
    return {name: round(seconds, 4) for name, seconds in timings.items()}


def _warnings(request: AudioInput, speech: Speech, encoded: delivery.Encoded, context: JobContext) -> list[str]:
    streamed = (NOT_STREAMED,) if request.mode == "streaming" else ()
    return list(dict.fromkeys((*context.warnings, *streamed, *speech.warnings, *encoded.warnings)))
