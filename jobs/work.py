"""What long jobs keep, so that no work is done twice: entries in a folder or a bucket that all workers share.

Keeping is a favour and never a condition: a store that fails costs a warning, not a job. All lies under
`checkpoints/` of WORK_DIR, and nothing else there is ever looked at or removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jobs.settings import Settings
from jobs.sweeping import Sweeper
from jobs.voices import s3_options
from voice_library import LibraryError, S3Options
from voice_library.folder_store import FolderStore
from voice_library.location import open_store
from voice_library.store import Store

FOLDER = "checkpoints"

MAX_ENTRY_BYTES = 256 << 20
"""What is larger is not kept: a pass's audio takes a few megabytes."""

REST_S = 60.0
"""For so long a store that failed is left alone: one that hangs would hold up every chunk."""

_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _ATTEMPTS = 3.0, 10.0, 2  # impatient: what cannot be had soon is made again
_KEY = re.compile(r"[a-z0-9][a-z0-9-]*/[a-z0-9][a-z0-9-]*")

_log = logging.getLogger(__name__)


def open_work(settings: Settings) -> Work | None:
    """The store that WORK_DIR names, swept from now on; None where it names none.

    Raises:
        LibraryError: invalid_request, storage_failed, for what cannot be a store. One that cannot be reached is
            no error.
    """
    store = open_below(settings, FOLDER)
    if store is None:
        return None
    work = Work(store, max_age_s=settings.work_max_age_h * 3600.0, max_bytes=settings.work_max_bytes)
    work.start_sweeping()
    return work


def open_below(settings: Settings, folder: str) -> Store | None:
    """The store in a folder of WORK_DIR; None where that is not set.

    Raises:
        LibraryError: as `open_work`.
    """
    if settings.work_dir is None:
        return None
    try:
        if Path(settings.work_dir).is_file():
            raise LibraryError("storage_failed", f"{settings.work_dir} is a file; expected a folder")
        store, _ = open_store(_below(settings.work_dir, folder), impatient(settings))
    except LibraryError as error:
        raise LibraryError(error.code, f"WORK_DIR: {error.message}", "WORK_DIR") from error
    return store


def impatient(settings: Settings) -> S3Options:
    """How a bucket is reached that jobs can do without."""
    return dataclasses.replace(
        s3_options(settings),
        connect_timeout_s=_CONNECT_TIMEOUT_S,
        read_timeout_s=_READ_TIMEOUT_S,
        attempts=_ATTEMPTS,
    )


class Work:
    """Entries of all jobs, in one store. Thread-safe; nothing here raises.

    Args:
        store: where they lie; closed by `close`.
        max_age_s: older ones are removed.
        max_bytes: of all entries; the oldest are removed first.
        clock: seconds, for how long the store is left alone.
    """

    def __init__(
        self, store: Store, *, max_age_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()  # of the next one
        self._failed_at_s: float | None = None
        self._sweeper = Sweeper(store, _is_ours, max_age_s=max_age_s, max_bytes=max_bytes)

    @property
    def folder(self) -> Path | None:
        """A folder for a job's temporary files, on the same volume; None where this is a bucket.

        The store keeps half-written files there, and what a dead worker may leave in it is removed with them.
        """
        return Path(self._store.describe()) / "tmp" if isinstance(self._store, FolderStore) else None

    def for_job(self) -> JobWork:
        """These entries, for one job."""
        return JobWork(self)

    def get(self, key: str) -> bytes | None:
        """What was put under a key, whole, or None."""
        name = stored_as(key)
        data = self._tried(lambda: self._store.read(name, MAX_ENTRY_BYTES))
        return data if data is not None and len(data) <= MAX_ENTRY_BYTES else None

    def put(self, key: str, data: bytes) -> bool:
        """Keep something; False where it could not be."""
        name = stored_as(key)
        return len(data) <= MAX_ENTRY_BYTES and self._tried(lambda: self._written(name, data)) is not None

    def sweep(self) -> int:
        """Remove what is too old or too much; returns how many entries. Safe while others do the same, or put."""
        return self._sweeper.sweep()

    def start_sweeping(self) -> None:
        """Sweep now and then, beginning now, in the background."""
        self._sweeper.start()

    def close(self) -> None:
        """Stop sweeping, and let go of the store."""
        self._sweeper.close()
        self._store.close()

    def _written(self, name: str, data: bytes) -> bytes:
        self._store.write(name, data)
        return data

    def _tried(self, call: Callable[[], bytes | None]) -> bytes | None:
        """What a call of the store gives; None where it fails, or failed lately."""
        if self._is_resting():
            return None
        try:
            data = call()
        except Exception as error:
            self._note_failure(error)
            return None
        self._note_success()
        return data

    def _is_resting(self) -> bool:
        with self._lock:
            return self._failed_at_s is not None and self._clock() < self._failed_at_s + REST_S

    def _note_failure(self, error: Exception) -> None:
        with self._lock:
            is_first, self._failed_at_s = self._failed_at_s is None, self._clock()
        if is_first:
            _log.warning("nothing is kept of long jobs while the store of WORK_DIR fails: %s", error)

    def _note_success(self) -> None:
        with self._lock:
            has_recovered, self._failed_at_s = self._failed_at_s is not None, None
        if has_recovered:
            _log.info("the store of WORK_DIR works again")


class JobWork:
    """The entries as one job uses them: an `engine.work.WorkStore` that knows what became of its own.

    Args:
        work: the entries of all jobs.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._lock = threading.Lock()  # of the two below
        self._num_kept = self._num_lost = 0

    def get(self, key: str) -> bytes | None:
        """What was put under a key, whole, or None."""
        data = self._work.get(key)
        if data is not None:
            self._count(is_kept=True)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep something."""
        self._count(is_kept=self._work.put(key, data))

    @property
    def holds_any(self) -> bool:
        """Whether anything that this job needed lies in the store: sent again, it has less to do."""
        with self._lock:
            return self._num_kept > 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the job's result has to say."""
        with self._lock:
            num_lost = self._num_lost
        if not num_lost:
            return ()
        return (f"{num_lost:,} checkpoints could not be kept in WORK_DIR: sent again, the job does their work again",)

    def _count(self, *, is_kept: bool) -> None:
        with self._lock:
            if is_kept:
                self._num_kept += 1
            else:
                self._num_lost += 1


def _below(place: str, folder: str) -> str:
    return f"{place}/{folder}" if place.endswith("://") else f"{place.rstrip('/')}/{folder}"


def stored_as(key: str) -> str:
    """The name of a key's entry: `audio/0f3a…` is `audio/7/c/0f3a…`, so that no folder fills up."""
    assert _KEY.fullmatch(key), key
    kind, _, name = key.partition("/")
    spread = hashlib.blake2b(name.encode(), digest_size=1).hexdigest()
    return f"{kind}/{spread[0]}/{spread[1]}/{name}"


def _is_ours(stored: str) -> bool:
    key = f"{stored.partition('/')[0]}/{stored.rpartition('/')[2]}"
    return _KEY.fullmatch(key) is not None and stored_as(key) == stored
