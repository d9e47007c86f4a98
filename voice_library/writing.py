"""How voices come, change and go, so that a crash or another worker at any moment does no harm.

The catalogue record is the voice: it lies under the hash of the name, is created exclusively and last, and
is removed first. Whoever creates it has the name; before that, and after, other files are leftovers that
nobody sees. An id is taken by a claim file, which names the voice it is for: two adds of one voice share
it, so that one that died does not stop the next.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from typing import Any

from voice_library import conditionals
from voice_library.audio import Prompt
from voice_library.catalogue import Catalogue
from voice_library.errors import LibraryError
from voice_library.index import Index
from voice_library.inspection import COMMIT_WITHIN_S, LEFTOVER_AGE_S, Claim, read_claim
from voice_library.metadata import MAX_RECORD_BYTES, Record, Voice, claim_key, record_key
from voice_library.naming import make_id
from voice_library.store import Entry, Store

_log = logging.getLogger(__name__)

_ATTEMPTS = 10


class Writer:
    """Changes to a library.

    Args:
        store: where it lies.
        index: its catalogue, told of every change made here.
        max_voices: at which adding is refused; None for no limit. Workers that add at the same moment may
            go beyond it by one each.
    """

    def __init__(self, store: Store, index: Index, max_voices: int | None) -> None:
        self._store = store
        self._index = index
        self._max_voices = max_voices

    def check_room(self, name: str, voice_id: str | None) -> None:
        """Refuse early what `add` could not do.

        Raises:
            LibraryError: voice_exists, voice_library_full, storage_failed.
        """
        catalogue = self._index.refresh()
        _check_free(catalogue, name, voice_id)
        if self._max_voices is not None and len(catalogue) >= self._max_voices:
            message = f"the library holds {len(catalogue)} voices, of at most {self._max_voices}; delete some first"
            raise LibraryError("voice_library_full", message)

    def add(self, voice: Voice, prompt: Prompt) -> Record:
        """Write a voice: claim its id, write its audio, then create its record.

        Args:
            voice: with an empty id for one to be made.

        Raises:
            LibraryError: voice_exists, storage_failed. A storage that failed at the record itself may have
                written it; then the voice is there, and whole.
        """
        started_s = time.monotonic()
        token = secrets.token_hex(8)
        voice = self._with_id(voice, token)
        # Random, so that no late removal of an earlier voice's files can hit this one's.
        file = f"prompt-{prompt.audio_hash}-{secrets.token_hex(4)}.flac"
        record = Record(voice, prompt_file=file, prompt_bytes=len(prompt.flac), num_samples=prompt.num_samples)
        is_undone = True
        try:
            self._store.write(record.prompt_key, prompt.flac)
            if time.monotonic() - started_s > COMMIT_WITHIN_S:
                where = self._store.describe()
                raise LibraryError("storage_failed", f"writing to {where} took too long; nothing was added")
            is_undone = False
            self._create(record)
        except LibraryError as error:
            if is_undone or error.code == "voice_exists":
                self._remove_quietly(record.prompt_key)
                self._unclaim(voice.voice_id, token)
            raise
        self._index.put(record)
        return record

    def update(self, voice_id: str, changes: dict[str, Any]) -> Record:
        """Change what is said of a voice; another worker's change of it in between is kept too.

        Raises:
            LibraryError: voice_not_found, voice_exists, storage_failed.
        """
        for _ in range(_ATTEMPTS):
            catalogue = self._index.refresh()
            old, version = self._index.current(voice_id)
            if old is None:
                raise catalogue.not_found(voice_id, "voice_id")
            new = _changed(old, changes)
            if new.key != old.key:
                _check_free(catalogue, new.voice.name, None, except_id=voice_id)
                return self._rename(old, new, changes)
            if self._store.replace(new.key, new.to_bytes(), version):
                self._index.put(new)
                return new
        raise _contended(voice_id)

    def delete(self, voice_id: str) -> None:
        """Remove a voice, damaged or not: its records first, after which nobody sees it, then its files.

        Raises:
            LibraryError: voice_not_found, storage_failed.
        """
        keys = self._records_of(voice_id)
        if not keys:
            raise self._index.catalogue.not_found(voice_id, "voice_id")
        prompts: set[str] = set()
        for _ in range(_ATTEMPTS):
            for key in keys:
                prompts.update(self._prompts_of(key))
                if self._store.remove(key, self._index.version_of(key)):
                    self._index.discard(key)
            keys = self._records_of(voice_id)  # some are left if another worker was changing or renaming the voice
            if not keys:
                break
        else:
            raise _contended(voice_id)
        for prompt in prompts:
            self._remove_quietly(prompt)
        self._remove_quietly(conditionals.folder(voice_id), is_prefix=True)
        self._remove_quietly(claim_key(voice_id))

    def put_conditionals(self, record: Record, key: str, data: bytes) -> None:
        """Store what was computed of a voice, and remove it again if the voice is gone: its deletion may have
        looked for files before this one was there.

        Raises:
            LibraryError: invalid_request, voice_not_found, storage_failed.
        """
        voice_id = record.voice.voice_id
        written = conditionals.put(self._store, voice_id, key, data, older_than_s=LEFTOVER_AGE_S)
        if self._store.read(record.key, 0) is not None:
            return
        catalogue = self._index.refresh()  # renamed by another worker, or deleted
        if catalogue.by_id(voice_id) is None:
            self._remove_quietly(written)
            raise catalogue.not_found(voice_id, "voice_id")

    def _with_id(self, voice: Voice, token: str) -> Voice:
        """The voice with its id claimed: its own, or the first made one that is not another voice's."""
        if voice.voice_id:
            self._claim(voice, token)
            return voice
        for attempt in range(_ATTEMPTS):
            named = dataclasses.replace(voice, voice_id=make_id(voice.name, voice.audio_hash, attempt))
            try:
                _check_free(self._index.catalogue, voice.name, named.voice_id)
                self._claim(named, token)
            except LibraryError as error:
                if (error.code, error.field) != ("voice_exists", "voice_id") or attempt == _ATTEMPTS - 1:
                    raise
            else:
                return named
        raise AssertionError(voice)

    def _claim(self, voice: Voice, token: str) -> None:
        """Take the id for this voice, sharing it with whoever adds the same voice."""
        claim, key = Claim(voice.voice_id, voice.name), claim_key(voice.voice_id)
        if self._store.create(key, dataclasses.replace(claim, token=token).to_bytes()):
            return
        other = read_claim(self._store, voice.voice_id)
        if other != claim and not self._is_dead(key, other):
            message = f"the id {voice.voice_id!r} is taken, or being taken, by another voice"
            raise LibraryError("voice_exists", message, "voice_id")
        # Renewed, since sweeping goes by its age; without a token, so that whoever made it leaves it to us.
        self._store.write(key, claim.to_bytes())

    def _unclaim(self, voice_id: str, token: str) -> None:
        """Free an id that was claimed for nothing, unless another add has come to share the claim."""
        key = claim_key(voice_id)
        try:
            entry, claim = self._entry(key), read_claim(self._store, voice_id)
            if entry is not None and claim is not None and claim.token == token:
                self._store.remove(key, entry.version)
        except LibraryError as error:
            _log.warning("left behind, to be swept later: %s (%s)", key, error.message)

    def _is_dead(self, key: str, claim: Claim | None) -> bool:
        """Whether the claim of another voice is that of an interrupted add. (Called when no record has the id.)"""
        if claim is not None and self._store.read(record_key(claim.name), 0) is not None:
            return self._index.refresh().by_id(claim.voice_id) is None and _is_older(self._entry(key), LEFTOVER_AGE_S)
        return _is_older(self._entry(key), LEFTOVER_AGE_S)

    def _create(self, record: Record) -> None:
        """Create a record, or take the place of one that is dead."""
        data = record.to_bytes()
        for _ in range(_ATTEMPTS):
            if self._store.create(record.key, data):
                return
            entry = self._entry(record.key)
            if entry is None:
                continue
            if not self._is_stale(entry, record.voice.name):
                raise _name_taken(record.voice.name)
            if self._store.replace(record.key, data, entry.version):
                return
        raise _name_taken(record.voice.name)

    def _is_stale(self, entry: Entry, name: str) -> bool:
        """Whether what lies under a name is no voice: a name taken and never filled, or the old record of a
        rename that died before removing it."""
        if not entry.num_bytes:
            return _is_older(entry, LEFTOVER_AGE_S)
        catalogue = self._index.refresh()
        if catalogue.by_name(name) is not None:
            return False
        try:
            old = Record.from_bytes(self._store.read(entry.key, MAX_RECORD_BYTES) or b"")
        except ValueError:
            return False
        current = catalogue.by_id(old.voice.voice_id)
        return current is not None and current.revision > old.revision

    def _rename(self, old: Record, new: Record, changes: dict[str, Any]) -> Record:
        """Create the record of the new name, which counts from then on, then remove the old one."""
        self._create(new)
        self._index.put(new)
        for _ in range(_ATTEMPTS):
            entry = self._entry(old.key)
            found = self._store.read(old.key, MAX_RECORD_BYTES)
            if entry is None or found is None:
                # Deleted in between: then the new record is the only trace of a voice that should be gone.
                self._store.delete(new.key)
                self._index.discard(new.key)
                raise self._index.catalogue.not_found(new.voice.voice_id, "voice_id")
            if found != old.to_bytes():
                try:
                    old = Record.from_bytes(found)
                except ValueError:
                    break
                if old.voice.voice_id != new.voice.voice_id:
                    break  # the old name was free from our record on, and has been taken
                new = _changed(old, changes)  # another worker changed the voice: that is to be kept
                self._store.write(new.key, new.to_bytes())
                self._index.put(new)
            if self._store.remove(old.key, entry.version):
                self._index.discard(old.key)
                break
        self._store.write(claim_key(new.voice.voice_id), Claim(new.voice.voice_id, new.voice.name).to_bytes())
        return new

    def _records_of(self, voice_id: str) -> list[str]:
        """Keys of all records of a voice; of one whose record no longer tells its id, by its claim."""
        catalogue = self._index.refresh()
        keys = self._index.records_of(voice_id)
        claim = None if keys or not catalogue.problems else read_claim(self._store, voice_id)
        if claim is None or catalogue.by_name(claim.name) is not None:
            return keys
        key = record_key(claim.name)
        return [key] if self._store.read(key, 0) is not None else []

    def _prompts_of(self, key: str) -> list[str]:
        try:
            return [Record.from_bytes(self._store.read(key, MAX_RECORD_BYTES) or b"").prompt_key]
        except ValueError:
            return []

    def _entry(self, key: str) -> Entry | None:
        return next((entry for entry in self._store.list(key) if entry.key == key), None)

    def _remove_quietly(self, key: str, is_prefix: bool = False) -> None:
        """Remove what no record names any more. If that fails it is a leftover, and swept later."""
        try:
            for name in [entry.key for entry in self._store.list(key)] if is_prefix else [key]:
                self._store.delete(name)
        except LibraryError as error:
            _log.warning("left behind, to be swept later: %s (%s)", key, error.message)


