"""scripts/voices.py as a person runs it: over a real folder, and a bucket served over HTTP."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from scripts.voice_tools.copying import carry_out, plan_sync
from tests.voice_library.recordings import RATE_HZ, FloatArray, silence, speech
from voice_library import LibraryError, Voice, VoiceLibrary
from voice_library.folder_store import FolderStore

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return tmp_path / "library"


def write_recording(path: Path, audio: FloatArray, rate_hz: int = RATE_HZ) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate_hz)
    return path


def put_voice(location: Path, name: str, voice_id: str, *, pitch_hz: float = 120.0, **about: Any) -> None:
    """Without the command line, which takes a second."""
    with VoiceLibrary.open(location) as opened:
        opened.add(name, speech(6.0, pitch_hz=pitch_hz), RATE_HZ, voice_id=voice_id, **about)


def succeeded(done: Done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed(done: Done) -> str:
    """Of a command that could not do what was asked: its one line, without a traceback; warnings may stand before."""
    assert done.returncode == 1, (done.stdout, done.stderr)
    *before, line = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(each.startswith("warning: ") for each in before), done.stderr
    return line


def listed(voices: Run, library: object) -> dict[str, dict[str, Any]]:
    content = json.loads(succeeded(voices("list", "--json", library=library)))
    assert content["total"] == len(content["voices"])
    return {voice["voice_id"]: voice for voice in content["voices"]}


def damage_audio(library: Path, voice_id: str) -> None:
    (path,) = (library / "voices" / voice_id).glob("prompt-*.flac")
    path.write_bytes(path.read_bytes()[:1000])


# ------------------------------------------------------------------------------------------- adding


def test_a_recording_is_added_with_all_that_was_said_of_it(voices: Run, library: Path, tmp_path: Path) -> None:
    file = write_recording(tmp_path / "anna.flac", speech(40.0))
    facts = ("--name", "Anna Müller", "--language", "de", "--gender", "female", "--tag", "calm", "--tag", "low")
    done = voices("add", file, *facts, "--consent", "signed 2024", "--id", "anna", library=library)
    assert "added Anna Müller as anna" in succeeded(done) and done.stderr == "", "quiet when nobody watches"
    voice = listed(voices, library)["anna"]
    assert (voice["name"], voice["language"], voice["gender"]) == ("Anna Müller", "de", "female")
    assert (voice["tags"], voice["consent"], voice["source"]) == (["calm", "low"], "signed 2024", "anna.flac")
    assert 10 <= voice["duration_s"] <= 15 and voice["quality"]["part"]["of_s"] == 40.0


def test_a_folder_is_added_and_what_cannot_be_is_told_without_stopping_the_rest(
    voices: Run, library: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "recordings"
    write_recording(folder / "good.wav", speech(7.0))
    write_recording(folder / "low.wav", speech(7.0, pitch_hz=90.0))
    write_recording(folder / "short.wav", speech(2.0))
    write_recording(folder / "silent.wav", silence(8.0))
    (folder / "broken.wav").write_bytes(b"RIFFjunk")
    (folder / "notes.txt").write_text("not a recording")
    done = voices("add", folder, library=library)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert {voice["name"] for voice in listed(voices, library).values()} == {"good", "low"}
    for name, code in (("short", "too_short"), ("silent", "silent"), ("broken", "unreadable")):
        assert any(f"{name}.wav" in line and f"reference_{code}" in line for line in done.stderr.splitlines())
    assert "only 7.0 s long" in done.stderr


def test_a_file_that_decodes_to_hours_is_refused(voices: Run, library: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.flac"
    soundfile.write(bomb, np.zeros(8_000 * 2_400, dtype=np.int16), 8_000)
    assert bomb.stat().st_size < 1 << 20
    assert "reference_too_long" in failed(voices("add", bomb, library=library))


@pytest.mark.parametrize("make", ["missing", "pipe"])
def test_what_is_not_a_file_is_refused_at_once(voices: Run, library: Path, tmp_path: Path, make: str) -> None:
    path = tmp_path / "voice.wav"
    if make == "pipe":
        os.mkfifo(path)
    assert "reference_unreadable" in failed(voices("add", path, library=library))


def test_one_name_for_several_recordings_is_an_error(voices: Run, library: Path, tmp_path: Path) -> None:
    files = [write_recording(tmp_path / f"{name}.wav", speech(6.0)) for name in "ab"]
    assert "invalid_request" in failed(voices("add", *files, "--name", "One", library=library))
    assert listed(voices, library) == {}


# -------------------------------------------------------------------------- looking, renaming, deleting


def test_voices_are_found_by_filters_and_shown_in_a_table(voices: Run, library: Path) -> None:
    put_voice(library, "Anna", "anna", language="de", tags=["calm"])
    put_voice(library, "Bob [1]", "bob", pitch_hz=100.0, language="en", gender="male")
    table = succeeded(voices("list", library=library))
    assert "2 voices" in table and "Anna" in table and "Bob [1]" in table
    for condition, expected in (
        (("--language", "de"), {"anna"}),
        (("--gender", "male"), {"bob"}),
        (("--tag", "calm"), {"anna"}),
        (("--text", "bo"), {"bob"}),
    ):
        content = json.loads(succeeded(voices("list", *condition, "--json", library=library)))
        assert {voice["voice_id"] for voice in content["voices"]} == expected
    assert json.loads(succeeded(voices("show", "anna", "--json", library=library)))["tags"] == ["calm"]
    assert "calm" in succeeded(voices("show", "ANNA", library=library))


def test_a_voice_that_is_not_there_is_one_line_that_suggests(voices: Run, library: Path) -> None:
    put_voice(library, "Katharina", "kat")
    line = failed(voices("show", "Katarina", library=library))
    assert "voice_not_found" in line and "Katharina" in line


def test_a_renamed_voice_keeps_its_id_and_loses_its_old_name(voices: Run, library: Path) -> None:
    put_voice(library, "Old", "v")
    succeeded(voices("rename", "Old", "Neu ünd", library=library))
    assert listed(voices, library)["v"]["name"] == "Neu ünd"
    assert "voice_not_found" in failed(voices("show", "Old", library=library))


def test_deleting_needs_a_yes(voices: Run, library: Path) -> None:
    put_voice(library, "Anna", "anna")
    assert "--yes" in failed(voices("delete", "anna", library=library))
    assert set(listed(voices, library)) == {"anna"}
    succeeded(voices("delete", "Anna", "--yes", library=library))
    assert listed(voices, library) == {}


@pytest.mark.parametrize("variable", ["VOICES_DIR", "VOICES_URI"])
def test_the_environment_says_where_the_library_is(voices: Run, library: Path, variable: str) -> None:
    put_voice(library, "Anna", "anna")
    assert "Anna" in succeeded(voices("list", **{variable: str(library)}))


def test_no_library_at_all_is_an_error_that_says_how_to_name_one(voices: Run) -> None:
    assert "VOICES_DIR" in failed(voices("list"))


def test_playing_without_a_sound_device_says_how_to_get_the_audio(voices: Run, library: Path, tmp_path: Path) -> None:
    put_voice(library, "Anna", "anna")
    (tmp_path / "sounddevice.py").write_text("raise ImportError('none here')")
    line = failed(voices("play", "anna", library=library, PYTHONPATH=str(tmp_path)))
    assert "pip install sounddevice" in line and "export anna" in line


# ------------------------------------------------------------------------------------ export and check


@pytest.mark.parametrize("file_format", ["flac", "wav"])
def test_exported_audio_is_exactly_what_is_kept(voices: Run, library: Path, tmp_path: Path, file_format: str) -> None:
    put_voice(library, "Anna", "anna", consent="yes")
    put_voice(library, "Bob", "bob", pitch_hz=100.0)
    succeeded(voices("export", "Anna", "--to", tmp_path / "out", "--format", file_format, library=library))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"anna.{file_format}", "anna.json"}
    with VoiceLibrary.open(library) as opened:
        kept, rate = opened.get_audio("anna")
    audio, written_rate = soundfile.read(tmp_path / "out" / f"anna.{file_format}", dtype="float32")
    assert written_rate == rate and np.array_equal(audio, kept)
    assert json.loads((tmp_path / "out" / "anna.json").read_text())["consent"] == "yes"


def test_check_finds_damage_and_says_so_with_its_exit_code(voices: Run, library: Path) -> None:
    put_voice(library, "Anna", "anna")
    put_voice(library, "Bob", "bob", pitch_hz=100.0)
    assert "2 voices, all sound" in succeeded(voices("check", library=library))
    damage_audio(library, "bob")
    done = voices("check", "--json", library=library)
    assert done.returncode == 1
    assert [problem["voice_id"] for problem in json.loads(done.stdout)["problems"]] == ["bob"]


# -------------------------------------------------------------------------------------------- syncing


def test_a_library_goes_to_a_bucket_and_back_unchanged(
    voices: Run, library: Path, tmp_path: Path, bucket_uri: str
) -> None:
    put_voice(library, "Anna", "anna", language="de", tags=["x"], consent="yes", quality={"snr_db": 30.0})
    put_voice(library, "Bob", "bob", pitch_hz=100.0)
    with VoiceLibrary.open(library) as opened:
        opened.put_conditionals("anna", "model/1", b"computed once")
    assert "2 voices changed, 1 conditionals copied" in succeeded(voices("sync", library, bucket_uri))
    succeeded(voices("sync", bucket_uri, tmp_path / "back"))
    assert listed(voices, tmp_path / "back") == listed(voices, bucket_uri) == listed(voices, library)
    with VoiceLibrary.open(library) as one, VoiceLibrary.open(tmp_path / "back") as other:
        assert np.array_equal(one.get_audio("anna")[0], other.get_audio("anna")[0])
        assert other.get_conditionals("anna", "model/1") == b"computed once"


def test_a_second_sync_changes_nothing_and_reads_no_audio(voices: Run, library: Path, tmp_path: Path) -> None:
    put_voice(library, "Anna", "anna")
    target = tmp_path / "target"
    succeeded(voices("sync", library, target))
    for path in [*library.rglob("prompt-*.flac"), *target.rglob("prompt-*.flac")]:
        path.unlink()  # nobody may miss it
    assert "0 voices changed" in succeeded(voices("sync", library, target))


def test_a_dry_run_says_what_it_would_do_and_does_none_of_it(voices: Run, library: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    put_voice(library, "Anna", "anna")
    put_voice(target, "Old", "old", pitch_hz=100.0)
    said = succeeded(voices("sync", library, target, "--delete", "--dry-run"))
    assert "would add anna" in said and "would delete old" in said
    assert set(listed(voices, target)) == {"old"}


def test_sync_carries_over_changes_and_deletes_only_when_told_to(voices: Run, library: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    put_voice(library, "Anna", "anna", language="de")
    put_voice(library, "Bob", "bob", pitch_hz=100.0)
    put_voice(target, "Anna before", "anna")
    put_voice(target, "Bob", "bob", pitch_hz=101.0)
    put_voice(target, "Old", "old", pitch_hz=90.0)
    succeeded(voices("sync", library, target))
    there, here = listed(voices, target), listed(voices, library)
    assert {each: there[each] for each in here} == {
        "anna": here["anna"] | {"created": there["anna"]["created"]},
        "bob": here["bob"],
    }
    assert "old" in there
    assert "--yes" in failed(voices("sync", library, target, "--delete"))
    succeeded(voices("sync", library, target, "--delete", "--yes"))
    assert set(listed(voices, target)) == {"anna", "bob"}


def test_sync_keeps_a_voice_whose_replacement_has_the_name_of_another_and_does_the_rest(
    voices: Run, library: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    put_voice(library, "Bob", "a")
    put_voice(library, "Carla", "c", pitch_hz=110.0)
    put_voice(target, "Al", "a", pitch_hz=100.0)
    put_voice(target, "Bob", "b", pitch_hz=90.0)
    before = listed(voices, target)
    done = voices("sync", library, target)
    assert done.returncode == 1 and "voice_exists" in done.stderr and "1 failed" in done.stdout
    after = listed(voices, target)
    assert after.pop("c") == listed(voices, library)["c"] and after == before


@pytest.mark.parametrize("code", ["storage_failed", "voice_exists"])
def test_a_voice_that_cannot_be_replaced_is_put_back_as_it_was(library: Path, tmp_path: Path, code: str) -> None:
    put_voice(library, "Anna", "a")
    put_voice(tmp_path / "target", "Al", "a", pitch_hz=100.0, tags=["old"])
    target = FailsOnce(FolderStore(tmp_path / "target"), code)
    with VoiceLibrary.open(library) as source, target:
        old, (old_audio, _) = target.get("a"), target.get_audio("a")
        (step,) = plan_sync(source, target, delete=False)
        with pytest.raises(LibraryError) as raised:
            carry_out(step, source, target)
        assert raised.value.code == code and target.num_adds == 2
        assert target.get("a") == old and np.array_equal(target.get_audio("a")[0], old_audio)
        carry_out(step, source, target)
        assert target.get("a").audio_hash == source.get("a").audio_hash


class FailsOnce(VoiceLibrary):
    """A library of which the first add fails."""

    def __init__(self, store: FolderStore, code: str) -> None:
        super().__init__(store)
        self._code = code
        self.num_adds = 0

    def add(self, *arguments: Any, **options: Any) -> Voice:
        self.num_adds += 1
        if self.num_adds == 1:
            raise LibraryError(self._code, "it fails")
        return super().add(*arguments, **options)


@pytest.mark.parametrize("state", ["empty", "damaged"])
def test_an_empty_or_damaged_source_never_deletes_from_the_target(
    voices: Run, library: Path, tmp_path: Path, state: str
) -> None:
    target = tmp_path / "target"
    put_voice(target, "Anna", "anna")
    if state == "damaged":
        put_voice(library, "Anna", "anna")
        put_voice(library, "Bob", "bob", pitch_hz=100.0)
        for path in (library / "catalogue").iterdir():
            if b'"anna"' in path.read_bytes():
                path.write_bytes(b"damaged")
    assert "nothing was done" in failed(voices("sync", library, target, "--delete", "--yes"))
    assert set(listed(voices, target)) == {"anna"}


def test_a_bucket_that_is_not_there_is_one_line_with_a_code(voices: Run) -> None:
    assert "storage_failed" in failed(voices("list", library="s3://no-such-bucket-here/library"))


# ------------------------------------------------------------------------------------------- importing


class Attack:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._marker}",)


def test_an_older_library_comes_over_and_what_is_malicious_in_it_is_reported_and_does_not_run(
    voices: Run, library: Path, tmp_path: Path
) -> None:
    legacy, marker = tmp_path / "legacy", tmp_path / "it-ran"
    (legacy / "embeddings").mkdir(parents=True)
    contents = {"anna": {"audio": speech(6.0), "sample_rate": RATE_HZ}, "bare": speech(6.0), "evil": Attack(marker)}
    for voice_id, content in contents.items():
        (legacy / "embeddings" / f"{voice_id}.pkl.gz").write_bytes(gzip.compress(pickle.dumps(content)))
    (legacy / "name_mapping.json").write_text(json.dumps({"Anna": "anna"}))
    done = voices("import-legacy", legacy, library=library)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "2 imported, 0 skipped, 1 refused" in done.stdout
    assert "evil" in done.stdout and "system" in done.stdout
    assert not marker.exists()
    assert {each: voice["name"] for each, voice in listed(voices, library).items()} == {"anna": "Anna", "bare": "bare"}
    again = voices("import-legacy", legacy, library=library)
    assert "0 imported, 2 skipped, 1 refused" in again.stdout
