"""Who is at work on what, among workers that share a store: one at a time, and never a dead one for long.

A claim is an entry that one worker creates and the others find. Its owner writes it anew every few seconds; one that
has not changed for a while belongs to a worker that is gone, and whoever sees that may take its place. Time is measured
by each worker's own clock, from when it first saw the claim as it is, since clocks of machines differ; only what is
older than they may differ is known at once to be abandoned.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cachetools import LRUCache

from voice_library.store import Entry, Store

RENEW_EVERY_S = 10.0
STALE_AFTER_S = 45.0

CLOCKS_DIFFER_S = 120.0
"""By less than this the clocks of workers and of the store are taken to differ."""

_MAX_CLAIM_BYTES = 1_000
_MAX_SEEN = 10_000

_log = logging.getLogger(__name__)


@dataclass
class _Held:
    """A claim of this worker.

    Args:
        token: tells it from all others.
        num_renewals: makes each version of it another.
        lock: held while it is written or removed, and of `is_over`.
        is_over: whether it is released, or was lost.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(16))
    num_renewals: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_over: bool = False

    @property
    def content(self) -> bytes:
        return json.dumps({"owner": self.token, "renewed": self.num_renewals}).encode()

    def is_owner_of(self, data: bytes | None) -> bool:
        """Whether a claim that was read is this one."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return data is not None and json.loads(data)["owner"] == self.token
        return False


class Claims:
    """The claims of one worker in a store. Thread-safe; all but `close` blocks.

    Args:
        store: shared with the other workers; not closed here.
        renew_every_s: how often what is held is written anew.
        stale_after_s: after how long without that it counts as abandoned; several times as long.
        clock: gives seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        renew_every_s: float = RENEW_EVERY_S,
        stale_after_s: float = STALE_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert renew_every_s < stale_after_s, (renew_every_s, stale_after_s)
        self._store = store
        self._renew_every_s, self._stale_after_s = renew_every_s, stale_after_s
        self._clock = clock
        self._lock = threading.Lock()  # of the next three
        self._held: dict[str, _Held] = {}
        self._seen: LRUCache[str, tuple[str, float]] = LRUCache(_MAX_SEEN)  # others' claims: version, since when
        self._renewer: threading.Thread | None = None
        self._is_closing = threading.Event()

    def take(self, key: str) -> bool:
        """Claim a key, if nobody holds it who is still there.

        Raises:
            LibraryError: storage_failed.
        """
        held = _Held()
        is_ours = self._store.create(key, held.content) or (
            self._removed_if_stale(key) and self._store.create(key, held.content)
        )
        if not is_ours:
            return False
        with self._lock:
            self._seen.pop(key, None)
            self._held[key] = held
            self._start_renewing()
        return True

    def release(self, key: str) -> None:
        """Give up a claim, if it is still held. Never raises: one that cannot be removed is soon stale."""
        with self._lock:
            held = self._held.pop(key, None)
        if held is None:
            return
        with held.lock:
            held.is_over = True
            try:
                entry = self._entry(key)
                if entry is not None and held.is_owner_of(self._store.read(key, _MAX_CLAIM_BYTES)):
                    self._store.remove(key, entry.version)
            except Exception as error:
                _log.warning("a claim could not be released: %s", error)

    def close(self) -> None:
        """Renew nothing more."""
        self._is_closing.set()

    def _removed_if_stale(self, key: str) -> bool:
        """Remove another's claim that is abandoned; True too where there is none any more."""
        entry = self._entry(key)
        if entry is None:
            return True
        if not self._is_stale(entry):
            return False
        _log.warning("a worker that held a claim is gone; its claim is taken over")
        return self._store.remove(key, entry.version)

    def _is_stale(self, entry: Entry) -> bool:
        now_s = self._clock()
        with self._lock:
            version, since_s = self._seen.get(entry.key, ("", now_s))
            if version != entry.version:
                since_s = now_s
                self._seen[entry.key] = entry.version, since_s
        is_long_ago = time.time() - entry.modified_s > self._stale_after_s + CLOCKS_DIFFER_S
        return is_long_ago or now_s - since_s > self._stale_after_s

    def _entry(self, key: str) -> Entry | None:
        return next((entry for entry in self._store.list(key) if entry.key == key), None)

    # ------------------------------------------------------------------------------ renewing

    def _start_renewing(self) -> None:
        if self._renewer is None:
            self._renewer = threading.Thread(target=self._renew_on, name="claims", daemon=True)
            self._renewer.start()

    def _renew_on(self) -> None:
        while not self._is_closing.wait(self._renew_every_s):
            with self._lock:
                held = list(self._held.items())
            for key, claim in held:
                self._renew(key, claim)

    def _renew(self, key: str, held: _Held) -> None:
        with held.lock:
            if held.is_over:
                return
            try:
                held.is_over = not self._renewed(key, held)
            except Exception as error:  # whatever it is: all claims of this worker are renewed by this thread
                _log.warning("a claim could not be renewed: %s", error)
                return
        if held.is_over:
            _log.warning("a claim was lost: another worker took this one for dead")

    def _renewed(self, key: str, held: _Held) -> bool:
        """Write it anew, if it is still there."""
        entry = self._entry(key)
        if entry is None or not held.is_owner_of(self._store.read(key, _MAX_CLAIM_BYTES)):
            return False
        held.num_renewals += 1
        return self._store.replace(key, held.content, entry.version)
