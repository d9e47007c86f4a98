"""What a job may say: one model per operation, and `parse_job`, which turns JSON into one of them.

Types are strict: true is not a number, NaN is not a number, "1" is not a number. A field that is not
known is refused by name, so that a typing error never silently falls back to a default.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from engine.types import MAX_SEED, PARAMETERS
from jobs.compat import FIELD_ALIASES, IGNORED_FIELDS, OPERATION_ALIASES, adopt
from jobs.errors import JobError
from jobs.s3_config import FIELD as S3_CONFIG
from jobs.s3_config import S3Config, parse_s3_config

DEFAULT_OPERATION = "tts"

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8_000, 48_000
MIN_LUFS, MAX_LUFS = -70.0, 0.0
MAX_LISTED = 1_000
MAX_SEGMENTS = 10_000
MAX_SEGMENT_PAUSE_S = 60.0
MAX_PRONUNCIATIONS = 1_000
MAX_TITLE_CHARS = 200
MAX_KEY_CHARS = 200

AudioFormat = Literal["wav", "flac", "mp3", "opus", "pcm"]
"""pcm is for streams: 16-bit little-endian samples and nothing else."""

SubtitleFormat = Literal["srt", "vtt"]
Delivery = Literal["auto", "inline", "s3"]
Normalization = Literal["none", "peak", "rms", "loudness"]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable characters")
    return text


def _field(expected: str, description: str, **rules: Any) -> Any:
    """An optional field; `expected` completes "expected …" in an error."""
    rules.setdefault("default", None)
    return Field(description=description, json_schema_extra={"expected": expected}, **rules)


def _number(low: float, high: float, description: str, *, integer: bool = False) -> Any:
    kind = "an integer" if integer else "a number"
    return _field(f"{kind} from {_plain(low)} to {_plain(high)}", description, ge=low, le=high)


def _recording(description: str, **rules: Any) -> Any:
    wrapped = "base64, data URI, https URL or s3://bucket/key"
    return _field(f"a recording as {wrapped}", f"{description}: {wrapped}", **rules)


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _parameter(name: str, description: str) -> Any:
    bounds = PARAMETERS[name]
    return _number(bounds.low, bounds.high, description, integer=bounds.integer)


class JobInput(BaseModel):
    """What every operation shares."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    operation: str = DEFAULT_OPERATION


class MakingInput(JobInput):
    """What operations that make or change something share: done once under a key, however often they are asked for."""

    idempotency_key: Annotated[str, AfterValidator(_printable)] | None = _field(
        f"text of 1 to {MAX_KEY_CHARS} printable characters",
        "The same job sent again with the same key gets the result that is kept of it",
        min_length=1,
        max_length=MAX_KEY_CHARS,
    )


class AudioInput(MakingInput):
    """What operations that give audio share: the seed, and what to deliver."""

    mode: Literal["basic", "streaming"] | None = _field(
        "basic or streaming", "`streaming` on a worker that does not stream returns the whole audio"
    )
    seed: int | None = _number(0, MAX_SEED, "The same seed and input give the same audio", integer=True)
    output_format: AudioFormat = _field(
        "wav, flac, mp3, opus or pcm", "wav, flac, mp3 or opus; of a stream pcm too, samples alone", default="wav"
    )
    sample_rate: int | None = _number(
        MIN_SAMPLE_RATE, MAX_SAMPLE_RATE, "Hz of the audio; the default is the model's own rate", integer=True
    )
    audio_normalization: Normalization | None = _field("none, peak, rms or loudness", "none, peak, rms or loudness")
    loudness_lufs: float | None = _number(
        MIN_LUFS, MAX_LUFS, "Target of audio_normalization `loudness`, which it implies"
    )
    delivery: Delivery = _field("auto, inline or s3", "How the audio is returned", default="auto")


class SpeechInput(AudioInput):
    """What operations that speak a text share: how to speak."""

    text: str | None = _field("text", "What to say")
    reference_audio: str | None = _recording("A recording of the voice")
    voice_name: str | None = _field("a name", "Name of a voice in the library")
    language: str = _field("a language code such as en", "ISO 639-1 code", default="en")
    temperature: float | None = _parameter("temperature", "Liveliness of the sampling")
    top_p: float | None = _parameter("top_p", "Nucleus sampling")
    top_k: int | None = _parameter("top_k", "Only the k likeliest tokens (turbo, nano)")
    min_p: float | None = _parameter("min_p", "Drop tokens less likely than this share of the likeliest (original)")
    repetition_penalty: float | None = _parameter("repetition_penalty", "Penalty on repeated tokens")
    exaggeration: float | None = _parameter("exaggeration", "Emotion, 0.5 is neutral (original, multilingual)")
    cfg_weight: float | None = _parameter("cfg_weight", "Guidance by the text, 0 is off (original, multilingual)")
    pronunciations: dict[str, str] | None = _field(
        f"an object of at most {MAX_PRONUNCIATIONS:,} words, each with what is said in its place",
        "Words, each with what is said in its place",
        max_length=MAX_PRONUNCIATIONS,
    )
    subtitles: SubtitleFormat | None = _field("srt or vtt", "Give subtitles too, as text")
    title: str | None = _field(
        f"text of at most {MAX_TITLE_CHARS} characters", "Title tag of the audio file", max_length=MAX_TITLE_CHARS
    )


