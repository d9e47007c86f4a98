"""Keeping a store small: what is too old or too much is removed, now and then, by every worker that shares it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from voice_library.store import Entry, Store

SWEEP_EVERY_S = 3600.0
_HALF_WRITTEN_S = 24 * 3600.0
"""After so long, what a killed writer left is removed; the audio of a job under way is younger."""

_CLOSE_WITHIN_S = 5.0

_log = logging.getLogger(__name__)


class Sweeper:
    """Removes entries of one store. Safe while others do the same, or write; nothing here raises.

    Args:
        store: where they lie; not closed here.
        is_ours: tells the keys that may be removed; nothing else is ever touched.
        max_age_s: older ones are removed.
        max_bytes: of all entries; the oldest are removed first.
    """

    def __init__(self, store: Store, is_ours: Callable[[str], bool], *, max_age_s: float, max_bytes: int) -> None:
        self._store, self._is_ours = store, is_ours
        self._max_age_s, self._max_bytes = max_age_s, max_bytes
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._sweep_on, name="sweep", daemon=True)

    def sweep(self) -> int:
        """Remove what is too old or too much; returns how many entries."""
        num_removed = 0
        try:
            self._store.sweep(_HALF_WRITTEN_S)
            for entry in self._superfluous():
                if self._is_closing.is_set():
                    break
                self._store.delete(entry.key)
                num_removed += 1
        except Exception as error:
            _log.warning("%s could not be swept: %s", self._store.describe(), error)
        if num_removed:
            _log.info("removed %d entries from %s", num_removed, self._store.describe())
        return num_removed

    def start(self) -> None:
        """Sweep now and then, beginning now, in the background."""
        self._thread.start()

    def close(self) -> None:
        """Stop sweeping."""
        self._is_closing.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_WITHIN_S)

    def is_alive(self) -> bool:
        """Whether it sweeps in the background."""
        return self._thread.is_alive()

    def _sweep_on(self) -> None:
        while not self._is_closing.is_set():
            self.sweep()
            self._is_closing.wait(SWEEP_EVERY_S)

    def _superfluous(self) -> Iterator[Entry]:
        """The oldest entries, as far as they are too old or too many."""
        entries = [entry for entry in self._store.list("") if self._is_ours(entry.key)]
        num_bytes = sum(entry.num_bytes for entry in entries)
        oldest_s = time.time() - self._max_age_s
        for entry in sorted(entries, key=lambda entry: entry.modified_s):
            if entry.modified_s >= oldest_s and num_bytes <= self._max_bytes:
                return
            num_bytes -= entry.num_bytes
            yield entry
