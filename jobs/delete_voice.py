"""Operation `delete_voice`: a voice and all that belongs to it, gone from the library."""

from __future__ import annotations

from typing import Any

from jobs.context import JobContext
from jobs.errors import JobError
from jobs.reference import library_of
from jobs.schema import DeleteVoice
from jobs.voices import Voices, told_as
from voice_library import LibraryError


async def run(request: DeleteVoice, context: JobContext) -> dict[str, Any]:
    """Delete the voice; the result says which it was.

    Raises:
        JobError: voice_not_found, invalid_request, storage_failed.
    """
    wanted, field = request.voice
    voices = library_of(context, field)
    info = await voices.run(_delete, wanted, field, voices)
    return {"voice_info": info, "deleted": True, "warnings": list(context.warnings)}


def _delete(wanted: str, field: str, voices: Voices) -> dict[str, Any]:
    try:
        info = voices.find(wanted, field).to_dict()
    except JobError as error:
        if error.code != "voice_not_found" or field != "voice_id":
            raise
        return _delete_unknown(wanted, voices, error)
    with told_as({"voice_id": field}):
        voices.library.delete(info["voice_id"])
    return info


def _delete_unknown(voice_id: str, voices: Voices, not_found: JobError) -> dict[str, Any]:
    """A voice may be so damaged that nothing is known of it but its id, and can be deleted all the same."""
    try:
        voices.library.delete(voice_id)
    except LibraryError as error:
        raise not_found if error.code == "voice_not_found" else error from error
    return {"voice_id": voice_id}
