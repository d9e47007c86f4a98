"""Operation `get_voice`: all that is known of a voice."""

from __future__ import annotations

from typing import Any

from jobs.context import JobContext
from jobs.reference import library_of
from jobs.schema import GetVoice


async def run(request: GetVoice, context: JobContext) -> dict[str, Any]:
    """The voice's metadata and the quality of its recording.

    Raises:
        JobError: voice_not_found, invalid_request, storage_failed.
    """
    wanted, field = request.voice
    voices = library_of(context, field)
    voice = await voices.run(voices.find, wanted, field)
    return {"voice_info": voice.to_dict(), "warnings": list(context.warnings)}
