"""One damaged voice: it is reported and skipped, can be deleted, and the others do not notice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.voice_library.conftest import OpenLibrary
from tests.voice_library.sounds import RATE, sound
from voice_library import LibraryError, Voice, VoiceLibrary
from voice_library.folder_store import FolderStore
from voice_library.metadata import Record, record_key
from voice_library.store import Store


def prompt_key(store: Store, voice: Voice) -> str:
    (entry,) = store.list(f"voices/{voice.voice_id}/prompt-")
    return entry.key


def flac(samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype=subtype)
    return file.getvalue()


def bomb(data: bytes) -> bytes:
    """An hour of silence in a file of the same size as the voice's."""
    hour = flac(np.zeros(3_600 * 8_000, np.float32), 8_000)
    return (hour + bytes(len(data)))[: max(len(data), 1)]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "a flipped bit": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "sound audio of another": lambda data: flac(sound(9) / 4, subtype="PCM_24").ljust(len(data), b"\0"),
    "no audio": lambda data: b"x" * len(data),
    "hours in a small file": bomb,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_voice_with_damaged_audio_is_reported_and_skipped(
    library: VoiceLibrary, open_library: OpenLibrary, store: Store, damage: Callable[[bytes], bytes | None]
) -> None:
    good, bad = library.add("good", sound(1), RATE), library.add("bad", sound(2), RATE)
    key = prompt_key(store, bad)
    original = store.read(key, 1 << 20) or b""
    damaged = damage(original)
    store.delete(key) if damaged is None else store.write(key, damaged)
    other = open_library()
    for _ in range(2):
        with pytest.raises(LibraryError, match="damaged") as raised:
            other.get_audio(bad.voice_id)
        assert raised.value.code == "reference_unreadable"
    assert [voice.name for voice in other.list().voices] == ["good"]
    assert [problem.voice_id for problem in other.stats().problems] == [bad.voice_id]
    assert [problem.voice_id for problem in library.check()] == [bad.voice_id]
    assert library.stats().num_voices == other.stats().num_voices == 1
    assert other.get_audio(good.voice_id)[0].size == 2_400
    store.write(key, original)
    assert other.get_audio(bad.voice_id)[0].size == 2_400 and other.stats().problems == ()
    other.delete(bad.voice_id)
    assert library.check() == [] and [voice.name for voice in library.list().voices] == ["good"]


