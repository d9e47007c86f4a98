"""Whether what a library holds is sound, and the removal of what interrupted work left behind.

Leftovers are no damage: a writer that died leaves files that no record names. They are removed once they
are older than any writer may take, so that nobody's work in progress is touched.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from voice_library import conditionals
from voice_library.audio import FloatArray, decode
from voice_library.catalogue import Catalogue, Problem
from voice_library.errors import LibraryError
from voice_library.index import Index
from voice_library.metadata import Record, claim_key, record_key, voice_folder
from voice_library.naming import check_id
from voice_library.store import Entry, Store

_log = logging.getLogger(__name__)

LEFTOVER_AGE_S = 600.0
"""Files that no record names are someone's work in progress until they are this old."""
COMMIT_WITHIN_S = LEFTOVER_AGE_S / 2
"""A writer that took longer gives up, so that clocks may differ by as much and no live work is swept."""
_MAX_CLAIM_BYTES = 4_096
_OURS = re.compile(r"voices/[^/]+/(claim\.json|prompt-[0-9a-f-]+\.flac|conditionals/[0-9a-f-]+\.safetensors)")
"""What the library writes into a voice's folder. Nothing else is ever removed from there."""


@dataclass(frozen=True)
class Claim:
    """The file that takes an id: for the voice of one name.

    Args:
        token: tells who made the file, as long as nobody else has written it since; "" once somebody has.
    """

    voice_id: str
    name: str
    token: str = field(default="", compare=False)

    def to_bytes(self) -> bytes:
        return json.dumps({"voice_id": self.voice_id, "name": self.name, "token": self.token}).encode()


def read_claim(store: Store, voice_id: str) -> Claim | None:
    """Who has taken an id; None if nobody has, or if it cannot be told."""
    try:
        content = json.loads(store.read(claim_key(voice_id), _MAX_CLAIM_BYTES) or b"null")
        if content is None:
            return None
        return Claim(str(content["voice_id"]), str(content["name"]), str(content.get("token", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_audio(store: Store, record: Record) -> FloatArray:
    """A voice's audio float32 (T,), read-only, verified.

    Raises:
        ValueError: when it is missing or not what was stored.
        LibraryError: storage_failed.
    """
    flac = store.read(record.prompt_key, record.prompt_bytes)
    if flac is None:
        raise ValueError("its audio file is missing")
    if len(flac) != record.prompt_bytes:
        raise ValueError(f"its audio file should have {record.prompt_bytes} bytes and has another size")
    voice = record.voice
    return decode(flac, num_samples=record.num_samples, sample_rate=voice.sample_rate, expected_hash=voice.audio_hash)


def check(store: Store, index: Index) -> tuple[list[Problem], dict[str, Problem]]:
    """Read everything there is, report what is not sound, and remove old leftovers and damaged conditionals.

    Returns:
        All problems, and of these the ones of prompt audio, by the key of its file.

    Raises:
        LibraryError: storage_failed.
    """
    files = by_voice(store.list("voices/"))
    catalogue = index.refresh()  # after the listing: what a record names by now was never a leftover
    audio = {
        record.prompt_key: problem for record in catalogue.records if (problem := _audio_problem(store, index, record))
    }
    others = [
        problem
        for record in catalogue.records
        for problem in _conditionals_problems(store, record, files.get(record.voice.voice_id, ()))
    ]
    sweep(store, catalogue, files)
    return [*catalogue.problems, *audio.values(), *others], audio


def _audio_problem(store: Store, index: Index, record: Record) -> Problem | None:
    try:
        read_audio(store, record)
    except ValueError as error:
        # Gone while we looked is not damaged.
        still = index.refresh().by_id(record.voice.voice_id)
        if still is not None and still.prompt_key == record.prompt_key:
            return Problem(record.voice.voice_id, str(error))
    return None


def _conditionals_problems(store: Store, record: Record, entries: Iterable[Entry]) -> list[Problem]:
    problems = []
    for entry in entries:
        if not entry.key.startswith(conditionals.folder(record.voice.voice_id)):
            continue
        if conditionals.read_sound(store, entry) is None and store.read(entry.key, 0) is not None:
            store.delete(entry.key)
            problems.append(Problem(record.voice.voice_id, f"removed damaged conditionals {entry.key}"))
    return problems


def by_voice(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries below voices/, grouped by the folder they lie in."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.key.split("/")[1], []).append(entry)
    return groups


def sweep(store: Store, catalogue: Catalogue, files: dict[str, list[Entry]]) -> int:
    """Remove old leftovers of interrupted work; returns how many files.

    Args:
        store: what to sweep.
        catalogue: read after `files` was listed.
        files: all entries below voices/, by voice.
    """
    limit_s = time.time() - LEFTOVER_AGE_S
    num_swept = store.sweep(LEFTOVER_AGE_S)
    for entry in list(store.list("catalogue/")):
        if not entry.num_bytes and entry.modified_s < limit_s:  # a name taken and never filled (`FolderStore.create`)
            store.delete(entry.key)
            num_swept += 1
    damaged = {problem.voice_id for problem in catalogue.problems}
    for voice_id, entries in files.items():
        if voice_id in damaged or _is_of_damaged(store, voice_id, catalogue):
            continue
        num_swept += _sweep_voice(store, catalogue.by_id(voice_id), voice_id, entries, limit_s)
    if num_swept:
        _log.info("removed %d files that interrupted work had left behind", num_swept)
    return num_swept


def _is_of_damaged(store: Store, voice_id: str, catalogue: Catalogue) -> bool:
    """Whether an unlisted voice's record may be one of those that could not be read."""
    if catalogue.by_id(voice_id) or not catalogue.problems:
        return False
    claim = _safe_claim(store, voice_id)
    return claim is not None and store.read(record_key(claim.name), 0) is not None


def _safe_claim(store: Store, voice_id: str) -> Claim | None:
    try:
        return read_claim(store, check_id(voice_id))
    except LibraryError:
        return None


def _sweep_voice(store: Store, record: Record | None, voice_id: str, entries: Sequence[Entry], limit_s: float) -> int:
    """Remove prompts that a live voice does not use, or all of a voice that has no record, if old enough."""
    if record is not None:
        prefix = f"{voice_folder(voice_id)}prompt-"
        unused = [entry for entry in entries if entry.key.startswith(prefix) and entry.key != record.prompt_key]
        removed = [entry for entry in unused if entry.modified_s < limit_s]
    else:
        # One young file means that someone is at work: their claim was renewed first.
        is_busy = any(entry.modified_s >= limit_s for entry in (*entries, *store.list(voice_folder(voice_id))))
        removed = [] if is_busy else [entry for entry in entries if _OURS.fullmatch(entry.key)]
    for entry in removed:
        store.delete(entry.key)
    return len(removed)
