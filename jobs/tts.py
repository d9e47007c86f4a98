"""Operation `tts`: a text in the named voice."""

from __future__ import annotations

from typing import Any

from jobs import reference, speaking
from jobs.context import JobContext
from jobs.schema import Tts


async def run(request: Tts, context: JobContext) -> dict[str, Any]:
    """Speak `request.text`.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    text = speaking.checked_text(request.text, context.settings)
    language = speaking.checked_language(request.language, context.engine.languages)
    voice = await reference.resolve_voice(request, context)
    return await speaking.speak(request, text, language, voice, context)
