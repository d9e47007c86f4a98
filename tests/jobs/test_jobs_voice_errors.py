"""Named voices that cannot be had: tricks, typing errors, damage and failing storage, each with its code."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from engine.errors import SpeechError
from engine.types import Conditionals, VoicePrompt
from jobs.settings import Settings
from jobs.worker import BrokenWorker, Worker
from tests.jobs.voice_support import MakeWorker, counts, engine_of, recorded, run, save
from tests.voice_library.recordings import speech
from tests.voice_library.test_voices_s3_failures import without_rights
from voice_library import LibraryError, S3Options, VoiceLibrary

# ------------------------------------------------------------------------------------- bad input


PATHS = ["../Anna", "..", "/etc/passwd", "a/b", "a\\b", ".hidden", "\x00", "Anna\u202e", "", "x" * 500]


@pytest.mark.parametrize("name", PATHS)
def test_path_tricks_in_names_and_ids_are_refused_wherever_they_come(
    make_worker: MakeWorker, name: str, local: Settings, tmp_path: Path
) -> None:
    worker = make_worker()
    for field in ("voice_name", "voice_id"):
        for fields in ({"text": "Hello"}, {"operation": "get_voice"}, {"operation": "delete_voice"}):
            result = run(worker, **fields, **{field: name})
            assert (result["error_code"], result["field"]) == ("invalid_request", field), result
        result = save(worker, "Fine", **{field: name})  # type: ignore[arg-type]
        assert (result["error_code"], result["field"]) == ("invalid_request", field), result
    assert engine_of(worker).num_embedded == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("fields", "code", "field", "told"),
    [
        ({"voice_name": "Ana"}, "voice_not_found", "voice_name", "did you mean 'Anna'"),
        ({"voice_id": "Anna"}, "voice_not_found", "voice_id", "did you mean 'Anna'"),
        ({"voice_name": "ZOE"}, "voice_not_found", "voice_name", "'Zoe', 'zoe'"),
        ({"voice_name": "somebody else"}, "voice_not_found", "voice_name", "somebody else"),
        ({"voice_id": "no-such-id"}, "voice_not_found", "voice_id", "no-such-id"),
        ({"voice_name": "Ünïcode"}, "voice_not_found", "voice_name", "Ünïcode"),
    ],
)
def test_a_voice_that_is_not_there_is_never_guessed(
    make_worker: MakeWorker, local: Settings, fields: dict[str, str], code: str, field: str, told: str
) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        for number, name in enumerate(("Anna", "Zoe", "zoe")):
            library.add(name, speech(2.0, pitch_hz=120.0 + number), 24_000)
    worker = make_worker()
    result = run(worker, text="Hello", **fields)
    assert (result["error_code"], result["field"]) == (code, field)
    assert told in result["error"]


def test_a_default_voice_that_is_not_there_is_an_error_that_names_the_setting(make_worker: MakeWorker) -> None:
    result = run(make_worker(default_voice="Anna"), text="Hello")
    assert (result["error_code"], result["field"]) == ("voice_not_found", None)
    assert "DEFAULT_VOICE" in result["error"] and "'Anna'" in result["error"]


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"name": "Anna"}, "voice_exists", "voice_name"),
        ({"voice_id": "anna"}, "voice_exists", "voice_id"),
        ({"name": None}, "invalid_request", "voice_name"),
        ({"tags": ["x" * 100]}, "invalid_request", "tags"),
        ({"tags": ["\ud800"]}, "invalid_request", "tags"),
        ({"description": "x" * 3_000}, "invalid_request", "description"),
        ({"consent": "\x07"}, "invalid_request", "consent"),
        ({"language": "xx"}, "language_unsupported", "language"),
        ({"reference_audio": "%%%"}, "reference_unreadable", "reference_audio"),
        ({"reference_audio": recorded(duration_s=0.5)}, "reference_too_short", "reference_audio"),
        ({"reference_audio": "silence"}, "reference_silent", "reference_audio"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_spoken(
    make_worker: MakeWorker, engine: Any, fields: dict[str, Any], code: str, field: str, local: Settings
) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        library.add("Anna", speech(2.0), 24_000, voice_id="anna")
    if fields.get("reference_audio") == "silence":
        buffer = io.BytesIO()
        soundfile.write(buffer, np.zeros(96_000, np.float32), 24_000, format="WAV")
        fields = {"reference_audio": base64.b64encode(buffer.getvalue()).decode()}
    result = save(make_worker(engine), **{"name": "Berta", **fields})
    assert (result["error_code"], result["field"]) == (code, field), result
    assert engine.requests == []


def test_a_full_library_says_so_before_anything_is_spoken(make_worker: MakeWorker, engine: Any) -> None:
    worker = make_worker(engine, max_voices=1)
    assert "error" not in save(worker, "Anna")
    assert save(worker, "Berta")["error_code"] == "voice_library_full"
    assert len(engine.requests) == 1


def test_a_voice_too_short_for_the_model_is_told_with_the_field_that_named_it(
    make_worker: MakeWorker, make_engine: Callable[..., Any], local: Settings
) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        library.add("Anna", speech(2.0), 24_000)

    def refuse(prompt: VoicePrompt) -> Conditionals:
        raise SpeechError("reference_too_short", "expected more than 5 s", "reference_audio")

    picky = make_engine()
    picky.embed = refuse
    for _ in range(2):  # a refusal is not kept: the voice may be replaced
        result = run(make_worker(picky), text="Hello", voice_name="Anna")
        assert (result["error_code"], result["field"]) == ("reference_too_short", "voice_name")


def test_a_damaged_voice_is_reported_and_the_others_speak(make_worker: MakeWorker, local: Settings) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        library.add("Anna", speech(2.0), 24_000, voice_id="anna")
        library.add("Berta", speech(2.0, pitch_hz=180.0), 24_000)
    (prompt,) = (local.voices_dir or Path()).glob("voices/anna/*.flac")
    prompt.write_bytes(prompt.read_bytes()[:-50])
    worker = make_worker()
    result = run(worker, text="Hello", voice_name="Anna")
    assert (result["error_code"], result["field"]) == ("reference_unreadable", "voice_name")
    assert run(worker, text="Hello", voice_name="Berta")["voice"] == "Berta"
    (problem,) = run(worker, operation="info")["voice_library"]["problems"]
    assert problem["voice_id"] == "anna"
    assert run(worker, operation="delete_voice", voice_id="anna")["deleted"]


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"text": "Hello", "voice_id": "anna"}, "voice_not_found", "voice_id"),
        ({"operation": "get_voice", "voice_name": "Anna"}, "voice_not_found", "voice_name"),
        ({"operation": "delete_voice", "voice_id": "anna"}, "voice_not_found", "voice_id"),
        ({"operation": "list_voices"}, "invalid_request", "operation"),
    ],
)
def test_without_a_library_what_needs_one_says_so(
    worker: Worker, fields: dict[str, Any], code: str, field: str
) -> None:
    result = run(worker, **fields)
    assert (result["error_code"], result["field"]) == (code, field)
    assert "no voice library" in result["error"]


def test_without_a_library_saving_is_refused_before_anything_is_spoken(worker: Worker, engine: Any) -> None:
    result = save(worker, "Anna")
    assert (result["error_code"], result["field"]) == ("invalid_request", "save_to_library")
    assert engine.requests == [] and run(worker, operation="info")["voice_library"] is None


# ------------------------------------------------------------------------------------- storage


@pytest.fixture
def in_a_bucket(s3_options: S3Options, bucket: str) -> dict[str, Any]:
    """Settings of a library in a bucket over HTTP."""
    from pydantic import SecretStr

    keys = {"bucket_access_key_id": SecretStr("id"), "bucket_secret_access_key": SecretStr("secret")}
    place = {"voices_dir": None, "voices_uri": f"s3://{bucket}/voices"}
    return {**place, "bucket_endpoint_url": s3_options.endpoint_url, **keys}


def test_a_bucket_keeps_voices_for_all_workers(make_worker: MakeWorker, in_a_bucket: dict[str, Any]) -> None:
    first = make_worker(**in_a_bucket)
    saved = save(first, "Anna", 170.0, seed=1, text="Hello there")
    first.close()
    second = make_worker(**in_a_bucket)
    assert run(second, text="Hello there", seed=1, voice_name="Anna")["audio"] == saved["audio"]
    assert engine_of(second).num_embedded == 0


def test_a_bucket_that_takes_its_rights_away_is_a_storage_failure_and_nothing_is_lost(
    make_worker: MakeWorker, in_a_bucket: dict[str, Any], s3_options: S3Options, local: Settings
) -> None:
    worker = make_worker(**in_a_bucket)
    save(worker, "Anna")
    other = make_worker(**in_a_bucket)
    with without_rights(s3_options):
        denied = [
            save(worker, "Berta"),
            run(worker, operation="delete_voice", voice_name="Anna"),
            run(other, text="Hello", voice_name="Anna"),
        ]
        assert [result["error_code"] for result in denied] == ["storage_failed"] * 3
        assert all("access denied" in result["error"] for result in denied)
        assert run(worker, text="Hello", voice_name="Anna")["voice"] == "Anna"  # what is in memory serves on
        assert run(worker, operation="info")["voice_library"]["error_code"] == "storage_failed"
        with pytest.raises(LibraryError, match="access denied"):
            Worker.load(local.model_copy(update=in_a_bucket))
    assert [each["name"] for each in run(other, operation="list_voices")["voices"]] == ["Anna"]
    assert "error" not in run(other, text="Hello", voice_name="Anna")


def test_a_store_that_cannot_be_reached_is_an_error_at_start_and_of_every_job(
    in_a_bucket: dict[str, Any], local: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.worker.load_engine", lambda *_, **__: pytest.fail("a model was loaded first"))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(LibraryError) as raised:
        Worker.load(local.model_copy(update={**in_a_bucket, "bucket_endpoint_url": f"http://127.0.0.1:{port}"}))
    result = run(BrokenWorker(raised.value), text="Hello")
    assert (result["error_code"], result["refresh_worker"]) == ("storage_failed", True)


def test_conditionals_that_cannot_be_stored_cost_the_job_nothing(make_worker: MakeWorker, local: Settings) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        kept = library.add("Anna", speech(2.0), 24_000)
    (local.voices_dir or Path()).joinpath("voices", kept.voice_id, "conditionals").write_bytes(b"in the way")
    worker = make_worker()
    assert run(worker, text="Hello", voice_name="Anna")["voice"] == "Anna"
    assert worker._voices is not None
    worker._voices._storing.shutdown(wait=True)
    assert (counts(worker)["store_failures"], counts(worker)["stored"]) == (1, 0)
