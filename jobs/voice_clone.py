"""Operation `voice_clone`: speak in the voice of a recording, and say what was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.types import VoicePrompt
from jobs import reference, speaking
from jobs.context import JobContext
from jobs.errors import JobError
from jobs.schema import VoiceClone

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


async def run(request: VoiceClone, context: JobContext) -> dict[str, Any]:
    """Speak `request.text`, or a sample sentence, in the voice of `request.reference_audio`.

    Raises:
        JobError, SpeechError: see the job API's codes.
    """
    language = speaking.checked_language(request.language, context.engine.languages)
    text = _text(request, language)
    speaking.checked_text(text, context.settings.max_text_chars)
    voice = await reference.resolve_voice(request, context)
    assert voice.prompt is not None
    named = reference.ResolvedVoice(request.voice_name or voice.name, voice.prompt)
    result = await speaking.speak(request, text, language, named, context)
    result["voice_info"] = _voice_info(named.name, voice.prompt)
    if request.text is None:
        result["sample_audio"] = result["audio"]
    if request.voice_name is not None:
        result["warnings"].append("voice_name only names the voice in this result; nothing was saved")
    return result


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
