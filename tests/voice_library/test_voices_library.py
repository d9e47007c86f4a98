"""The library, on a folder and in a bucket alike: voices kept, found, listed, changed, removed and shared."""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.types import VoicePrompt
from tests.voice_library.conftest import OpenLibrary
from tests.voice_library.sounds import RATE, sound
from voice_library import LibraryError, Voice, VoiceLibrary
from voice_library.store import Store


def refused(code: str, field: str | None = None) -> pytest.RaisesExc[LibraryError]:
    """A context in which a LibraryError of this code (and field) is raised."""
    return pytest.RaisesExc(
        LibraryError, check=lambda error: error.code == code and (field is None or error.field == field)
    )


def names(library: VoiceLibrary, **conditions: object) -> list[str]:
    return [voice.name for voice in library.list(**conditions).voices]  # type: ignore[arg-type]


def test_a_voice_comes_back_with_all_that_was_said_of_it(library: VoiceLibrary, open_library: OpenLibrary) -> None:
    said = {
        "language": "pt-BR",
        "gender": "female",
        "description": "warm,\nclose",
        "tags": ("audiobook", "narração"),
        "consent": "signed 2024-05-01",
        "source": "studio",
        "quality": {"snr_db": 41.5, "warnings": ["short"]},
    }
    added = library.add("Zoë", sound(), RATE, created="2024-05-01T10:00:00+02:00", **said)  # type: ignore[arg-type]
    other = open_library()
    assert other.get(added.voice_id) == other.find("Zoë") == other.list().voices[0] == added
    assert {**said, "created": "2024-05-01T08:00:00Z"}.items() <= dataclasses.asdict(added).items()
    assert (added.duration_s, added.sample_rate) == (0.1, RATE)
    assert json.loads(json.dumps(added.to_dict()))["tags"] == ["audiobook", "narração"]


def test_the_hash_is_the_engines_key_of_what_reads_back(library: VoiceLibrary, open_library: OpenLibrary) -> None:
    added = library.add("Anna", sound(), RATE)
    audio, rate = open_library().get_audio(added.voice_id)
    assert VoicePrompt(audio, rate).key == added.audio_hash
    assert audio.dtype == np.float32 and not audio.flags.writeable
    assert np.abs(audio - sound()).max() <= 2.0**-24


def test_audio_that_was_read_back_is_stored_again_without_any_change(library: VoiceLibrary) -> None:
    first = library.add("Anna", sound(), RATE)
    second = library.add("Anna's copy", *library.get_audio(first.voice_id))
    assert second.audio_hash == first.audio_hash and second.voice_id != first.voice_id


@pytest.mark.parametrize("rate", [4_000, 11_025, 48_000, 384_000])
def test_every_rate_and_length_is_kept_to_the_sample(library: VoiceLibrary, rate: int) -> None:
    for num_samples in (1, 17, 5_000):
        voice = library.add(f"{rate} {num_samples}", sound(num_samples=num_samples), rate)
        audio, found = library.get_audio(voice.voice_id)
        assert (audio.size, found) == (num_samples, rate)


def test_a_name_is_taken_once_until_it_is_free_again(library: VoiceLibrary, open_library: OpenLibrary) -> None:
    voice = library.add("Anna", sound(1), RATE)
    with refused("voice_exists", "name"):
        open_library().add("A\u006ena ", sound(2), RATE)
    library.delete(voice.voice_id)
    again = open_library().add("Anna", sound(2), RATE)
    assert library.find("Anna") == again


def test_an_id_is_taken_once(library: VoiceLibrary) -> None:
    library.add("Anna", sound(1), RATE, voice_id="v1")
    with refused("voice_exists", "voice_id"):
        library.add("Berta", sound(2), RATE, voice_id="v1")
    with refused("voice_exists", "name"):
        library.add("v1", sound(2), RATE)
    assert names(library) == ["Anna"]


def test_finding_goes_from_exact_to_any_case_and_never_guesses(library: VoiceLibrary) -> None:
    for number, name in enumerate(["Anna", "anna", "Berta", "Ännchen"]):
        library.add(name, sound(number), RATE, voice_id=f"V{number}")
    assert library.find("anna").voice_id == "V1"
    assert library.find("BERTA").voice_id == library.find("v2").voice_id == "V2"
    assert library.find("ÄNNCHEN").voice_id == "V3"
    with refused("voice_not_found") as ambiguous:
        library.find("ANNA")
    assert ambiguous.value.suggestions == ("Anna", "anna")
    with refused("voice_not_found") as near:
        library.find("Bertha")
    assert near.value.suggestions == ("Berta",) and "Berta" in near.value.message
    with refused("voice_not_found") as unlike:
        library.find("Quentin")
    assert unlike.value.suggestions == ()
    with refused("voice_not_found", "voice_id"):
        library.get("v2")


