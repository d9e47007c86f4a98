"""Which voices are used most, so that a starting worker can make those ready first.

Every worker counts in memory and now and then adds its counts to one of a few small files. Two that add
to the same file at the same moment lose some counts: the order of voices bears it, and nobody waits.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Container

from voice_library.errors import LibraryError
from voice_library.store import Store

_log = logging.getLogger(__name__)

_FILES = tuple(f"usage/{number}.json" for number in range(8))
_MAX_BYTES = 4 << 20
_HALVE_AT = 10_000
"""Counts of one file are halved when they add up to more: what was popular once gives way."""


class Usage:
    """Counts of uses per voice id.

    Args:
        store: where counts of all workers meet.
        save_every_s: least time between two writes of this process.
    """

    def __init__(self, store: Store, save_every_s: float = 60.0) -> None:
        self._store = store
        self._save_every_s = save_every_s
        self._saved_s = time.monotonic()
        self._key = secrets.choice(_FILES)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, voice_id: str) -> bool:
        """Note one use; whether it is time to `save`."""
        with self._lock:
            self._counts[voice_id] += 1
            return time.monotonic() - self._saved_s > self._save_every_s

    def save(self, existing: Container[str]) -> None:
        """Add this process's counts to the store's, less those of voices that are gone. Never raises."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            self._saved_s = time.monotonic()
        if not counts:
            return
        try:
            merged = _read(self._store, self._key) + counts
            if merged.total() > _HALVE_AT:
                merged = Counter({voice_id: number // 2 for voice_id, number in merged.items()})
            kept = {voice_id: number for voice_id, number in merged.items() if number > 0 and voice_id in existing}
            self._store.write(self._key, json.dumps(kept).encode())
        except LibraryError as error:
            _log.info("counts of voice usage were not saved: %s", error.message)

    def most_used(self, number: int) -> list[str]:
        """Ids of the voices most used by all workers, most used first.

        Raises:
            LibraryError: storage_failed.
        """
        with self._lock:
            total = self._counts.copy()
        for entry in self._store.list("usage/"):
            total += _read(self._store, entry.key)
        return [voice_id for voice_id, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:number]]


def _read(store: Store, key: str) -> Counter[str]:
    """The counts in a file; none, if it is missing or damaged."""
    try:
        content = json.loads(store.read(key, _MAX_BYTES) or b"{}")
    except (ValueError, RecursionError):
        return Counter()
    pairs = content.items() if isinstance(content, dict) else ()
    return Counter({name: number for name, number in pairs if type(number) is int and 0 < number <= _HALVE_AT})
