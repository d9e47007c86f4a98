"""All voices at one moment: looked up, searched and listed in memory, without a store in sight.

A catalogue never changes. Whoever holds one sees a consistent library without a lock, while the index
(`voice_library.index`) puts a newer one in its place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from voice_library import naming
from voice_library.errors import LibraryError
from voice_library.metadata import Record, Voice

_MAX_SUGGESTIONS = 5
_NEAR = 0.6
"""Share of a name that has to agree for it to be suggested (difflib's own default)."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a voice.

    Args:
        voice_id: the voice's id, or the key of its record where the id cannot be told any more.
        what: is wrong, for a person.
    """

    voice_id: str
    what: str


@dataclass(frozen=True)
class VoicePage:
    """A part of a list.

    Args:
        voices: those of this page, ordered by name.
        total: how many there are on all pages.
    """

    voices: tuple[Voice, ...]
    total: int


@dataclass(frozen=True)
class Damage:
    """A record that could not be understood.

    Args:
        voice_id: as far as it can be told (see `Problem`).
        what: is wrong.
        unreadable: the storage failed; what it holds may be sound.
    """

    voice_id: str
    what: str
    unreadable: bool = False


class Catalogue:
    """The voices of a library.

    Args:
        known: what lies under each record key.
    """

    def __init__(self, known: Mapping[str, Record | Damage]) -> None:
        self._records, duplicates = _latest(each for each in known.values() if isinstance(each, Record))
        damages = [each for each in known.values() if isinstance(each, Damage)]
        self.problems = (*(Problem(each.voice_id, each.what) for each in damages), *duplicates)
        self.num_unreadable = sum(each.unreadable for each in damages)
        self._by_name = {record.voice.name: record for record in self._records.values()}
        self._folded: dict[str, list[Record]] = {}
        for record in self._records.values():
            for folded in set(record.voice.folded):
                self._folded.setdefault(folded, []).append(record)
        ordered = sorted(self._records.values(), key=lambda r: (*r.voice.folded, r.voice.voice_id))
        self.records: tuple[Record, ...] = tuple(ordered)
        """Ordered by name."""

    def __len__(self) -> int:
        return len(self.records)

    def by_id(self, voice_id: str) -> Record | None:
        return self._records.get(voice_id)

    def by_name(self, name: str) -> Record | None:
        """The voice of exactly this name (NFC)."""
        return self._by_name.get(name)

    def match(self, id_or_name: str) -> Record | None:
        """The one voice that is meant: by exact id, by exact name, else by either in any case; None if none or many."""
        exact = self.by_id(id_or_name) or self.by_name(id_or_name)
        if exact is not None:
            return exact
        alike = self._folded.get(naming.fold(id_or_name), [])
        return alike[0] if len(alike) == 1 else None

    def not_found(self, id_or_name: str, field: str) -> LibraryError:
        """The error for a voice that is not there, with those that may have been meant."""
        alike = self._folded.get(naming.fold(id_or_name), [])
        if len(alike) == 1:  # which `match` would have found: an id was wanted
            name, voice_id = alike[0].voice.name, alike[0].voice.voice_id
            message = f"no voice has the id {id_or_name!r}; did you mean {name!r}, whose id is {voice_id!r}?"
            return LibraryError("voice_not_found", message, field, [name])
        if alike:
            names = sorted(record.voice.name for record in alike)
            message = f"{id_or_name!r} may be any of several voices, which differ in case only: {_listed(names)}"
            return LibraryError("voice_not_found", message, field, names)
        if self.num_unreadable:
            message = f"{id_or_name!r} is not among the voices, but {self.num_unreadable} could not be read"
            return LibraryError("storage_failed", message, field)
        near = difflib.get_close_matches(naming.fold(id_or_name), self._folded, _MAX_SUGGESTIONS, _NEAR)
        names = list(dict.fromkeys(self._folded[folded][0].voice.name for folded in near))
        hint = f"; did you mean {_listed(names)}?" if names else ""
        return LibraryError("voice_not_found", f"no voice has the id or name {id_or_name!r}{hint}", field, names)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _latest(records: Iterable[Record]) -> tuple[dict[str, Record], list[Problem]]:
    """One record per id. A rename that was cut short leaves two, of which the newer one counts."""
    latest: dict[str, Record] = {}
    duplicates = []
    for record in sorted(records, key=lambda r: (r.revision, r.voice.created, r.key), reverse=True):
        voice_id = record.voice.voice_id
        kept = latest.setdefault(voice_id, record)
        if kept is not record and kept.revision == record.revision:
            what = f"two voices have this id: {kept.voice.name!r} is used and {record.voice.name!r} is not"
            duplicates.append(Problem(voice_id, what))
    return latest, duplicates


def select(
    voices: Iterable[Voice],
    *,
    language: str | None,
    gender: str | None,
    tag: str | None,
    text: str | None,
    offset: int,
    limit: int | None,
) -> VoicePage:
    """The voices that meet every condition that is not None, in their order.

    `language` also finds its regions (pt finds pt-BR); `text` looks in id, name, description and tags.
    Case is of no importance anywhere.

    Raises:
        LibraryError: invalid_request, for a negative offset or limit.
    """
    for name, value in (("offset", offset), ("limit", 0 if limit is None else limit)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise LibraryError("invalid_request", f"expected a whole number of at least 0, got {value!r}", name)
    wanted = {key: naming.fold(str(value)) for key, value in _conditions(language, gender, tag, text).items()}
    found = [voice for voice in voices if _meets(voice, wanted)]
    return VoicePage(tuple(found[offset : None if limit is None else offset + limit]), len(found))


def _conditions(language: str | None, gender: str | None, tag: str | None, text: str | None) -> dict[str, str]:
    given = {"language": language, "gender": gender, "tag": tag, "text": text}
    return {name: value for name, value in given.items() if value is not None}


def _meets(voice: Voice, wanted: Mapping[str, str]) -> bool:
    return all(_TESTS[name](voice, value) for name, value in wanted.items())


def _has_language(voice: Voice, folded: str) -> bool:
    own = naming.fold(voice.language or "")
    return own == folded or own.startswith(f"{folded}-")


def _has_text(voice: Voice, folded: str) -> bool:
    words = (*voice.folded, *map(naming.fold, (voice.description, *voice.tags)))
    return any(folded in word for word in words)


_TESTS = {
    "language": _has_language,
    "gender": lambda voice, folded: naming.fold(voice.gender or "") == folded,
    "tag": lambda voice, folded: any(naming.fold(tag) == folded for tag in voice.tags),
    "text": _has_text,
}
