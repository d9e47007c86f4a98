"""Operation `voice_clone`: speak in the voice of a recording, say what was made of it, and save it if asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from engine.types import VoicePrompt
from jobs import delivery, reference, saving, speaking
from jobs.context import JobContext
from jobs.errors import JobError
from jobs.schema import VoiceClone
from voice_library import Voice

SAMPLE_SENTENCES: Mapping[str, str] = {
    "ar": "مرحبا، هذه عينة من الصوت المستنسخ.",
    "da": "Hej, dette er en prøve på den klonede stemme.",
    "de": "Hallo, dies ist eine Probe der geklonten Stimme.",
    "el": "Γεια σας, αυτό είναι ένα δείγμα της κλωνοποιημένης φωνής.",
    "en": "Hello, this is a sample of the cloned voice.",
    "es": "Hola, esta es una muestra de la voz clonada.",
    "fi": "Hei, tämä on näyte kloonatusta äänestä.",
    "fr": "Bonjour, voici un extrait de la voix clonée.",
    "he": "שלום, זוהי דוגמה של הקול המשוכפל.",
    "hi": "नमस्ते, यह क्लोन की गई आवाज़ का एक नमूना है।",
    "it": "Ciao, questo è un campione della voce clonata.",
    "ja": "こんにちは、これはクローンされた声のサンプルです。",
    "ko": "안녕하세요, 이것은 복제된 목소리의 샘플입니다.",
    "ms": "Helo, ini ialah contoh suara yang diklon.",
    "nl": "Hallo, dit is een voorbeeld van de gekloonde stem.",
    "no": "Hei, dette er en prøve på den klonede stemmen.",
    "pl": "Cześć, to jest próbka sklonowanego głosu.",
    "pt": "Olá, esta é uma amostra da voz clonada.",
    "ru": "Здравствуйте, это образец клонированного голоса.",
    "sv": "Hej, det här är ett prov på den klonade rösten.",
    "sw": "Habari, hii ni sampuli ya sauti iliyonakiliwa.",
    "tr": "Merhaba, bu klonlanmış sesin bir örneğidir.",
    "zh": "你好，这是克隆声音的样本。",
}
"""What is said when a job gives a recording and no text."""


_ROOM_FOR_VOICE_INFO_BYTES = 64_000
"""Most that is added to a result once the voice is saved: descriptions of it, of up to 2,000 characters each."""


async def run(request: VoiceClone, context: JobContext) -> dict[str, Any]:
    """Speak `request.text`, or a sample sentence, in the voice of `request.reference_audio`; save it if asked to.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    language = speaking.checked_language(request.language, context.engine.languages)
    text = _text(request, language)
    speaking.checked_text(text, context.settings)
    if request.save_to_library:
        return await _run_and_save(request, text, language, context)
    voice = await reference.resolve_voice(request, context)
    assert isinstance(voice.spoken, VoicePrompt), voice
    named = reference.ResolvedVoice(request.voice_name or voice.name, voice.spoken)
    result = await _speak(request, text, language, named, context)
    result["voice_info"] = _voice_info(named.name, voice.spoken)
    result["warnings"] += _not_saved(request)
    return result


async def _run_and_save(request: VoiceClone, text: str, language: str, context: JobContext) -> dict[str, Any]:
    """Saving comes last, and ends as it ends: a job that fails has saved nothing, and may be sent again."""
    voices = reference.library_of(context, "save_to_library")
    delivery.check_output(request, context.engine.sample_rate, streams=context.feed is not None)
    recording = await reference.load(request.reference_audio, "reference_audio", context)
    new = await voices.run(saving.prepare, request, recording, language, voices, context)
    named = reference.ResolvedVoice(new.about["name"], new.conditionals)
    result = await _speak(request, text, language, named, context)
    if limit := context.max_result_bytes:
        await asyncio.to_thread(delivery.check_result, result, max(limit - _ROOM_FOR_VOICE_INFO_BYTES, 1))
    voice = await _outcome(asyncio.ensure_future(voices.run(saving.save, new, voices)))
    result["voice_info"] = voice.to_dict() | {"saved": True}
    result["warnings"] += new.warnings
    return result


async def _outcome(saving_voice: asyncio.Future[Voice]) -> Voice:
    """What became of a save, even where the job's time ends or it is cancelled meanwhile: a thread cannot be
    stopped, and a client told `timed_out` would not know of the voice. Cancelled twice, the job is given up."""
    try:
        return await asyncio.shield(saving_voice)
    except asyncio.CancelledError:
        return await saving_voice


async def _speak(
    request: VoiceClone, text: str, language: str, voice: reference.ResolvedVoice, context: JobContext
) -> dict[str, Any]:
    fields = ("audio", "sample_audio") if request.text is None and context.feed is None else ("audio",)
    room_bytes = _ROOM_FOR_VOICE_INFO_BYTES
    return await speaking.speak(request, text, language, voice, context, fields=fields, room_bytes=room_bytes)


def _not_saved(request: VoiceClone) -> list[str]:
    """What to tell a client who may believe that a voice was saved."""
    given = [name for name in saving.SAVED_FIELDS if getattr(request, name) is not None]
    warnings = [f"{name} was ignored: it belongs to a voice that is saved (save_to_library)" for name in given]
    if request.voice_name is not None:
        warnings.append("voice_name only names the voice in this result; nothing was saved")
    return warnings


def _text(request: VoiceClone, language: str) -> str:
    if request.text is not None:
        return request.text
    if language not in SAMPLE_SENTENCES:
        raise JobError("invalid_request", f"text: there is no sample sentence in {language!r}; send a text", "text")
    return SAMPLE_SENTENCES[language]


def _voice_info(name: str, prompt: VoicePrompt) -> dict[str, Any]:
    return {
        "name": name,
        "duration_s": round(prompt.duration_s, 4),
        "sample_rate": prompt.sample_rate,
        "audio_hash": prompt.key,
    }