def test_a_file_that_claims_to_hold_hours_is_not_decoded(
    library: VoiceLibrary, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one of the right size: the number of samples is compared before any is decoded."""
    voice = library.add("Anna", sound(num_samples=200_000), RATE)
    key = prompt_key(store, voice)
    size = len(store.read(key, 1 << 24) or b"")
    hours = flac(np.zeros(3_600 * RATE, np.float32)).ljust(size, b"\0")
    assert len(hours) == size
    store.write(key, hours)
    read: list[object] = []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *arguments, **_: read.append(arguments))
    with pytest.raises(LibraryError, match="damaged"):
        library.get_audio(voice.voice_id)
    assert read == []


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"null",
        b"[1]",
        b'{"format": "voice/2"}',
        b'{"format": "voice/1", "voice": {"voice_id": "bad-id"}}',
        b"[" * 200_000,
    ],
)
def test_a_damaged_record_is_reported_and_the_rest_works(
    library: VoiceLibrary, open_library: OpenLibrary, store: Store, content: bytes
) -> None:
    library.add("good", sound(1), RATE)
    bad = library.add("bad", sound(2), RATE, voice_id="bad-id")
    store.write(record_key("bad"), content)
    other = open_library()
    assert [voice.name for voice in other.list().voices] == ["good"]
    assert len(other.stats().problems) == len(other.check()) == 1
    with pytest.raises(LibraryError) as taken:
        other.add("bad", sound(3), RATE)
    assert taken.value.code == "voice_exists" and "damaged" in taken.value.message
    assert store.read(prompt_key(store, bad), 0) is not None
    other.delete("bad-id")
    assert other.check() == []
    other.add("bad", sound(3), RATE)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_byte_of_a_record_can_be_changed_into_something_unforeseen(data: st.DataObject, tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path / "voices")
    if not library.list().total:
        library.add("Anna", sound(), RATE, voice_id="anna", tags=["a"], quality={"x": [1]})
    content = (tmp_path / "voices" / record_key("Anna")).read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    changed = content[:start] + data.draw(st.binary(max_size=4)) + content[end:]
    try:
        record = Record.from_bytes(changed)
    except ValueError:
        return
    assert Record.from_bytes(record.to_bytes()) == record


def test_a_record_of_more_audio_than_is_ever_kept_is_damage(library: VoiceLibrary, store: Store) -> None:
    """Even one whose duration agrees: room is made for the samples it tells of."""
    library.add("Anna", sound(), RATE)
    content = json.loads(store.read(record_key("Anna"), 1 << 20) or b"")
    for seconds, is_sound in ((600, True), (601, False), (10**9, False)):
        content["voice"]["duration_s"], content["prompt"]["num_samples"] = float(seconds), seconds * RATE
        with contextlib.nullcontext() if is_sound else pytest.raises(ValueError, match="more than 600 s"):
            Record.from_bytes(json.dumps(content).encode())


def test_a_record_under_another_name_is_damage(library: VoiceLibrary, store: Store) -> None:
    library.add("Anna", sound(), RATE)
    store.write(record_key("Berta"), store.read(record_key("Anna"), 1 << 20) or b"")
    assert len(library.check()) == 1
    assert [voice.name for voice in library.list().voices] == ["Anna"]


def test_of_two_records_of_one_voice_the_later_counts(
    library: VoiceLibrary, open_library: OpenLibrary, store: Store
) -> None:
    """What a rename leaves that was cut short: the old name is free again after a while."""
    voice = library.add("old", sound(), RATE)
    old = store.read(record_key("old"), 1 << 20) or b""
    library.update(voice.voice_id, name="new")
    store.write(record_key("old"), old)
    other = open_library()
    assert [found.name for found in other.list().voices] == ["new"] and other.check() == []
    with pytest.raises(LibraryError) as raised:
        other.find("old")
    assert raised.value.code == "voice_not_found"
    other.delete(voice.voice_id)
    assert library.list().total == 0


def age(root: Path, seconds: float = 3_600.0) -> None:
    """Make everything in a library look that old."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_the_old_name_of_a_rename_that_died_is_free(tmp_path: Path) -> None:
    store, library = FolderStore(tmp_path), VoiceLibrary.open(tmp_path, refresh_s=0.0)
    voice = library.add("old", sound(), RATE)
    old = store.read(record_key("old"), 1 << 20) or b""
    library.update(voice.voice_id, name="new")
    store.write(record_key("old"), old)
    library.add("old", sound(), RATE)
    assert [found.name for found in library.list().voices] == ["new", "old"] and library.check() == []


def test_old_leftovers_are_swept_and_young_ones_are_left_alone(tmp_path: Path) -> None:
    store, library = FolderStore(tmp_path), VoiceLibrary.open(tmp_path, refresh_s=0.0)
    voice = library.add("Anna", sound(), RATE)
    library.put_conditionals(voice.voice_id, "key", b"data")
    kept = {entry.key for entry in store.list("")}
    leftovers = [
        "tmp/123-abc",
        "voices/orphan/claim.json",
        "voices/orphan/prompt-00.flac",
        f"voices/{voice.voice_id}/prompt-11.flac",
        "catalogue/00.json",
    ]
    for key in leftovers:
        store.write(key, b"" if key.startswith("catalogue") else b"x")
    assert library.check() == []
    assert {entry.key for entry in store.list("")} == {*kept, *leftovers}
    age(tmp_path)
    store.write("voices/orphan/claim.json", b"x")  # someone begins to use the orphan's id again
    assert library.check() == []
    assert {entry.key for entry in store.list("")} == {
        *kept,
        "voices/orphan/claim.json",
        "voices/orphan/prompt-00.flac",
    }
    age(tmp_path)
    assert library.check() == []
    assert {entry.key for entry in store.list("")} == kept
    assert not (tmp_path / "voices" / "orphan").exists()


def test_opening_sweeps_old_temporary_files(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("tmp/123-abc", b"x")
    age(tmp_path)
    store.write("tmp/124-abc", b"x")
    VoiceLibrary.open(tmp_path)
    assert [entry.key for entry in store.list("tmp/")] == ["tmp/124-abc"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": "snapshot/1", "records": {"x": 1}}', b"[" * 200_000])
def test_a_damaged_snapshot_is_no_snapshot(tmp_path: Path, content: bytes) -> None:
    VoiceLibrary.open(tmp_path).add("Anna", sound(), RATE)
    (tmp_path / "snapshot.json").write_bytes(content)
    assert VoiceLibrary.open(tmp_path).list().total == 1


def keys_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read from folders from now on."""
    read: list[str] = []
    original = FolderStore.read

    def noting(self: FolderStore, key: str, max_bytes: int) -> bytes | None:
        read.append(key)
        return original(self, key, max_bytes)

    monkeypatch.setattr(FolderStore, "read", noting)
    return read


def test_a_snapshot_spares_reading_and_never_hides_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = VoiceLibrary.open(tmp_path)
    for number in range(70):
        library.add(f"voice {number}", sound(number, 100), RATE)
    age(tmp_path, 60.0)
    VoiceLibrary.open(tmp_path)
    assert len(json.loads((tmp_path / "snapshot.json").read_bytes())["records"]) == 70
    library = VoiceLibrary.open(tmp_path)
    library.update(library.find("voice 1").voice_id, description="changed")
    library.delete(library.find("voice 2").voice_id)
    read = keys_read(monkeypatch)
    opened = VoiceLibrary.open(tmp_path)
    assert (opened.list().total, opened.find("voice 1").description) == (69, "changed")
    assert sorted(read) == [record_key("voice 1"), "snapshot.json"]


def test_opening_and_listing_read_no_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VoiceLibrary.open(tmp_path).add("Anna", sound(), RATE)
    read = keys_read(monkeypatch)
    library = VoiceLibrary.open(tmp_path)
    assert library.find("anna").voice_id == library.list(text="ann").voices[0].voice_id
    assert not [key for key in read if key.startswith("voices/")]
