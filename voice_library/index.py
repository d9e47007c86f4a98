"""The catalogue of a store, kept in memory and kept up to date with what other workers do.

A refresh lists the records (names, sizes, versions; one folder or one page of a bucket per thousand) and
reads only those whose version is new. A snapshot of all records, itself a blob, spares a starting worker
to read them one by one; it is a cache, believed only where versions agree.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from voice_library import metadata
from voice_library.catalogue import Catalogue, Damage
from voice_library.errors import LibraryError
from voice_library.metadata import Record
from voice_library.store import Entry, Store

_log = logging.getLogger(__name__)

_RECORDS = "catalogue/"
_SNAPSHOT = "snapshot.json"
_SNAPSHOT_FORMAT = "snapshot/1"
_SNAPSHOT_AFTER = 64
"""Records read one by one until a new snapshot is worth its while."""
_MAX_SNAPSHOT_BYTES = 256 << 20
_READERS = 16
"""A network volume or bucket answers many reads at once as fast as one."""
_MAX_FAILURES = 4
"""So many records may fail to be read before the store itself is at fault."""


@dataclass(frozen=True)
class _Known:
    """What lay under a key when it was last read."""

    content: Record | Damage
    version: str
    settled: bool


class Index:
    """The records of a store.

    Args:
        store: where they lie.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refreshing = threading.Lock()
        self._lock = threading.Lock()
        self._known: Mapping[str, _Known] = {}
        self._own: dict[str, tuple[float, _Known | None]] = {}
        self._tried_s = self._as_of_s = float("-inf")
        self._num_unsaved = 0
        self._is_first = True
        self.catalogue = Catalogue({})
        """As of the last refresh and this process's own changes since."""

    def refresh(self) -> Catalogue:
        """The catalogue with everything that was committed before this call.

        Raises:
            LibraryError: storage_failed.
        """
        asked_s = time.monotonic()
        with self._refreshing:
            if self._as_of_s <= asked_s:
                self._refresh()
        return self.catalogue

    def recent(self, max_age_s: float) -> Catalogue:
        """The catalogue of at most this age, unless another thread is refreshing it right now, or the store
        fails, which is logged: what is in memory serves on."""
        if time.monotonic() - self._tried_s <= max_age_s or not self._refreshing.acquire(blocking=False):
            return self.catalogue
        try:
            self._refresh()
        except LibraryError as error:
            _log.warning("the catalogue of voices is not up to date: %s", error.message)
        finally:
            self._refreshing.release()
        return self.catalogue

    def put(self, record: Record) -> None:
        """Note a record that this process has just written."""
        self._note(record.key, _Known(record, version="", settled=False))

    def discard(self, key: str) -> None:
        """Note that this process has just deleted what lay under a key."""
        self._note(key, None)

    def records_of(self, voice_id: str) -> list[str]:
        """Keys of all records of a voice: superseded and damaged ones, then the one that counts."""
        with self._lock:
            known = dict(self._known)
        keys = [key for key, each in known.items() if _id_of(each.content) == voice_id]
        current = self.catalogue.by_id(voice_id)
        return sorted(keys, key=lambda key: current is not None and key == current.key)

    def current(self, voice_id: str) -> tuple[Record | None, str]:
        """The record of a voice and the version it was read under, which belong together whatever other threads
        do; see `version_of`."""
        with self._lock:
            record = self.catalogue.by_id(voice_id)
            return record, "" if record is None else self.version_of(record.key)

    def version_of(self, key: str) -> str:
        """The version under which a key's content was read; empty when this process has just written it."""
        known = self._known.get(key)
        return known.version if known else ""

    def _note(self, key: str, known: _Known | None) -> None:
        with self._lock:
            self._own[key] = (time.monotonic(), known)
            self._known = _with_own(self._known, {key: known})
            self.catalogue = _catalogue(self._known)

    def _refresh(self) -> None:
        """List, read what is new, and put the result in place, less what this process changed meanwhile."""
        self._tried_s = started_s = time.monotonic()
        entries = [entry for entry in self._store.list(_RECORDS) if entry.key.endswith(".json") and entry.num_bytes]
        before = self._before()
        kept = {entry.key: known for entry in entries if (known := _unchanged(before.get(entry.key), entry))}
        read = self._read_all([entry for entry in entries if entry.key not in kept], before)
        with self._lock:
            own = {key: noted for key, (at_s, noted) in self._own.items() if at_s >= started_s}
            self._own = {key: noted for key, noted in self._own.items() if noted[0] >= started_s}
            merged = _with_own({**kept, **read}, own)
            if read or merged.keys() != self._known.keys():
                self._known, self.catalogue = merged, _catalogue(merged)
        self._as_of_s, self._is_first = started_s, False
        self._num_unsaved += sum(each.settled for each in read.values())
        if self._num_unsaved >= _SNAPSHOT_AFTER:
            self._save_snapshot(kept | read)

    def _before(self) -> Mapping[str, _Known]:
        """What is known already: the last refresh, or at first the snapshot."""
        if not self._is_first:
            return self._known
        return _parse_snapshot(self._store.read(_SNAPSHOT, _MAX_SNAPSHOT_BYTES) or b"")

    def _read_all(self, entries: list[Entry], before: Mapping[str, _Known]) -> dict[str, _Known]:
        """Read records; a few that fail are noted as damage, more are the store's own failure."""
        failures: list[LibraryError] = []

        def read(entry: Entry) -> _Known | None:
            if len(failures) > _MAX_FAILURES:
                return None
            try:
                return self._read(entry)
            except LibraryError as error:
                failures.append(error)
                return _Known(Damage(entry.key, error.message, unreadable=True), entry.version, settled=False)

        if len(entries) <= self._store.num_serial_reads:
            found = [read(entry) for entry in entries]
        else:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="voice-records") as readers:
                found = list(readers.map(read, entries))
        if len(failures) > _MAX_FAILURES:
            raise failures[0]
        known = {entry.key: each for entry, each in zip(entries, found, strict=True) if each is not None}
        _report(known, before)
        return known

    def _read(self, entry: Entry) -> _Known | None:
        data = self._store.read(entry.key, metadata.MAX_RECORD_BYTES)
        return None if not data else _Known(_understood(entry.key, data), entry.version, entry.settled)

    def _save_snapshot(self, known: Mapping[str, _Known]) -> None:
        """Write all settled records; a store that refuses costs the next worker a slower start, no more."""
        records = {
            key: [each.version, each.content.to_bytes().decode()]
            for key, each in known.items()
            if each.settled and isinstance(each.content, Record)
        }
        self._num_unsaved = 0
        try:
            self._store.write(_SNAPSHOT, json.dumps({"format": _SNAPSHOT_FORMAT, "records": records}).encode())
        except LibraryError as error:
            _log.info("the catalogue's snapshot was not written: %s", error.message)


