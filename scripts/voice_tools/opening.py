"""Which library a person means, and how its bucket is reached."""

from __future__ import annotations

import os
from collections.abc import Mapping

from voice_library import LibraryError, S3Options, VoiceLibrary

LOCATIONS = ("VOICES_URI", "VOICES_DIR")
"""Variables that a worker reads too; the first that is set counts."""


def location(asked: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The library that was asked for, or the environment's.

    Raises:
        LibraryError: invalid_request when neither says.
    """
    found = asked or next((environment[name] for name in LOCATIONS if environment.get(name)), None)
    if not found:
        message = "say where the library is: --library FOLDER or s3://bucket/prefix, or set VOICES_DIR or VOICES_URI"
        raise LibraryError("invalid_request", message, "library")
    return found


def s3_options(environment: Mapping[str, str] = os.environ) -> S3Options:
    """The worker's BUCKET_ settings where they are set; else what boto3 finds by itself."""
    return S3Options(
        endpoint_url=environment.get("BUCKET_ENDPOINT_URL") or None,
        access_key_id=environment.get("BUCKET_ACCESS_KEY_ID") or None,
        secret_access_key=environment.get("BUCKET_SECRET_ACCESS_KEY") or None,
    )


def open_library(asked: str | None) -> VoiceLibrary:
    """Raises:
    LibraryError: invalid_request, storage_failed.
    """
    return VoiceLibrary.open(location(asked), s3=s3_options())
