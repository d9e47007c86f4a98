"""What workers computed from a voice, kept for the others: opaque bytes under a caller's key.

The hash of the content is part of the file's name: a file is never overwritten, a damaged one is told at
once, and what is stored is exactly the caller's bytes (so a safetensors file stays one).
"""

from __future__ import annotations

import hashlib
import logging
import re
import time

from voice_library import naming
from voice_library.errors import LibraryError
from voice_library.metadata import voice_folder
from voice_library.store import Entry, Store

_log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
_FILE = re.compile(r"[0-9a-f]{32}-([0-9a-f]{32})\.safetensors")
_MAX_KEY_CHARS = 4_096


def folder(voice_id: str) -> str:
    """What the keys of a voice's conditionals begin with."""
    return f"{voice_folder(voice_id)}conditionals/"


def get(store: Store, voice_id: str, key: str) -> bytes | None:
    """The newest sound entry under a key, or None; damaged ones are logged and passed over.

    Raises:
        LibraryError: invalid_request (key), storage_failed.
    """
    entries = store.list(_prefix(voice_id, key))
    for entry in sorted(entries, key=lambda entry: entry.modified_s, reverse=True):
        data = read_sound(store, entry)
        if data is not None:
            return data
    return None


def put(store: Store, voice_id: str, key: str, data: bytes, *, older_than_s: float) -> str:
    """Keep an entry; returns its key in the store. Others under the same key go once they are older than
    `older_than_s`: two workers that write at the same time must not each remove what the other wrote.

    Raises:
        LibraryError: invalid_request, storage_failed.
    """
    if not isinstance(data, bytes | bytearray | memoryview) or not 0 < len(data) <= MAX_BYTES:
        raise LibraryError("invalid_request", f"expected 1 to {MAX_BYTES} bytes", "data")
    prefix = _prefix(voice_id, key)
    written = f"{prefix}{_digest(bytes(data))}.safetensors"
    store.write(written, bytes(data))
    limit_s = time.time() - older_than_s
    for entry in list(store.list(prefix)):
        if entry.key != written and entry.modified_s < limit_s:
            store.delete(entry.key)
    return written


def read_sound(store: Store, entry: Entry) -> bytes | None:
    """The content of an entry if it is what was written; else None, and a line in the log."""
    expected = _FILE.fullmatch(entry.key.rpartition("/")[2])
    data = store.read(entry.key, min(entry.num_bytes, MAX_BYTES))
    if data is not None and expected is not None and _digest(data) == expected.group(1):
        return data
    if data is not None:
        _log.warning("stored conditionals are damaged and will be computed again: %s", entry.key)
    return None


def _prefix(voice_id: str, key: object) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= _MAX_KEY_CHARS:
        raise LibraryError("invalid_request", f"expected a key of 1 to {_MAX_KEY_CHARS} characters", "key")
    return f"{folder(voice_id)}{naming.text_hash(key)}-"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
