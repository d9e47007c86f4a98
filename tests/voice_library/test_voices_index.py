"""The index in memory: neither older than what this process did, nor fooled by file times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.voice_library.sounds import RATE, sound
from voice_library import LibraryError, VoiceLibrary
from voice_library.catalogue import Catalogue
from voice_library.folder_store import FolderStore
from voice_library.index import Index
from voice_library.inspection import Claim, read_claim
from voice_library.metadata import Record, record_key
from voice_library.store import Entry


class InterruptedStore(FolderStore):
    """A folder in which something happens between a listing and what follows it."""

    happening: Callable[[], object] | None = None

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = list(super().list(prefix))
        happening, self.happening = self.happening, None
        if happening is not None:
            happening()
        return iter(entries)


class FailingStore(FolderStore):
    """A folder some of whose files cannot be read."""

    failing: tuple[str, ...] = ()

    def read(self, key: str, max_bytes: int) -> bytes | None:
        if key in self.failing:
            raise LibraryError("storage_failed", f"could not read {key}")
        return super().read(key, max_bytes)


def record(folder: Path, name: str) -> Record:
    return Record.from_bytes((folder / record_key(name)).read_bytes())


def test_what_this_process_does_during_a_refresh_outlives_it(tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path, refresh_s=0.0)
    library.add("Anna", sound(1), RATE)
    store = InterruptedStore(tmp_path)
    index = Index(store)
    index.refresh()

    def add_and_delete() -> None:
        library.add("Berta", sound(2), RATE)
        index.put(record(tmp_path, "Berta"))
        library.delete(library.find("Anna").voice_id)
        index.discard(record_key("Anna"))

    store.happening = add_and_delete
    assert [each.voice.name for each in index.refresh().records] == ["Berta"]
    assert [each.voice.name for each in index.refresh().records] == ["Berta"]


def test_a_change_that_leaves_size_time_and_inode_alike_is_seen(tmp_path: Path) -> None:
    """Two writes within the coarseness of file times, the second after we have read the first."""
    library = VoiceLibrary.open(tmp_path, refresh_s=0.0)
    voice = library.add("Anna", sound(), RATE, description="aa")
    assert VoiceLibrary.list(library).voices == (voice,)
    path = tmp_path / record_key("Anna")
    before = path.stat()
    with open(path, "r+b") as file:
        content = file.read().replace(b'"aa"', b'"bb"')
        file.seek(0)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert library.get(voice.voice_id).description == "bb"


def test_one_record_that_cannot_be_read_does_not_stop_the_others_and_is_not_taken_for_missing(tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path)
    for number in range(8):
        library.add(f"voice {number}", sound(number), RATE, voice_id=f"v{number}")
    store = FailingStore(tmp_path)
    store.failing = (record_key("voice 3"),)
    other = VoiceLibrary(store, refresh_s=0.0)
    assert other.list().total == 7 and len(other.stats().problems) == 1
    for ask in (lambda: other.get("v3"), lambda: other.find("voice 3")):
        with pytest.raises(LibraryError) as raised:
            ask()
        assert raised.value.code == "storage_failed"
    store.failing = ()
    assert other.find("voice 3").voice_id == "v3" and other.stats().problems == ()


def test_many_records_that_cannot_be_read_are_the_storages_failure(tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path)
    for number in range(8):
        library.add(f"voice {number}", sound(number), RATE)
    store = FailingStore(tmp_path)
    store.failing = tuple(record_key(f"voice {number}") for number in range(8))
    with pytest.raises(LibraryError, match="could not read"):
        VoiceLibrary(store)


def test_a_refresh_that_fails_is_tried_again_by_the_next_who_needs_one(tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path)
    store = InterruptedStore(tmp_path)
    index = Index(store)

    def fail() -> None:
        raise LibraryError("storage_failed", "gone")

    store.happening = fail
    with pytest.raises(LibraryError, match="gone"):
        index.refresh()
    library.add("Anna", sound(), RATE)
    assert len(index.refresh()) == 1


def test_a_change_by_another_thread_between_refresh_and_replacement_is_kept(tmp_path: Path) -> None:
    library = VoiceLibrary(FolderStore(tmp_path), refresh_s=0.0)
    library.add("Anna", sound(), RATE, voice_id="anna")
    index = library._index
    refresh = index.refresh

    def refresh_then_change() -> Catalogue:
        catalogue = refresh()
        index.refresh = refresh  # type: ignore[method-assign]
        library.update("anna", language="de")
        refresh()
        return catalogue

    index.refresh = refresh_then_change  # type: ignore[method-assign]
    library.update("anna", gender="female")
    voice = library.get("anna")
    assert (voice.language, voice.gender) == ("de", "female")


class BusyStore(FolderStore):
    """A folder in which something happens when a prompt is written."""

    happening: Callable[[], object] | None = None

    def write(self, key: str, data: bytes) -> None:
        happening = self.happening
        if key.endswith(".flac") and happening is not None:
            self.happening = None
            happening()
        super().write(key, data)


def test_the_id_of_an_add_that_failed_is_free(tmp_path: Path) -> None:
    store = BusyStore(tmp_path)
    library = VoiceLibrary(store, refresh_s=0.0)

    def fail() -> None:
        raise LibraryError("storage_failed", "full")

    for happening, code in ((lambda: library.add("Anna", sound(), RATE), "voice_exists"), (fail, "storage_failed")):
        store.happening = happening
        with pytest.raises(LibraryError) as raised:
            library.add("Anna" if code == "voice_exists" else "Carla", sound(1), RATE, voice_id="wanted")
        assert raised.value.code == code
        library.add("Berta", sound(2), RATE, voice_id="wanted")
        library.delete("wanted")


def test_an_add_that_failed_leaves_the_claim_to_the_one_that_shared_it(tmp_path: Path) -> None:
    store = BusyStore(tmp_path)
    library = VoiceLibrary(store, refresh_s=0.0)
    store.happening = lambda: library.add("Anna", sound(), RATE, voice_id="wanted")
    with pytest.raises(LibraryError, match="name or id"):
        library.add("Anna", sound(1), RATE, voice_id="wanted")
    assert read_claim(store, "wanted") == Claim("wanted", "Anna")
    assert library.list().total == 1 and library.check() == []