class Tts(SpeechInput):
    """Speak a text."""

    operation: Literal["tts"] = "tts"
    text: str = _field("text", "What to say", default=...)
    voice_id: str | None = _field("an id", "Id of a voice in the library")


class LongFormSegment(BaseModel):
    """A stretch of a long text; what it does not say is as the job says."""

    model_config = JobInput.model_config

    text: str = _field("text", "What to say", default=...)
    voice_id: str | None = _field("an id", "Id of a voice in the library")
    voice_name: str | None = _field("a name", "Name of a voice in the library")
    reference_audio: str | None = _recording("A recording of the voice")
    language: str | None = _field("a language code such as en", "ISO 639-1 code")
    pause_after_s: float | None = _number(0.0, MAX_SEGMENT_PAUSE_S, "Silence behind it, seconds")


class LongForm(SpeechInput):
    """Speak a text of any length, or segments in voices of their own."""

    operation: Literal["long_form"] = "long_form"
    segments: list[LongFormSegment] | None = _field(
        f"a list of 1 to {MAX_SEGMENTS:,} objects, each with a text",
        "Instead of `text`: stretches of text, each in a voice of its own if it names one",
        min_length=1,
        max_length=MAX_SEGMENTS,
    )
    voice_id: str | None = _field("an id", "Id of a voice in the library")


class VoiceClone(SpeechInput):
    """Speak in the voice of a recording, and say what was made of it."""

    operation: Literal["voice_clone"] = "voice_clone"
    reference_audio: str = _recording("A recording of the voice", default=...)
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
    input_audio: str = _recording("The recording to convert", default=...)
    target_audio: str | None = _recording("A recording of the voice to convert to")
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


class DeleteVoice(VoiceInput, MakingInput):
    """Remove a voice from the library."""

    operation: Literal["delete_voice"] = "delete_voice"


class Info(JobInput):
    """Ask what this worker is."""

    operation: Literal["info"] = "info"


INPUT_MODELS: Mapping[str, type[JobInput]] = {
    "tts": Tts,
    "long_form": LongForm,
    "voice_clone": VoiceClone,
    "voice_conversion": VoiceConversion,
    "list_voices": ListVoices,
    "get_voice": GetVoice,
    "delete_voice": DeleteVoice,
    "info": Info,
}


@dataclass(frozen=True)
class ParsedJob:
    """A job that may be run.

    Args:
        request: its checked input.
        warnings: what had to be ignored in it.
        s3_config: the bucket that it brings along; None for none. Not in the input, so that no secret is.
    """

    request: JobInput
    warnings: tuple[str, ...]
    s3_config: S3Config | None = None


def parse_job(job: Mapping[str, Any]) -> ParsedJob:
    """Turn a platform job `{"id", "input": {…}, "s3Config": {…}}` into a checked request.

    Raises:
        JobError: invalid_request, naming the field at fault.
    """
    fields = _input_of(job)
    operation = _operation_of(fields)
    ours, warnings = adopt({**fields, "operation": operation})
    model = INPUT_MODELS[operation]
    s3_config, more_warnings = _s3_config_of(job, ours.pop(S3_CONFIG, None), model)
    _refuse_unknown(ours, model)
    if isinstance(given := ours.get("segments"), list):
        ours["segments"] = [_known_segment(segment, f"segments[{index}].") for index, segment in enumerate(given)]
    _refuse_broken_text(ours)
    try:
        request = model.model_validate(ours)
    except ValidationError as error:
        raise _first_problem(error, model) from None
    _refuse_contradictions(request)
    return ParsedJob(request, (*warnings, *more_warnings), s3_config)


def _s3_config_of(
    job: Mapping[str, Any], inside: object, model: type[JobInput]
) -> tuple[S3Config | None, tuple[str, ...]]:
    """The bucket that a job brings along, beside its input or in it, and what to say of one that is of no use."""
    beside = job.get(S3_CONFIG)
    if beside is not None and inside is not None:
        raise JobError(
            "invalid_request", f"{S3_CONFIG} is given beside the input and in it; send one of them", S3_CONFIG
        )
    if beside is None and inside is None:
        return None, ()
    config = parse_s3_config(beside if inside is None else inside)
    if not issubclass(model, AudioInput):
        operation = model.model_fields["operation"].default
        return None, (f"{S3_CONFIG} was ignored: operation {operation} gives no audio",)
    return config, ()