def _report(known: Mapping[str, _Known], before: Mapping[str, _Known]) -> None:
    for key, each in known.items():
        if isinstance(each.content, Damage) and before.get(key) != each:
            _log.warning("voice %s is skipped: %s", each.content.voice_id, each.content.what)


def _unchanged(known: _Known | None, entry: Entry) -> _Known | None:
    return known if known and known.settled and known.version == entry.version else None


def _with_own(known: Mapping[str, _Known], own: Mapping[str, _Known | None]) -> dict[str, _Known]:
    merged: dict[str, _Known | None] = {**known, **own}
    return {key: each for key, each in merged.items() if each is not None}


def _catalogue(known: Mapping[str, _Known]) -> Catalogue:
    return Catalogue({key: each.content for key, each in known.items()})


def _id_of(content: Record | Damage) -> str:
    return content.voice.voice_id if isinstance(content, Record) else content.voice_id


def _understood(key: str, data: bytes) -> Record | Damage:
    try:
        record = Record.from_bytes(data)
    except ValueError as error:
        return Damage(_told_id(data) or key, f"the record {key} is damaged: {error}")
    if record.key != key:
        return Damage(record.voice.voice_id, f"the record {key} is that of another name, {record.voice.name!r}")
    return record


def _told_id(data: bytes) -> str | None:
    """The id in what is left of a record."""
    found = re.search(rb'"voice_id": ?"([A-Za-z0-9][A-Za-z0-9_-]{0,63})"', data)
    return found.group(1).decode() if found else None


def _parse_snapshot(data: bytes) -> dict[str, _Known]:
    """What a snapshot holds; nothing, if it is missing or damaged."""
    try:
        content = json.loads(data)
        if content["format"] != _SNAPSHOT_FORMAT:
            return {}
        records = content["records"].items()
        items = [(key, str(version), _understood(key, text.encode())) for key, (version, text) in records]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {key: _Known(found, version, True) for key, version, found in items if isinstance(found, Record)}
