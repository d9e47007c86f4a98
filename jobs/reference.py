"""The voice a job asks for: from the text of `reference_audio` to a VoicePrompt, from a name to conditionals.

Everything about a client's bytes is bounded before it is read: the size before decoding base64 or
opening a file, the duration before decoding samples. A field is first made bytes (`load`), which may
mean to wait for a server, and then audio, in a thread, so that a large recording never holds up the
jobs beside it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel

from engine.types import FloatArray, Voice, VoicePrompt
from jobs.context import JobContext
from jobs.errors import JobError
from jobs.fetch import SCHEMES
from jobs.schema import SpeechInput, VoiceConversion
from jobs.settings import Settings
from jobs.voices import Voices, told_as

BUILT_IN = "built-in"
"""What a result calls the model's own voice."""

REFERENCE = "reference"
"""What a result calls the voice of a recording that has no name."""

RECORDINGS = ("reference_audio", "target_audio")
"""Fields that hold a recording of a voice."""

_VOICE_FIELDS = (*RECORDINGS, "voice_id", "voice_name")  # beside a recording, a name is what to call its voice
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}):")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\v\f"
_MAX_WRAPPED = 2  # base64 wrapped in lines, even of four characters each, is not twice as long


@dataclass(frozen=True)
class ResolvedVoice:
    """A voice to speak with.

    Args:
        name: what the result calls it.
        spoken: what the engine is given; None for the model's built-in voice.
    """

    name: str
    spoken: Voice | None = None


async def resolve_voice(request: SpeechInput | VoiceConversion, context: JobContext) -> ResolvedVoice:
    """Find the voice that a request names, or the deployment's default.

    Raises:
        JobError, SpeechError: as `resolve`.
    """
    return await resolve(named_voice(request), context)


def named_voice(names: BaseModel) -> tuple[str, str] | None:
    """The field by which a request (or a segment of one) names a voice, and what it says; None where it names none."""
    for field in _VOICE_FIELDS:
        if (wanted := getattr(names, field, None)) is not None:
            return field, wanted
    return None


async def resolve(named: tuple[str, str] | None, context: JobContext) -> ResolvedVoice:
    """Find a voice as `named_voice` gives it; None is the deployment's default.

    Raises:
        JobError: voice_not_found, storage_failed, download_refused, download_failed, reference_unreadable,
            reference_too_short, reference_too_long, reference_silent, invalid_request.
        SpeechError: those of a recording.
    """
    if named is None:
        default = context.settings.default_voice
        return ResolvedVoice(BUILT_IN) if default is None else await _default(default, context)
    field, wanted = named
    if field in RECORDINGS:
        data = await load(wanted, field, context)
        return ResolvedVoice(REFERENCE, await asyncio.to_thread(read_reference, data, field, context.settings))
    return await _named(wanted, field, context)


def library_of(context: JobContext, field: str) -> Voices:
    """The worker's voices.

    Args:
        field: of the job, which needs them.

    Raises:
        JobError: where no library is configured.
    """
    if context.voices is not None:
        return context.voices
    code = "voice_not_found" if field.startswith("voice_") else "invalid_request"
    raise JobError(code, f"{field}: this worker has no voice library (VOICES_DIR or VOICES_URI)", field)


async def _named(wanted: str, field: str, context: JobContext) -> ResolvedVoice:
    """A voice of the library, ready to speak."""
    voices = library_of(context, field)
    return await voices.run(_ready, voices, wanted, field)


def _ready(voices: Voices, wanted: str, field: str) -> ResolvedVoice:
    """A voice with its conditionals. Blocks."""
    voice = voices.find(wanted, field)
    with told_as(dict.fromkeys(("voice", "voice_id", "reference_audio"), field)):
        return ResolvedVoice(voice.name, voices.conditionals(voice))


async def _default(wanted: str, context: JobContext) -> ResolvedVoice:
    """The voice of jobs that name none."""
    try:
        return await _named(wanted, "voice_name", context)
    except JobError as error:
        raise JobError(error.code, f"DEFAULT_VOICE: {error.message}") from error


