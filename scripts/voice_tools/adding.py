"""Recordings as files, read with bounds, and made into voices one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.audio.reading import decode
from voice_library import LibraryError, Voice, VoiceLibrary
from voice_library.quality import prepare_reference

SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"})
MAX_FILE_BYTES = 256 << 20
MAX_RECORDING_S = 1_800.0
"""A part of 15 s is kept. What decodes to more than half an hour is refused while it is being decoded."""


@dataclass(frozen=True)
class Added:
    """Args:
    path: the recording.
    voice: what it became.
    warnings: of its quality.
    """

    path: Path
    voice: Voice
    warnings: tuple[str, ...]


def recordings(paths: Iterable[Path]) -> list[Path]:
    """The files, and for a folder all recordings directly in it, by name.

    Raises:
        LibraryError: invalid_request when there is nothing.
    """
    found = [each for path in paths for each in _in(path)]
    if not found:
        raise LibraryError("invalid_request", f"no recordings ({', '.join(sorted(SUFFIXES))}) found", "files")
    return found


def _in(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    yield from sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())


def add_recording(
    library: VoiceLibrary, path: Path, *, name: str | None, min_s: float, about: Mapping[str, Any]
) -> Added:
    """Read, judge and keep a recording.

    Args:
        library: where to.
        path: of the file.
        name: of the voice; None for the file's name.
        min_s: what is kept must be longer than this, seconds.
        about: further arguments of `VoiceLibrary.add`.

    Raises:
        LibraryError, SpeechError: of reading, of quality, of the library.
    """
    audio, rate = decode(_read(path), max_duration_s=MAX_RECORDING_S, field=path.name)
    prepared = prepare_reference(audio, rate, min_s=min_s)
    voice = library.add(
        name or path.stem,
        prepared.audio,
        prepared.sample_rate,
        quality=prepared.quality,
        **{"source": path.name, **about},
    )
    return Added(path, voice, prepared.warnings)


def _read(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        LibraryError: reference_unreadable.
    """
    if not path.is_file():  # a pipe or a device would never end
        what = "is not a file" if path.exists() else "is not there"
        raise LibraryError("reference_unreadable", f"{path} {what}", "files")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise LibraryError("reference_unreadable", f"{path}: {error.strerror or error}", "files") from error
    if len(data) > MAX_FILE_BYTES:
        raise LibraryError("reference_unreadable", f"{path} is larger than {MAX_FILE_BYTES >> 20} MB", "files")
    return data
