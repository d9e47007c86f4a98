"""What is kept of a long request, so that no work is done twice: speech tokens by chunk, audio by pass of S3Gen.

Everything is kept under a hash of all that it was made from, so whoever asks for the same again, another worker
after a crash or a client with one sentence changed, finds what is still true and nothing else.
"""

from __future__ import annotations

from typing import Protocol


class WorkStore(Protocol):
    """Where it is kept. Never raises: what cannot be kept or read is made again. Called from several threads."""

    def get(self, key: str) -> bytes | None:
        """What was put under a key, whole, or None."""

    def put(self, key: str, data: bytes) -> None:
        """Keep something. Keys are like `audio/0f3a…`: two parts of lower-case letters, digits and -."""
