"""What a library can say of itself in figures, for people and for the worker's own report."""

from __future__ import annotations

from dataclasses import dataclass

from voice_library.cache import CacheStats
from voice_library.catalogue import Problem


@dataclass(frozen=True)
class LibraryStats:
    """Figures of a library.

    Args:
        location: folder or s3:// URI.
        num_voices: sound ones.
        num_conditionals: entries.
        audio_bytes: of all prompts as stored.
        conditionals_bytes: of all entries as stored.
        cache: prompt audio in memory.
        num_preloaded, num_preload_failures: voices made ready in the background, and those that could not be.
        problems: damaged voices known so far (`VoiceLibrary.check` finds all).
    """

    location: str
    num_voices: int
    num_conditionals: int
    audio_bytes: int
    conditionals_bytes: int
    cache: CacheStats
    num_preloaded: int
    num_preload_failures: int
    problems: tuple[Problem, ...]