def _changed(old: Record, changes: dict[str, Any]) -> Record:
    """A record with changes. A rename counts for two, to be ahead of another change made at the same time."""
    voice = dataclasses.replace(old.voice, **changes)
    return dataclasses.replace(old, voice=voice, revision=old.revision + 1 + (voice.name != old.voice.name))


def _contended(voice_id: str) -> LibraryError:
    return LibraryError("storage_failed", f"voice {voice_id!r} is being changed by others; try again")


def _check_free(catalogue: Catalogue, name: str, voice_id: str | None, *, except_id: str | None = None) -> None:
    """Refuse a name or an id that a voice has; a name that is another's id too, since it could never be found."""
    taken = catalogue.by_name(name) or catalogue.by_id(name)
    if taken is not None and taken.voice.voice_id != except_id:
        raise _name_taken(name)
    if voice_id is not None and (catalogue.by_id(voice_id) or catalogue.by_name(voice_id) not in (None, taken)):
        raise LibraryError("voice_exists", f"a voice has the id or name {voice_id!r} already", "voice_id")


def _name_taken(name: str) -> LibraryError:
    message = f"a voice has the name or id {name!r} already (a damaged one too, until it is deleted)"
    return LibraryError("voice_exists", message, "name", (name,))


def _is_older(entry: Entry | None, age_s: float) -> bool:
    return entry is not None and time.time() - entry.modified_s > age_s
