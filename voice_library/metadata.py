"""What is known of a voice, and its one written form: the catalogue record.

Whatever is read back passes the same checks as what is written, so that a record which was damaged, cut
or made by other hands is told from a sound one before anything relies on it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from voice_library import naming
from voice_library.audio import MAX_PROMPT_S, MAX_RATE_HZ, MIN_RATE_HZ
from voice_library.errors import LibraryError

MAX_TEXT_CHARS = 2_000
MAX_TAGS = 32
MAX_TAG_CHARS = 64
MAX_QUALITY_BYTES = 16_384
MAX_RECORD_BYTES = 1 << 20
_FORMAT = "voice/1"
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_HASH = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"prompt-[0-9a-f-]{1,64}\.flac")


@dataclass(frozen=True)
class Voice:
    """A voice of the library, as people and jobs see it.

    Args:
        voice_id: path-safe, never changes.
        name: unique, Unicode (NFC).
        language: a code such as `de` or `pt-BR`, or None.
        gender: in the words of whoever added it, or None.
        description: free text.
        tags: words to filter by.
        duration_s: of the prompt audio, seconds.
        sample_rate: of the prompt audio, Hz.
        created: ISO 8601, UTC.
        audio_hash: of the prompt audio (`voice_library.audio.audio_hash`).
        quality: what was measured of the recording, JSON values only. Do not change it; `to_dict` copies.
        consent: a note on the speaker's consent.
        source: where the recording comes from.
    """

    voice_id: str
    name: str
    language: str | None
    gender: str | None
    description: str
    tags: tuple[str, ...]
    duration_s: float
    sample_rate: int
    created: str
    audio_hash: str
    quality: Mapping[str, Any] = field(hash=False)
    consent: str
    source: str

    @functools.cached_property
    def folded(self) -> tuple[str, str]:
        """Name and id without their case. Kept: sorting and searching ask for them again and again."""
        return naming.fold(self.name), naming.fold(self.voice_id)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, in a dict of the caller's own."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {**values, "tags": list(self.tags), "quality": copy.deepcopy(dict(self.quality))}


@dataclass(frozen=True)
class Record:
    """A voice and where its prompt lies: what one file of the catalogue holds.

    Args:
        voice: what people see.
        prompt_file: name of the FLAC file in the voice's folder.
        prompt_bytes: its size.
        num_samples: of the audio in it.
        revision: grows with every change; of two records of one voice the higher one counts.
    """

    voice: Voice
    prompt_file: str
    prompt_bytes: int
    num_samples: int
    revision: int = 1

    @functools.cached_property
    def key(self) -> str:
        """Where the record lies: the name decides, so a name can be taken once only."""
        return record_key(self.voice.name)

    @property
    def prompt_key(self) -> str:
        return f"{voice_folder(self.voice.voice_id)}{self.prompt_file}"

    def to_bytes(self) -> bytes:
        prompt = {"file": self.prompt_file, "num_bytes": self.prompt_bytes, "num_samples": self.num_samples}
        content = {"format": _FORMAT, "revision": self.revision, "voice": self.voice.to_dict(), "prompt": prompt}
        return json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8")

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: when it is damaged, or of another format.
        """
        try:
            content = json.loads(data)
            if content["format"] != _FORMAT:
                raise ValueError(f"unknown format {content['format']!r}")
            prompt = content["prompt"]
            record = cls(
                voice=_checked_voice(content["voice"]),
                prompt_file=_matching(prompt["file"], _FILE),
                prompt_bytes=_positive(prompt["num_bytes"]),
                num_samples=_positive(prompt["num_samples"]),
                revision=_positive(content["revision"]),
            )
        except LibraryError as error:
            raise ValueError(error.message) from error
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"a field is missing or of a wrong kind: {error}") from error
        if not abs(record.voice.duration_s * record.voice.sample_rate - record.num_samples) <= 1:  # NaN is damage too
            raise ValueError("duration and number of samples do not agree")
        if record.num_samples > MAX_PROMPT_S * record.voice.sample_rate:  # what reads the audio makes room for them
            raise ValueError(f"{record.num_samples} samples are more than {MAX_PROMPT_S:g} s")
        return record