async def load(source: str, field: str, context: JobContext) -> bytes:
    """The file that an audio field means.

    Args:
        source: base64, a data URI, https://…, s3://bucket/key, or (where local files are allowed) `file:PATH`.
        field: name of the input field, for errors.
        context: the job's limits and permissions.

    Raises:
        JobError: download_refused, download_failed, reference_too_long, reference_unreadable.
    """
    source = source.strip()
    if scheme_of(source) not in SCHEMES or context.fetch is None:
        max_bytes = context.settings.max_reference_bytes
        return await asyncio.to_thread(given, source, field, max_bytes, local_files=context.local_files)
    data = await context.fetch(source, field)
    context.figures.num_downloads += 1
    context.figures.num_downloaded_bytes += len(data)
    return _not_empty(data, field)


def read_reference(data: bytes, field: str, settings: Settings) -> VoicePrompt:
    """Read a recording of a voice. Blocks: call it in a thread.

    Raises:
        SpeechError: reference_unreadable, reference_too_short, reference_too_long, reference_silent.
    """
    from engine.audio.reading import check_reference

    audio, sample_rate = read_recording(data, field, settings.max_reference_s)
    check_reference(audio, sample_rate, field=field)
    return VoicePrompt(audio, sample_rate)


def read_recording(data: bytes, field: str, max_duration_s: float) -> tuple[FloatArray, int]:
    """As `read_reference`, whatever the recording holds: float32 (T,) mono in [-1, 1] and its rate in Hz."""
    from engine.audio.reading import decode

    return decode(data, max_duration_s=max_duration_s, field=field)


def scheme_of(source: str) -> str:
    """Of an address, in lower case; "" of base64."""
    found = _SCHEME.match(source.strip())
    return found[1].lower() if found else ""


def given(source: str, field: str, max_bytes: int, *, local_files: bool = False) -> bytes:
    """What is in an audio field itself, or in a file. Blocks.

    Args:
        source: base64, a data URI, or (where local files are allowed) `file:PATH`.
        field: name of the input field, for errors.
        max_bytes: of the recording.
        local_files: whether files of this machine may be read.

    Raises:
        JobError: download_refused, reference_too_long, reference_unreadable.
    """
    source = source.strip()
    scheme = scheme_of(source)
    if not scheme:
        return _from_base64(source, field, max_bytes)
    if scheme == "data":
        return _from_data_uri(source, field, max_bytes)
    if scheme == "file" and local_files:
        return _from_file(source[len("file:") :], field, max_bytes)
    raise JobError("download_refused", f"{field}: {_refusal(scheme)}", field)


def _refusal(scheme: str) -> str:
    send = "send the recording as base64, data URI, https URL or s3://bucket/key"
    if scheme == "file":
        return f"file: is read in local test mode only; {send}"
    return f"this worker does not fetch {scheme}: addresses; {send}"


def _from_base64(text: str, field: str, max_bytes: int) -> bytes:
    _check_size(len(text) * 3 // 4 // _MAX_WRAPPED, field, max_bytes)
    try:
        compact = text.encode("ascii").translate(_URL_SAFE, _WHITE_SPACE)  # wrapped and URL-safe spellings are common
        _check_size(len(compact) * 3 // 4, field, max_bytes)
        data = base64.b64decode(compact, validate=True)
    except UnicodeEncodeError as error:
        raise JobError(
            "reference_unreadable", f"{field}: expected base64 or a data URI, got other characters", field
        ) from error
    except (binascii.Error, ValueError) as error:
        raise JobError("reference_unreadable", f"{field}: expected base64 or a data URI ({error})", field) from error
    return _not_empty(data, field)


def _from_data_uri(uri: str, field: str, max_bytes: int) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise JobError("reference_unreadable", f"{field}: the data URI has no comma before its data", field)
    if header.rpartition(";")[2].strip().lower() == "base64":
        return _from_base64(body, field, max_bytes)
    _check_size(len(body) // 3, field, max_bytes)
    return _not_empty(unquote_to_bytes(body), field)


def _from_file(path_text: str, field: str, max_bytes: int) -> bytes:
    path = Path(path_text.removeprefix("//")).expanduser()
    try:
        _check_size(path.stat().st_size, field, max_bytes)
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise JobError("reference_unreadable", f"{field}: cannot read {path}: {reason}", field) from error
    return _not_empty(data, field)


def _check_size(num_bytes: int, field: str, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise JobError(
            "reference_too_long",
            f"{field}: at most {max_bytes / 1e6:.1f} MB, got {num_bytes / 1e6:.1f} MB",
            field,
        )


def _not_empty(data: bytes, field: str) -> bytes:
    if not data:
        raise JobError("reference_unreadable", f"{field}: the recording is empty", field)
    return data
