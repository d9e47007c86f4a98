"""Fields that clients of other Chatterbox workers send, and what becomes of them here.

A client should be able to point at this worker and be understood: names we have under another name are
renamed, and what has no counterpart is accepted and answered with a warning. Nothing is dropped without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.errors import JobError

OPERATION_ALIASES: Mapping[str, str] = {
    "voice_cloning": "voice_clone",
    "voice_transfer": "voice_conversion",
    "list_local_voices": "list_voices",
}

FIELD_ALIASES: Mapping[str, str] = {
    "cfg": "cfg_weight",
    "language_id": "language",
    "target_speaker": "target_audio",
}

OPERATION_FIELD_ALIASES: Mapping[str, Mapping[str, str]] = {
    "voice_clone": {"voice_description": "description"},
}
"""Further ones, which mean something to one operation only."""

IGNORED_FIELDS: Mapping[str, str] = {
    "speed": "the model sets its own pace",
    "streaming": "whether a worker streams is set where it is deployed (STREAMING)",
    "chunk_size": "the worker plans its own chunks",
    "context_window": "the worker plans its own chunks",
    "fade_duration": "the worker joins its own chunks",
    "voice_description": "voices come from recordings, not from descriptions",
    "voice_mode": "the voice is chosen by voice_id, voice_name or reference_audio",
    "target_voice": "the voice is chosen by voice_id, voice_name or reference_audio",
    "conversion_strength": "the model has no such control",
    "no_watermark": "all audio is watermarked",
    "print_metrics": "figures are always in the result's timings",
    "max_reference_duration_sec": "the model takes what it needs from the start of the recording",
    "user_id": "the worker keeps nothing per user",
}


def adopt(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Put a client's fields into our names.

    A null counts as not given, and so does `false` where a field is not used.

    Args:
        fields: of the job, with the operation in our name.

    Returns:
        The fields that remain, and a warning for each that was ignored.

    Raises:
        JobError: invalid_request, for a field given under both its names.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    aliases = {**FIELD_ALIASES, **OPERATION_FIELD_ALIASES.get(given.get("operation", ""), {})}
    ours: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in given.items():
        if name in IGNORED_FIELDS and name not in aliases:
            if value is not False:
                warnings.append(f"{name} was ignored: {IGNORED_FIELDS[name]}")
        else:
            ours[_our_name(name, given, aliases)] = value
    return ours, tuple(warnings)


def _our_name(name: str, given: Mapping[str, Any], aliases: Mapping[str, str]) -> str:
    ours = aliases.get(name, name)
    if ours != name and ours in given:
        raise JobError("invalid_request", f"{name} is another name of {ours}; send only one of them", name)
    return ours
