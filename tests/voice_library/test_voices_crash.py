"""A writer may die at any moment: what is listed is whole, and nothing it left stands in anyone's way.

Once by brute force, with processes that are killed, and once step by step, with a store that stops after
every single one of its calls.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.voice_library import workers
from tests.voice_library.conftest import OpenLibrary
from tests.voice_library.sounds import RATE, sound
from tests.voice_library.workers import Work, add, add_with_id, delete, put, rename, update
from voice_library import LibraryError, Voice, VoiceLibrary
from voice_library.folder_store import FolderStore
from voice_library.store import Entry, Store

NUM_KILLS = 300


class Dead(BaseException):
    """The process is gone; nothing catches this."""


class DyingStore:
    """A store whose process dies before its n-th call."""

    num_serial_reads = 64

    def __init__(self, store: Store, num_calls: int) -> None:
        self._store = store
        self.num_calls_left = num_calls

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if self.num_calls_left <= 0:
                raise Dead
            self.num_calls_left -= 1
            return getattr(self._store, name)(*arguments)

        return call


def assert_sound(library: VoiceLibrary) -> list[Voice]:
    """Every voice that is listed is whole."""
    assert library.check() == []
    voices = library.list().voices
    for voice in voices:
        audio, rate = library.get_audio(voice.voice_id)
        assert (audio.size / rate, library.find(voice.name)) == (voice.duration_s, voice)
        assert library.get_conditionals(voice.voice_id, "key") in (None, b"conditionals")
    return list(voices)


OUTCOMES: dict[Work, list[list[str]]] = {
    add: [["new", "old"], ["old"]],
    add_with_id: [["new", "old"], ["old"]],
    update: [["old"]],
    rename: [["new"], ["old"]],
    delete: [[], ["old"]],
    put: [["old"]],
}
"""Names that may be there after the work was cut short."""


def deaths(open_library: OpenLibrary, store: Store, work: Work) -> Iterator[bool]:
    """Does the work on a library whose process dies ever later; yields whether it came to its end."""
    for num_calls in range(1, 200):
        for voice in open_library().list().voices:
            open_library().delete(voice.voice_id)
        open_library().add("old", sound(0), RATE, voice_id="old-id")
        dying = DyingStore(store, 10_000)
        library = VoiceLibrary(dying, refresh_s=0.0)  # type: ignore[arg-type]
        dying.num_calls_left = num_calls
        try:
            work(library)
        except Dead:
            yield False
        else:
            yield True
            return
    raise AssertionError("never came to its end")


@pytest.mark.parametrize("work", [add, add_with_id, update, rename, delete, put])
def test_dying_at_any_step_leaves_a_sound_library_in_which_the_work_can_be_done(
    open_library: OpenLibrary, store: Store, work: Work
) -> None:
    num_deaths = 0
    for _ in deaths(open_library, store, work):
        num_deaths += 1
        library = open_library()
        names = sorted(voice.name for voice in assert_sound(library))
        assert names in OUTCOMES[work]
        try:
            work(library)
        except LibraryError as error:  # it had been done already
            assert error.code == ("voice_not_found" if work is delete else "voice_exists")  # noqa: PT017
        assert_sound(library)
        library.close()
    assert num_deaths >= 2


def test_a_failed_write_is_told_and_changes_nothing(tmp_path: Path) -> None:
    """A disk that fills up in the middle of any file that is written."""
    library = VoiceLibrary.open(tmp_path, refresh_s=0.0)
    library.add("old", sound(0), RATE, voice_id="old-id")
    library.put_conditionals("old-id", "key", b"conditionals")
    with workers.start("fill", str(tmp_path)) as filler:
        assert filler.stdout is not None
        for line in filler.stdout:
            work, outcome = line.split()
            assert outcome == "storage_failed", work
            assert [voice.name for voice in assert_sound(library)] == ["old"]
            assert not list((tmp_path / "tmp").iterdir())
            workers.tell(filler, "next")
    assert filler.returncode == 0
    add(library)
    assert [voice.name for voice in assert_sound(library)] == ["new", "old"]


def test_killing_writers_at_any_moment_hundreds_of_times_leaves_a_sound_library(tmp_path: Path) -> None:
    draw = random.Random(3)
    reader = VoiceLibrary.open(tmp_path, refresh_s=0.0)
    names_seen: set[str] = set()
    with workers.start("spawn", str(tmp_path)) as spawner:
        writers = [int(workers.ask(spawner, f"start {seed}")) for seed in range(2)]
        for kill in range(NUM_KILLS):
            time.sleep(draw.uniform(0.002, 0.08))
            killed = writers.pop(0)
            os.kill(killed, signal.SIGKILL)
            assert int(workers.ask(spawner, f"reap {killed}")) == -signal.SIGKILL, "it failed before it was killed"
            writers.append(int(workers.ask(spawner, f"start {kill}")))
            names_seen |= {voice.name for voice in reader.list().voices}
            if kill % 30 == 0:
                _assert_whole_or_gone(reader)
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            workers.ask(spawner, f"reap {writer}")
        workers.tell(spawner, "")
    fresh = VoiceLibrary.open(tmp_path, refresh_s=0.0)
    assert_sound(fresh)
    assert names_seen, "the writers never came to add a voice"
    _assert_every_name_can_be_used(fresh, tmp_path)


def _assert_whole_or_gone(library: VoiceLibrary) -> None:
    for voice in library.list().voices:
        try:
            library.get_audio(voice.voice_id)
        except LibraryError as error:
            assert error.code == "voice_not_found", error  # noqa: PT017


def _assert_every_name_can_be_used(library: VoiceLibrary, folder: Path) -> None:
    for voice in library.list().voices:
        library.delete(voice.voice_id)
    for number in range(workers.NUM_NAMES):
        library.add(f"voice {number}", sound(number), RATE)
        library.add(f"renamed {number}", sound(number), RATE)
    assert library.list().total == 2 * workers.NUM_NAMES
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3_600, time.time() - 3_600))
    assert library.check() == []
    used = {entry.key for entry in FolderStore(folder).list("")}
    assert len([key for key in used if key.startswith("voices/")]) == 4 * workers.NUM_NAMES
    assert not [key for key in used if key.startswith("tmp/")]


def test_a_volume_without_hard_links_keeps_every_promise_of_creating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = FolderStore(tmp_path)
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read("a/b", 10) == b"first"
    library = VoiceLibrary.open(tmp_path, refresh_s=0.0)
    add(library)
    assert [voice.name for voice in assert_sound(library)] == ["new"]


def test_a_name_taken_and_never_filled_is_free_after_a_while(tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path, refresh_s=0.0)
    voice = library.add("new", sound(1), RATE)
    (record,) = (tmp_path / "catalogue").iterdir()
    library.delete(voice.voice_id)
    record.write_bytes(b"")
    assert library.list().total == 0 and library.check() == []
    with pytest.raises(LibraryError):
        add(library)
    os.utime(record, (time.time() - 3_600,) * 2)
    add(library)
    assert [found.name for found in assert_sound(library)] == ["new"]


def test_entries_of_a_listing_know_their_age(store: Store) -> None:
    store.write("a", b"x")
    entries: list[Entry] = list(store.list("a"))
    assert abs(entries[0].modified_s - time.time()) < 60
