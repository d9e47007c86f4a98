"""What a job may say: one model per operation, and `parse_job`, which turns JSON into one of them.

Types are strict: true is not a number, NaN is not a number, "1" is not a number. A field that is not
known is refused by name, so that a typing error never silently falls back to a default.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from engine.types import MAX_SEED, PARAMETERS
from jobs.compat import FIELD_ALIASES, IGNORED_FIELDS, OPERATION_ALIASES, adopt
from jobs.errors import JobError

DEFAULT_OPERATION = "tts"

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8_000, 48_000
MIN_LUFS, MAX_LUFS = -70.0, 0.0
MAX_LISTED = 1_000

AudioFormat = Literal["wav", "flac", "mp3", "opus"]
Delivery = Literal["auto", "inline", "s3"]
Normalization = Literal["none", "peak", "rms", "loudness"]


def _field(expected: str, description: str, **rules: Any) -> Any:
    """An optional field; `expected` completes "expected …" in an error."""
    rules.setdefault("default", None)
    return Field(description=description, json_schema_extra={"expected": expected}, **rules)


def _number(low: float, high: float, description: str, *, integer: bool = False) -> Any:
    kind = "an integer" if integer else "a number"
    return _field(f"{kind} from {_plain(low)} to {_plain(high)}", description, ge=low, le=high)


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _parameter(name: str, description: str) -> Any:
    bounds = PARAMETERS[name]
    return _number(bounds.low, bounds.high, description, integer=bounds.integer)


class JobInput(BaseModel):
    """What every operation shares."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    operation: str = DEFAULT_OPERATION


class AudioInput(JobInput):
    """What operations that give audio share: the seed, and what to deliver."""

    mode: Literal["basic", "streaming"] | None = _field(
        "basic or streaming", "`streaming` on a worker that does not stream returns the whole audio"
    )
    seed: int | None = _number(0, MAX_SEED, "The same seed and input give the same audio", integer=True)
    output_format: AudioFormat = _field("wav, flac, mp3 or opus", "wav, flac, mp3 or opus", default="wav")
    sample_rate: int | None = _number(
        MIN_SAMPLE_RATE, MAX_SAMPLE_RATE, "Hz of the audio; the default is the model's own rate", integer=True
    )
    audio_normalization: Normalization | None = _field("none, peak, rms or loudness", "none, peak, rms or loudness")
    loudness_lufs: float | None = _number(
        MIN_LUFS, MAX_LUFS, "Target of audio_normalization `loudness`, which it implies"
    )
    delivery: Literal["auto", "inline", "s3"] = _field(
        "auto, inline or s3", "How the audio is returned", default="auto"
    )


class SpeechInput(AudioInput):
    """What operations that speak a text share: how to speak."""

    text: str | None = _field("text", "What to say")
    reference_audio: str | None = _field(
        "a recording as base64 or data URI", "A recording of the voice: base64 or data URI"
    )
    voice_name: str | None = _field("a name", "Name of a voice in the library")
    language: str = _field("a language code such as en", "ISO 639-1 code", default="en")
    temperature: float | None = _parameter("temperature", "Liveliness of the sampling")
    top_p: float | None = _parameter("top_p", "Nucleus sampling")
    top_k: int | None = _parameter("top_k", "Only the k likeliest tokens (turbo, nano)")
    min_p: float | None = _parameter("min_p", "Drop tokens less likely than this share of the likeliest (original)")
    repetition_penalty: float | None = _parameter("repetition_penalty", "Penalty on repeated tokens")
    exaggeration: float | None = _parameter("exaggeration", "Emotion, 0.5 is neutral (original, multilingual)")
    cfg_weight: float | None = _parameter("cfg_weight", "Guidance by the text, 0 is off (original, multilingual)")


class Tts(SpeechInput):
    """Speak a text."""

    operation: Literal["tts"] = "tts"
    text: str = _field("text", "What to say", default=...)
    voice_id: str | None = _field("an id", "Id of a voice in the library")


