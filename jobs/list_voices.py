"""Operation `list_voices`: what the library holds, in pages."""

from __future__ import annotations

from typing import Any

from jobs.context import JobContext
from jobs.reference import library_of
from jobs.schema import ListVoices
from jobs.voices import told_as

SHOWN = ("voice_id", "name", "language", "gender", "description", "tags", "duration_s", "created")
"""Of each voice; `get_voice` gives the rest."""


async def run(request: ListVoices, context: JobContext) -> dict[str, Any]:
    """The voices that meet every condition, by name.

    Raises:
        JobError: invalid_request where there is no library. A store that fails meanwhile is no error: the
            voices last seen are listed.
    """
    voices = library_of(context, "operation")
    names = ("language", "gender", "tag", "text", "offset", "limit")
    with told_as({}):
        page = await voices.run(voices.library.list, **{name: getattr(request, name) for name in names})
    shown = [{name: value for name, value in voice.to_dict().items() if name in SHOWN} for voice in page.voices]
    return {"voices": shown, "total": page.total, "offset": request.offset, "warnings": list(context.warnings)}
