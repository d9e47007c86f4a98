"""Voices out to files, and from one library to another.

Two libraries are compared by what their catalogues say: a voice's audio hash and its metadata. Only what
differs is read and written, so that a second run over unchanged voices reads no audio at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import soundfile

from voice_library import LibraryError, Voice, VoiceLibrary
from voice_library.audio import FloatArray
from voice_library.conditionals import MAX_BYTES as MAX_CONDITIONALS_BYTES
from voice_library.conditionals import folder as conditionals_folder
from voice_library.store import Store

Format = Literal["flac", "wav"]
Action = Literal["add", "update", "replace", "delete"]

_COPIED = ("name", "language", "gender", "description", "tags", "consent", "source", "quality")


@dataclass(frozen=True)
class Step:
    """One thing to do so that the target is like the source.

    Args:
        action: add a voice, update its metadata, replace it (other audio under the same id), or delete it.
        voice: the source's; for delete, the target's.
    """

    action: Action
    voice: Voice


def plan_sync(source: VoiceLibrary, target: VoiceLibrary, *, delete: bool) -> list[Step]:
    """What to do, deletions first, so that names become free. Reads no audio.

    Args:
        source, target: the libraries.
        delete: also remove from the target what the source does not have.

    Raises:
        LibraryError: storage_failed.
    """
    wanted = {voice.voice_id: voice for voice in source.list().voices}
    there = {voice.voice_id: voice for voice in target.list().voices}
    extra = [Step("delete", voice) for voice_id, voice in there.items() if voice_id not in wanted] if delete else []
    needed = ((_needed(voice, there.get(voice.voice_id)), voice) for voice in wanted.values())
    return extra + [Step(action, voice) for action, voice in needed if action is not None]


def _needed(voice: Voice, there: Voice | None) -> Action | None:
    if there is None:
        return "add"
    if there.audio_hash != voice.audio_hash:
        return "replace"
    return "update" if _metadata(there) != _metadata(voice) else None


def _metadata(voice: Voice) -> dict[str, Any]:
    content = voice.to_dict()
    return {name: content[name] for name in _COPIED}


def carry_out(step: Step, source: VoiceLibrary, target: VoiceLibrary) -> None:
    """Do one step of a plan.

    Raises:
        LibraryError: what either library raises; voice_exists when another voice has the name. A voice that was
            to be replaced and could not be is put back as it was.
    """
    voice = step.voice
    if step.action == "update":
        target.update(voice.voice_id, **_metadata(voice))
        return
    if step.action == "delete":
        target.delete(voice.voice_id)
        return
    audio, rate = source.get_audio(voice.voice_id)  # before anything is deleted: the source's may be damaged
    if step.action == "add":
        _add(target, voice, audio, rate)
    else:
        _replace(target, voice, audio, rate)


def _add(target: VoiceLibrary, voice: Voice, audio: FloatArray, rate: int) -> None:
    metadata = _metadata(voice)
    target.add(metadata.pop("name"), audio, rate, voice_id=voice.voice_id, created=voice.created, **metadata)


def _replace(target: VoiceLibrary, voice: Voice, audio: FloatArray, rate: int) -> None:
    """Give an id of the target other audio. An id is free for it only once its voice is deleted, so all that can
    be known to fail is looked for before, and the old voice is kept in memory until the new one is there."""
    others = (each for each in target.list().voices if each.voice_id != voice.voice_id)
    if any(voice.name in (other.name, other.voice_id) for other in others):
        message = f"another voice of the target has the name or id {voice.name!r}; nothing was deleted"
        raise LibraryError("voice_exists", message, "name")
    old = target.get(voice.voice_id)
    old_audio = _audio_if_sound(target, voice.voice_id)
    target.delete(voice.voice_id)
    try:
        _add(target, voice, audio, rate)
    except LibraryError as error:
        if old_audio is not None:
            _put_back(target, old, *old_audio, after=error)
        raise


def _put_back(target: VoiceLibrary, old: Voice, audio: FloatArray, rate: int, *, after: LibraryError) -> None:
    try:
        _add(target, old, audio, rate)
    except LibraryError as error:
        message = f"{after.message}; the target's {old.voice_id} could not be put back: {error.message}"
        raise LibraryError(after.code, message, after.field) from error


def _audio_if_sound(library: VoiceLibrary, voice_id: str) -> tuple[FloatArray, int] | None:
    """A voice's audio; None for a damaged one, of which there is nothing to put back."""
    try:
        return library.get_audio(voice_id, is_use=False)
    except LibraryError as error:
        if error.code != "reference_unreadable":
            raise
        return None


def copy_conditionals(voice_ids: set[str], source: Store, target: Store, *, dry_run: bool = False) -> int:
    """Copy what was computed of voices that are the same in both; returns how many files. Names hold a hash of
    the content, so what the target has under a name need not be read.

    Raises:
        LibraryError: storage_failed.
    """
    there = {entry.key for entry in target.list("voices/")}
    missing = [entry for entry in source.list("voices/") if entry.key not in there and _is_of(entry.key, voice_ids)]
    num_copied = 0
    for entry in missing:
        data = None if dry_run else source.read(entry.key, MAX_CONDITIONALS_BYTES)
        if data is not None:
            target.write(entry.key, data)
        num_copied += dry_run or data is not None
    return num_copied


def _is_of(key: str, voice_ids: set[str]) -> bool:
    voice_id = key.split("/")[1]
    return voice_id in voice_ids and key.startswith(conditionals_folder(voice_id))


def same_voices(source: VoiceLibrary, target: VoiceLibrary) -> set[str]:
    """Ids of the voices whose audio is the same in both."""
    hashes = {voice.voice_id: voice.audio_hash for voice in target.list().voices}
    return {voice.voice_id for voice in source.list().voices if hashes.get(voice.voice_id) == voice.audio_hash}


def export_voice(library: VoiceLibrary, voice: Voice, folder: Path, file_format: Format) -> Path:
    """Write `<id>.flac` or `<id>.wav` (24 bit, exactly what is kept) and `<id>.json`; returns the audio's path.

    Raises:
        LibraryError: of the library; storage_failed when the files cannot be written.
    """
    audio, rate = library.get_audio(voice.voice_id)
    path = folder / f"{voice.voice_id}.{file_format}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio, rate, subtype="PCM_24")
        text = json.dumps(voice.to_dict(), ensure_ascii=False, indent=2)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    except (OSError, soundfile.LibsndfileError) as error:
        raise LibraryError("storage_failed", f"{path} cannot be written: {error}", "to") from error
    return path


def each_safely(steps: list[Step], do: Callable[[Step], None], on_error: Callable[[Step, LibraryError], None]) -> int:
    """Do all steps; one that fails is told of and does not stop the rest. Returns how many were done.

    Raises:
        LibraryError: storage_failed, which would hold for every further step too.
    """
    num_done = 0
    for step in steps:
        try:
            do(step)
            num_done += 1
        except LibraryError as error:
            if error.code == "storage_failed":
                raise
            on_error(step, error)
    return num_done