class VoiceClone(SpeechInput):
    """Speak in the voice of a recording, and say what was made of it."""

    operation: Literal["voice_clone"] = "voice_clone"
    reference_audio: str = _field(
        "a recording as base64 or data URI", "A recording of the voice: base64 or data URI", default=...
    )
    voice_name: str | None = _field("a name", "What to call the voice, in the result and in the library")
    save_to_library: bool = _field("true or false", "Keep the voice in the library, as voice_name", default=False)
    voice_id: str | None = _field("an id", "Id to keep the voice under; one is made of its name if there is none")
    description: str | None = _field("text", "What to say of the kept voice")
    gender: str | None = _field("text", "Of the kept voice, in your words")
    tags: list[str] | None = _field("a list of words", "Words to find the kept voice by")
    consent: str | None = _field("text", "How the speaker agreed")
    source: str | None = _field("text", "Where the recording comes from")


class VoiceConversion(AudioInput):
    """Say a recording again in another voice."""

    operation: Literal["voice_conversion"] = "voice_conversion"
    input_audio: str = _field(
        "a recording as base64 or data URI", "The recording to convert: base64 or data URI", default=...
    )
    target_audio: str | None = _field(
        "a recording as base64 or data URI", "A recording of the voice to convert to: base64 or data URI"
    )
    voice_id: str | None = _field("an id", "Id of a voice in the library")
    voice_name: str | None = _field("a name", "Name of a voice in the library")
    transfer_mode: Literal["embedding", "audio"] | None = _field(
        "embedding or audio", "Taken for other workers' sake: a voice is the same by its name and by its recording"
    )


class ListVoices(JobInput):
    """List the voices of the library; those that meet every condition given."""

    operation: Literal["list_voices"] = "list_voices"
    language: str | None = _field("a language code such as en", "Voices of this language; pt finds pt-BR too")
    gender: str | None = _field("text", "Voices of this gender")
    tag: str | None = _field("a word", "Voices with this tag")
    text: str | None = _field("text", "Voices with this in their id, name, description or tags")
    offset: int = _field("an integer of at least 0", "How many to leave out at the start", default=0, ge=0)
    limit: int = _field(
        f"an integer from 1 to {MAX_LISTED:,}", "How many to give at most", default=100, ge=1, le=MAX_LISTED
    )


class VoiceInput(JobInput):
    """What operations on one voice of the library share: which."""

    voice_id: str | None = _field("an id", "Id of a voice in the library")
    voice_name: str | None = _field("a name", "Name of a voice in the library")

    @property
    def voice(self) -> tuple[str, str]:
        """The voice that is meant, and the field that says so."""
        return (self.voice_name or "", "voice_name") if self.voice_id is None else (self.voice_id, "voice_id")


class GetVoice(VoiceInput):
    """Ask what is known of a voice."""

    operation: Literal["get_voice"] = "get_voice"


class DeleteVoice(VoiceInput):
    """Remove a voice from the library."""

    operation: Literal["delete_voice"] = "delete_voice"


class Info(JobInput):
    """Ask what this worker is."""

    operation: Literal["info"] = "info"


INPUT_MODELS: Mapping[str, type[JobInput]] = {
    "tts": Tts,
    "voice_clone": VoiceClone,
    "voice_conversion": VoiceConversion,
    "list_voices": ListVoices,
    "get_voice": GetVoice,
    "delete_voice": DeleteVoice,
    "info": Info,
}


@dataclass(frozen=True)
class ParsedJob:
    """A job that may be run: its checked input, and what had to be ignored in it."""

    request: JobInput
    warnings: tuple[str, ...]


def parse_job(job: Mapping[str, Any]) -> ParsedJob:
    """Turn a platform job `{"id", "input": {…}}` into a checked request.

    Raises:
        JobError: invalid_request, naming the field at fault.
    """
    fields = _input_of(job)
    operation = _operation_of(fields)
    ours, warnings = adopt({**fields, "operation": operation})
    model = INPUT_MODELS[operation]
    _refuse_unknown(ours, model)
    _refuse_broken_text(ours)
    try:
        request = model.model_validate(ours)
    except ValidationError as error:
        raise _first_problem(error, model) from None
    _refuse_contradictions(request)
    return ParsedJob(request, warnings)