def test_lists_are_filtered_ordered_and_paged(library: VoiceLibrary) -> None:
    library.add("cleo", sound(1), RATE, language="en-GB", gender="Female", tags=["News"])
    library.add("Anna", sound(2), RATE, language="de", gender="female", description="Calm and slow")
    library.add("Bert", sound(3), RATE, language="en", gender="male", tags=["news", "calm"])
    assert names(library) == ["Anna", "Bert", "cleo"]
    assert names(library, language="EN") == ["Bert", "cleo"]
    assert names(library, language="en-gb") == ["cleo"]
    assert names(library, gender="female", tag="news") == ["cleo"]
    assert names(library, text="CALM") == ["Anna", "Bert"]
    page = library.list(offset=1, limit=1)
    assert ([voice.name for voice in page.voices], page.total) == (["Bert"], 3)
    assert library.list(offset=9).voices == () and library.list(limit=0).total == 3
    for wrong in ({"offset": -1}, {"limit": -1}, {"limit": True}):
        with refused("invalid_request", next(iter(wrong))):
            library.list(**wrong)


def test_what_is_said_of_a_voice_can_be_changed_and_the_rest_stays(
    library: VoiceLibrary, open_library: OpenLibrary
) -> None:
    added = library.add("Anna", sound(), RATE, description="old", tags=["a"])
    other = open_library()
    changed = other.update(added.voice_id, description="new", language="de")
    assert changed == dataclasses.replace(added, description="new", language="de") == library.get(added.voice_id)
    for wrong in ({"audio_hash": "0"}, {"name": "../x"}, {"tags": "abc"}, {"language": "german!"}):
        with refused("invalid_request", next(iter(wrong))):
            library.update(added.voice_id, **wrong)
    with refused("voice_not_found"):
        library.update("nobody", description="x")
    assert library.get(added.voice_id) == changed


def test_a_renamed_voice_keeps_all_but_its_name(library: VoiceLibrary, open_library: OpenLibrary) -> None:
    added = library.add("Anna", sound(), RATE)
    library.add("Berta", sound(1), RATE)
    library.put_conditionals(added.voice_id, "key", b"data")
    with refused("voice_exists", "name"):
        library.update(added.voice_id, name="Berta")
    library.update(added.voice_id, name="Clara")
    other = open_library()
    assert names(other) == ["Berta", "Clara"]
    assert other.get_conditionals(added.voice_id, "key") == b"data"
    assert np.array_equal(other.get_audio(added.voice_id)[0], library.get_audio(added.voice_id)[0])
    again = other.add("Anna", sound(), RATE)  # even the same recording
    assert again.voice_id != added.voice_id and other.check() == []
    assert other.update(added.voice_id, name="clara").name == "clara"


def test_a_deleted_voice_leaves_nothing_behind(library: VoiceLibrary, open_library: OpenLibrary, store: Store) -> None:
    voice = library.add("Anna", sound(), RATE)
    library.put_conditionals(voice.voice_id, "key", b"data")
    other = open_library()
    other.get_audio(voice.voice_id)
    library.delete(voice.voice_id)
    for gone in (
        lambda: other.get(voice.voice_id),
        lambda: other.get_audio(voice.voice_id),
        lambda: other.find("Anna"),
    ):
        with refused("voice_not_found"):
            gone()
    with refused("voice_not_found"):
        other.delete(voice.voice_id)
    assert list(store.list("voices/")) == list(store.list("catalogue/")) == []


def test_what_one_worker_does_another_sees(open_library: OpenLibrary) -> None:
    here, there = open_library(refresh_s=3_600.0), open_library(refresh_s=3_600.0)
    voice = here.add("Anna", sound(), RATE)
    assert there.get(voice.voice_id) == there.find("anna") == voice  # unknown ones are looked for at once
    here.add("Berta", sound(1), RATE)
    assert names(there) == ["Anna"]
    there.refresh()
    assert names(there) == ["Anna", "Berta"]


def test_a_full_library_refuses_more(open_library: OpenLibrary) -> None:
    library = open_library(max_voices=1)
    voice = library.add("Anna", sound(), RATE)
    with refused("voice_library_full"):
        library.add("Berta", sound(), RATE)
    library.delete(voice.voice_id)
    library.add("Berta", sound(), RATE)