def operation_of(job: Mapping[str, Any]) -> str:
    """What a job asks for, whatever else may be wrong with it.

    Raises:
        JobError: invalid_request.
    """
    return _operation_of(_input_of(job))


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
    owners = [owner for owner, other in INPUT_MODELS.items() if name in other.model_fields]
    if owners:
        return f"{name} is not a field of operation {operation}, but of {', '.join(owners)}"
    return f"unknown field {_brief(name)}{_hint(name, model, (*FIELD_ALIASES, *IGNORED_FIELDS, S3_CONFIG))}"


def _hint(name: str, model: type[BaseModel], others: Iterable[str] = ()) -> str:
    nearest = difflib.get_close_matches(_clip(name).lower(), [*model.model_fields, *others], n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; known fields: {', '.join(model.model_fields)}"


def _known_segment(segment: object, place: str) -> object:
    """A segment without its nulls, which count as not given.

    Raises:
        JobError: invalid_request, for a name that is no field of a segment.
    """
    if not isinstance(segment, dict):
        return segment
    given = {name: value for name, value in segment.items() if value is not None}
    for name in given:
        if name not in LongFormSegment.model_fields:
            message = f"unknown field {place}{_clip(name)}{_hint(name, LongFormSegment)}"
            raise JobError("invalid_request", message, f"{place}{_clip(name)}")
    _refuse_broken_text(given, place)
    return given


def _refuse_broken_text(fields: Mapping[str, Any], place: str = "") -> None:
    """JSON can carry half a surrogate pair, which no tokenizer, file or result can."""
    for name, value in fields.items():
        texts = [value] if isinstance(value, str) else [*value, *value.values()] if isinstance(value, dict) else ()
        for text in texts:
            if isinstance(text, str) and not _is_unicode(text):
                raise JobError(
                    "invalid_request", f"{place}{name}: holds broken Unicode (half a surrogate pair)", f"{place}{name}"
                )


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _first_problem(error: ValidationError, model: type[JobInput]) -> JobError:
    problem: ErrorDetails = error.errors(include_url=False)[0]
    name, field = _place(problem["loc"], model)
    extra = field.json_schema_extra if field is not None else {"expected": "an object with a text"}
    expected = extra["expected"] if isinstance(extra, dict) else problem["msg"]
    found = "it is missing" if problem["type"] == "missing" else f"got {_brief(problem['input'])}"
    return JobError("invalid_request", f"{name}: expected {expected}, {found}", name)


def _place(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, FieldInfo | None]:
    """A field as a client would write it, such as `segments[3].text`, and its definition; none of a whole segment."""
    match location:
        case ("segments", int(index), str(name), *_):
            return f"segments[{index}].{name}", LongFormSegment.model_fields[name]
        case ("segments", int(index)):
            return f"segments[{index}]", None
        case (str(name), *_):
            return name, model.model_fields[name]
    raise AssertionError(location)


def _refuse_contradictions(request: JobInput) -> None:
    if isinstance(request, Tts | LongForm | VoiceConversion):
        _refuse_two_voices(request)
    if isinstance(request, LongForm):
        _refuse_long_form_contradictions(request)
    if isinstance(request, VoiceInput) and (request.voice_id is None) == (request.voice_name is None):
        raise JobError("invalid_request", "voice_id: expected a voice_id or a voice_name, one of them", "voice_id")
    if isinstance(request, VoiceClone) and request.save_to_library and request.voice_name is None:
        raise JobError(
            "invalid_request", "voice_name: expected a name to save the voice under, it is missing", "voice_name"
        )
    if isinstance(request, AudioInput):
        _refuse_output_contradictions(request)


def _refuse_two_voices(names: BaseModel, place: str = "") -> None:
    fields = ("voice_id", "voice_name", "reference_audio", "target_audio")
    given = [f"{place}{field}" for field in fields if getattr(names, field, None) is not None]
    if len(given) > 1:
        raise JobError("invalid_request", f"at most one voice may be named, got {' and '.join(given)}", given[1])


def _refuse_long_form_contradictions(request: LongForm) -> None:
    if (request.text is None) == (request.segments is None):
        found = "both" if request.segments else "neither"
        raise JobError("invalid_request", f"text: expected a text or segments, one of them, got {found}", "text")
    for index, segment in enumerate(request.segments or ()):
        _refuse_two_voices(segment, f"segments[{index}].")


def _refuse_output_contradictions(request: AudioInput) -> None:
    if request.loudness_lufs is not None and request.audio_normalization not in (None, "loudness"):
        raise JobError(
            "invalid_request",
            f"loudness_lufs goes with audio_normalization loudness, not {request.audio_normalization}",
            "loudness_lufs",
        )


def _brief(value: object) -> str:
    """A value as a person would write it in JSON, in ASCII and short enough for a message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value):,} items"
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