def record_key(name: str) -> str:
    """Key of the catalogue record of the voice of this name."""
    return f"catalogue/{naming.text_hash(name)}.json"


def voice_folder(voice_id: str) -> str:
    """What the keys of a voice's own files begin with."""
    return f"voices/{voice_id}/"


def claim_key(voice_id: str) -> str:
    """Key of the file that takes an id."""
    return f"{voice_folder(voice_id)}claim.json"


def _checked_voice(fields: Mapping[str, Any]) -> Voice:
    rate = _positive(fields["sample_rate"])
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise ValueError(f"sample rate {rate}")
    described = {name: check(fields[name], name) for name, check in DESCRIPTIONS.items()}
    return Voice(
        voice_id=naming.check_id(fields["voice_id"]),
        duration_s=float(fields["duration_s"]),
        sample_rate=rate,
        created=check_created(fields["created"]),
        audio_hash=_matching(fields["audio_hash"], _HASH),
        **described,
    )


def _matching(value: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(f"expected {pattern.pattern}, got {value[:80]!r}")
    return value


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected a positive whole number, got {value!r}")
    return value


def check_created(created: object) -> str:
    """A time as ISO 8601 in UTC, to the second; one without a zone is taken for UTC, None is now.

    Raises:
        LibraryError: invalid_request.
    """
    try:
        moment = datetime.now(UTC) if created is None else created
        if isinstance(moment, str):
            moment = datetime.fromisoformat(moment)
        if not isinstance(moment, datetime):
            raise ValueError(f"got {type(created).__name__}")
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return zoned.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError) as error:
        raise LibraryError("invalid_request", f"expected a date and time (ISO 8601): {error}", "created") from error


def _check_language(language: object, name: str) -> str | None:
    if language is None or (isinstance(language, str) and len(language) <= 35 and _LANGUAGE.fullmatch(language)):
        return language
    raise LibraryError("invalid_request", "expected a language code such as de or pt-BR", name)


def _check_gender(gender: object, name: str) -> str | None:
    return None if gender is None else _check_text(gender, name, MAX_TAG_CHARS)


def _check_text(text: object, name: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    if not isinstance(text, str) or len(text) > max_chars:
        raise LibraryError("invalid_request", f"expected text of at most {max_chars} characters", name)
    if naming.has_refused_char(text.replace("\n", " ").replace("\t", " ")):
        raise LibraryError("invalid_request", "expected text without control characters", name)
    return text


def _check_tags(tags: object, name: str) -> tuple[str, ...]:
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise LibraryError("invalid_request", "expected a list of words", name)
    words = [_check_text(tag, name, MAX_TAG_CHARS).strip() for tag in tags]
    distinct = tuple(dict.fromkeys(word for word in words if word))
    if len(distinct) > MAX_TAGS:
        raise LibraryError("invalid_request", f"expected at most {MAX_TAGS} tags", name)
    return distinct


def _check_quality(quality: object, name: str) -> dict[str, Any]:
    try:
        text = json.dumps(dict(quality or {}), allow_nan=False, ensure_ascii=False)  # type: ignore[call-overload]
        size = len(text.encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        raise LibraryError("invalid_request", f"expected JSON values: {error}", name) from error
    if size > MAX_QUALITY_BYTES:
        raise LibraryError("invalid_request", f"expected at most {MAX_QUALITY_BYTES} bytes of JSON", name)
    copied: dict[str, Any] = json.loads(text)
    return copied


DESCRIPTIONS: Mapping[str, Any] = {
    "name": naming.check_name,
    "language": _check_language,
    "gender": _check_gender,
    "description": _check_text,
    "tags": _check_tags,
    "quality": _check_quality,
    "consent": _check_text,
    "source": _check_text,
}
"""What can be said of a voice and changed later, each with its check: (value, field) -> value, or invalid_request."""


def described_as(**metadata: Any) -> dict[str, Any]:
    """What is said of a voice, as it is kept.

    Raises:
        LibraryError: invalid_request.
    """
    return {name: DESCRIPTIONS[name](value, name) for name, value in metadata.items()}
