"""Named voices, kept between jobs: prompt audio, metadata and cached conditionals.

On a folder or in a bucket, so that all workers of a fleet share them. Knows nothing of the engine:
what it stores beside the audio are bytes and names.
"""

from __future__ import annotations

from voice_library.catalogue import Problem, VoicePage
from voice_library.errors import LibraryError
from voice_library.library import VoiceLibrary
from voice_library.metadata import Voice
from voice_library.s3_store import S3Options
from voice_library.stats import LibraryStats

__all__ = ["LibraryError", "LibraryStats", "Problem", "S3Options", "Voice", "VoiceLibrary", "VoicePage"]