@pytest.mark.parametrize(
    ("audio", "rate", "code", "field"),
    [
        (np.zeros((2, 10), np.float32), RATE, "reference_unreadable", "audio"),
        (np.zeros(0, np.float32), RATE, "reference_unreadable", "audio"),
        (np.full(9, np.nan, np.float32), RATE, "reference_unreadable", "audio"),
        (np.zeros(9, np.int16), RATE, "reference_unreadable", "audio"),
        (b"RIFF", RATE, "reference_unreadable", "audio"),
        (np.zeros(601 * 4_000, np.float32), 4_000, "reference_too_long", "audio"),
        (sound(), 0, "invalid_request", "sample_rate"),
        (sound(), 24_000.0, "invalid_request", "sample_rate"),
        (sound(), 65_537, "invalid_request", "sample_rate"),
    ],
)
def test_what_is_no_prompt_is_refused_and_leaves_nothing(
    tmp_path: Path, audio: object, rate: object, code: str, field: str
) -> None:
    library = VoiceLibrary.open(tmp_path / "voices")
    with refused(code, field):
        library.add("Anna", audio, rate)  # type: ignore[arg-type]
    assert not (tmp_path / "voices").exists()


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"voice_id": "../../etc"}, "voice_id"),
        ({"language": "../de"}, "language"),
        ({"gender": 1}, "gender"),
        ({"description": "x" * 2_001}, "description"),
        ({"description": "a\x00b"}, "description"),
        ({"tags": "news"}, "tags"),
        ({"tags": [str(number) for number in range(33)]}, "tags"),
        ({"quality": {"snr": float("nan")}}, "quality"),
        ({"quality": {"snr": object()}}, "quality"),
        ({"quality": {"note": "\ud800"}}, "quality"),
        ({"created": "yesterday"}, "created"),
        ({"consent": None}, "consent"),
    ],
)
def test_what_cannot_be_said_of_a_voice_is_refused_by_name(
    tmp_path: Path, wrong: dict[str, object], field: str
) -> None:
    library = VoiceLibrary.open(tmp_path / "voices")
    with refused("invalid_request", field):
        library.add("Anna", sound(), RATE, **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "voices").exists()


@pytest.mark.parametrize(
    "uri", ["ftp://host/x", "s3://", "s3://bucket/../x", "s3://bucket/a b", "s3://b?x=1", "", "file://host/x"]
)
def test_a_place_that_is_none_is_refused(uri: str) -> None:
    with refused("invalid_request", "uri"):
        VoiceLibrary.open(uri)


def test_a_folder_is_found_by_path_and_by_uri(tmp_path: Path) -> None:
    folder = tmp_path / "my voices"
    voice = VoiceLibrary.open(folder).add("Anna", sound(), RATE)
    assert VoiceLibrary.open(str(folder)).get(voice.voice_id) == VoiceLibrary.open(folder.as_uri()).get(voice.voice_id)
    with refused("storage_failed"):
        (tmp_path / "file").write_bytes(b"")
        VoiceLibrary.open(tmp_path / "file")


def test_voices_are_the_same_in_any_thread_while_others_come_and_go(library: VoiceLibrary) -> None:
    kept = [library.add(f"kept {number}", sound(number), RATE) for number in range(3)]

    def use(number: int) -> None:
        passing = library.add(f"passing {number}", sound(number), RATE)
        for voice in kept:
            assert library.get(voice.voice_id) == library.find(voice.name) == voice
            assert library.get_audio(voice.voice_id)[0].size == 2_400
        assert {voice.name for voice in kept} <= set(names(library))
        library.delete(passing.voice_id)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(12)))
    assert names(library) == [voice.name for voice in kept]


def test_updates_of_different_fields_at_once_are_all_kept(library: VoiceLibrary) -> None:
    voice = library.add("Anna", sound(), RATE)
    changes: list[dict[str, str]] = [{"description": "d"}, {"consent": "c"}, {"source": "s"}, {"language": "de"}]
    for change in changes:
        library.update(voice.voice_id, **change)
    found: Voice = library.get(voice.voice_id)
    assert (found.description, found.consent, found.source, found.language) == ("d", "c", "s", "de")


def test_the_store_is_told_apart_from_what_lies_beside_it(tmp_path: Path) -> None:
    library = VoiceLibrary.open(tmp_path)
    voice = library.add("Anna", sound(), RATE)
    (tmp_path / "catalogue" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "voices" / ".nfs0001").write_bytes(b"x")
    (tmp_path / "voices" / voice.voice_id / "my notes.txt").write_bytes(b"x")
    library.refresh()
    assert library.check() == [] and names(library) == ["Anna"]
    assert (tmp_path / "voices" / voice.voice_id / "my notes.txt").exists()


def test_nothing_runs_on_after_closing(tmp_path: Path) -> None:
    with VoiceLibrary.open(tmp_path) as library:
        library.add("Anna", sound(), RATE)
        library.preload(["Anna"]).result(timeout=10)
    assert not [thread for thread in threading.enumerate() if thread.name == "voice-library"]
