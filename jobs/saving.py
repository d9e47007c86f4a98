"""From a client's recording to a voice of the library: judged, its best part chosen, kept when all went well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.types import Conditionals, VoicePrompt
from jobs import reference
from jobs.context import JobContext
from jobs.schema import VoiceClone
from jobs.voices import Voices, told_as
from voice_library import Voice
from voice_library.audio import as_kept
from voice_library.quality import prepare_reference

SAVED_FIELDS = ("voice_id", "description", "gender", "tags", "consent", "source")
"""What only a voice that is saved has."""

_JOBS_NAMES = {"name": "voice_name", "audio": "reference_audio"}


@dataclass(frozen=True)
class NewVoice:
    """A voice that may be saved.

    Args:
        about: arguments of `VoiceLibrary.add` beside the audio.
        prompt: the chosen part of the recording, as it will read back.
        conditionals: what the engine made of it.
        warnings: of its quality.
    """

    about: dict[str, Any]
    prompt: VoicePrompt
    conditionals: Conditionals
    warnings: tuple[str, ...]


def prepare(request: VoiceClone, recording: bytes, language: str, voices: Voices, context: JobContext) -> NewVoice:
    """Read and judge the recording; refuse early what could not be saved. Blocks.

    Args:
        request: with the voice's name.
        recording: the file that `request.reference_audio` means.
        language: of the voice, as the engine calls it; kept if the client said it.
        voices: where to save to.
        context: the job's limits.

    Raises:
        JobError, SpeechError: invalid_request, voice_exists, voice_library_full, storage_failed, and those of a
            recording that will not do: unreadable, too short for the model, too long, silent.
    """
    given = {name: getattr(request, name) for name in SAVED_FIELDS}
    about = {name: value for name, value in given.items() if value is not None}
    if "language" in request.model_fields_set:
        about["language"] = language
    with told_as(_JOBS_NAMES):
        about |= voices.library.check_new(request.voice_name or "", **about)
        audio, rate = reference.read_recording(recording, "reference_audio", context.settings.max_reference_s)
        judged = prepare_reference(audio, rate, min_s=context.engine.min_reference_s)
        prompt = VoicePrompt(as_kept(judged.audio), judged.sample_rate)
        conditionals = voices.embed(prompt)
    about["quality"] = judged.quality
    return NewVoice(about, prompt, conditionals, tuple(f"reference_audio: {warning}" for warning in judged.warnings))


def save(new: NewVoice, voices: Voices) -> Voice:
    """Keep the voice and, in the background, what the engine made of it. Blocks.

    Raises:
        JobError: voice_exists where another was first, voice_library_full, storage_failed.
    """
    with told_as(_JOBS_NAMES):
        voice = voices.library.add(audio=new.prompt.audio, sample_rate=new.prompt.sample_rate, **new.about)
    assert voice.audio_hash == new.prompt.key, (voice.audio_hash, new.prompt.key)
    voices.store(voice, new.conditionals)
    return voice