def _input_of(job: Mapping[str, Any]) -> dict[str, Any]:
    fields = job.get("input")
    if not isinstance(fields, dict):
        found = "no input" if fields is None else f"input of type {_json_type(fields)}"
        raise JobError("invalid_request", f'expected {{"input": {{…}}}}, got {found}', "input")
    return fields


def _operation_of(fields: Mapping[str, Any]) -> str:
    named = fields.get("operation")
    if named is None:
        return DEFAULT_OPERATION
    operation = OPERATION_ALIASES.get(named, named) if isinstance(named, str) else ""
    if operation not in INPUT_MODELS:
        choices = ", ".join(INPUT_MODELS)
        raise JobError("invalid_request", f"operation: expected one of {choices}, got {_brief(named)}", "operation")
    return operation


def _refuse_unknown(fields: Iterable[str], model: type[JobInput]) -> None:
    for name in fields:
        if name not in model.model_fields:
            raise JobError("invalid_request", _unknown_message(name, model), _clip(name))


def _unknown_message(name: str, model: type[JobInput]) -> str:
    operation = model.model_fields["operation"].default
    if any(name in other.model_fields for other in INPUT_MODELS.values()):
        return f"{name} is not a field of operation {operation}"
    known = [*model.model_fields, *FIELD_ALIASES, *IGNORED_FIELDS]
    nearest = difflib.get_close_matches(_clip(name).lower(), known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; known fields: {', '.join(model.model_fields)}"
    return f"unknown field {_brief(name)}{hint}"


def _refuse_broken_text(fields: Mapping[str, Any]) -> None:
    """JSON can carry half a surrogate pair, which no tokenizer, file or result can."""
    for name, value in fields.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise JobError(
                    "invalid_request", f"{name}: holds broken Unicode (half a surrogate pair)", name
                ) from None


def _first_problem(error: ValidationError, model: type[JobInput]) -> JobError:
    problem: ErrorDetails = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else "input"
    extra = model.model_fields[name].json_schema_extra if name in model.model_fields else None
    expected = extra["expected"] if isinstance(extra, dict) else problem["msg"]
    found = "it is missing" if problem["type"] == "missing" else f"got {_brief(problem['input'])}"
    return JobError("invalid_request", f"{name}: expected {expected}, {found}", name)


def _refuse_contradictions(request: JobInput) -> None:
    if isinstance(request, Tts | VoiceConversion):
        names = ("voice_id", "voice_name", "reference_audio", "target_audio")
        given = [name for name in names if getattr(request, name, None) is not None]
        if len(given) > 1:
            raise JobError("invalid_request", f"at most one voice may be named, got {' and '.join(given)}", given[1])
    if isinstance(request, VoiceInput) and (request.voice_id is None) == (request.voice_name is None):
        raise JobError("invalid_request", "voice_id: expected a voice_id or a voice_name, one of them", "voice_id")
    if isinstance(request, VoiceClone) and request.save_to_library and request.voice_name is None:
        raise JobError(
            "invalid_request", "voice_name: expected a name to save the voice under, it is missing", "voice_name"
        )
    if isinstance(request, AudioInput):
        _refuse_output_contradictions(request)


def _refuse_output_contradictions(request: AudioInput) -> None:
    if request.loudness_lufs is not None and request.audio_normalization not in (None, "loudness"):
        raise JobError(
            "invalid_request",
            f"loudness_lufs goes with audio_normalization loudness, not {request.audio_normalization}",
            "loudness_lufs",
        )
    if request.delivery == "s3":
        raise JobError(
            "invalid_request", "delivery s3: this worker has no bucket configured; use auto or inline", "delivery"
        )


def _brief(value: object) -> str:
    """A value as a person would write it in JSON, in ASCII and short enough for a message."""
    if isinstance(value, (dict, list)):
        return f"an {_json_type(value)}"
    if isinstance(value, str):
        return json.dumps(_clip(value))
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to print the largest ones
        return "a huge number"
    return json.dumps(value, default=repr)


def _clip(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
