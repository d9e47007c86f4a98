"""Named voices as jobs use them: saved, listed, spoken with, and computed once by whoever comes first."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from engine.errors import SpeechError
from engine.types import COMPACT_MARK, Conditionals, EngineConfig, SpeechRequest, VoicePrompt
from jobs.settings import Settings
from jobs.worker import Worker
from tests.jobs.voice_support import Draft, MakeWorker, counts, engine_of, recorded, run, save
from tests.voice_library.recordings import speech, voice
from voice_library import Voice, VoiceLibrary

# ------------------------------------------------------------------------------------- adding and speaking


def test_a_cloned_voice_is_saved_and_speaks_by_name_and_by_id_as_it_did_when_it_was_saved(
    make_worker: MakeWorker,
) -> None:
    worker = make_worker()
    saved = save(worker, "Anna", 170.0, seed=1, text="Hello there", tags=["warm"], language="de-AT", consent="by mail")
    info = saved["voice_info"]
    assert (saved["voice"], info["name"], info["saved"], info["tags"]) == ("Anna", "Anna", True, ["warm"])
    assert (info["language"], info["consent"], info["quality"]["part"]["of_s"]) == ("de", "by mail", 6.0)
    assert info["quality"]["snr_db"] > 20 and info["duration_s"] <= 6.0
    by_id = run(worker, text="Hello there", seed=1, language="de", voice_id=info["voice_id"])
    by_name = run(worker, text="Hello there", seed=1, language="de", voice_name="anna")
    other = run(worker, text="Hello there", seed=1, language="de")
    assert by_id["voice"] == by_name["voice"] == "Anna"
    assert saved["audio"] == by_id["audio"] == by_name["audio"] != other["audio"]


def test_a_voice_of_the_library_is_a_conversions_target_too(make_worker: MakeWorker) -> None:
    worker = make_worker()
    low, high = save(worker, "Low", 90.0)["voice_info"]["voice_id"], save(worker, "High", 200.0)["voice_info"]["name"]
    fields = {"operation": "voice_conversion", "input_audio": recorded(130.0, 2.0)}
    first, second = run(worker, **fields, voice_id=low), run(worker, **fields, voice_name=high)
    assert (first["voice"], second["voice"]) == ("Low", "High") and first["audio"] != second["audio"]


def test_of_a_long_recording_the_best_part_is_kept_and_its_faults_are_told(make_worker: MakeWorker) -> None:
    worker = make_worker()
    saved = save(worker, "Anna", reference_audio=recorded(130.0, 40.0))
    part = saved["voice_info"]["quality"]["part"]
    assert part["of_s"] == 40.0 and 10 <= part["end_s"] - part["start_s"] <= 15 and saved["warnings"] == []
    steady = io.BytesIO()
    soundfile.write(steady, voice(3.0), 24_000, format="WAV")
    result = save(worker, "Short", reference_audio=base64.b64encode(steady.getvalue()).decode())
    assert any("only 3.0 s long" in warning for warning in result["warnings"])
    assert all(warning.startswith("reference_audio: ") for warning in result["warnings"])


def test_without_a_text_the_sample_is_heard_and_the_voice_is_saved(make_worker: MakeWorker) -> None:
    worker = make_worker()
    saved = save(worker, "Anna", text=None, language="fr")
    assert saved["sample_audio"] == saved["audio"]
    assert run(worker, operation="get_voice", voice_name="Anna")["voice_info"]["language"] == "fr"


def test_what_only_a_saved_voice_has_is_ignored_with_a_warning_when_none_is_saved(make_worker: MakeWorker) -> None:
    worker = make_worker()
    result = save(worker, "Anna", save_to_library=False, voice_description="warm", gender="f")
    assert [warning.split()[0] for warning in result["warnings"]] == ["description", "gender", "voice_name"]
    assert run(worker, operation="list_voices")["total"] == 0


def test_a_job_that_fails_has_saved_nothing(
    make_worker: MakeWorker, make_engine: Callable[..., Any], local: Settings
) -> None:
    failing = make_engine(lambda _, future: future.set_exception(SpeechError("generation_failed", "no end found")))
    assert save(make_worker(failing), "Anna")["error_code"] == "generation_failed"
    assert save(make_worker(max_result_bytes=80_000), "Anna")["error_code"] == "result_too_large"
    assert save(make_worker(), "Anna", sample_rate=44_100, output_format="opus")["error_code"] == "invalid_request"
    assert run(make_worker(), operation="list_voices")["total"] == 0
    assert not list(local.voices_dir.rglob("*.flac") if local.voices_dir else ())


# ------------------------------------------------------------------------------------- computed once


def test_after_a_restart_a_voice_is_spoken_without_being_computed_and_sounds_the_same(make_worker: MakeWorker) -> None:
    first = make_worker()
    voice_id = save(first, "Anna", 170.0)["voice_info"]["voice_id"]
    before = run(first, text="Hello there", seed=1, voice_id=voice_id)
    assert engine_of(first).num_embedded == 1 and counts(first)["from_memory"] == 1
    first.close()
    again = make_worker()
    after = [run(again, text="Hello there", seed=1, voice_id=voice_id) for _ in range(2)]
    assert engine_of(again).num_embedded == 0
    assert before["audio"] == after[0]["audio"] == after[1]["audio"]
    assert (counts(again)["from_store"], counts(again)["from_memory"], counts(again)["computed"]) == (1, 1, 0)


def test_a_voice_added_by_hand_is_computed_by_the_first_job_and_found_by_the_next_worker(
    make_worker: MakeWorker, local: Settings
) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        library.add("Anna", speech(6.0), 24_000)
    first = make_worker()
    spoken = run(first, text="Hello", seed=1, voice_name="Anna")
    first.close()
    second = make_worker()
    assert run(second, text="Hello", seed=1, voice_name="Anna")["audio"] == spoken["audio"]
    assert (engine_of(first).num_embedded, engine_of(second).num_embedded) == (1, 0)


def test_jobs_that_want_one_voice_at_the_same_time_compute_it_once(make_worker: MakeWorker, local: Settings) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        library.add("Anna", speech(6.0), 24_000)
    worker = make_worker()

    async def scenario() -> list[dict[str, Any]]:
        jobs = (worker.run({"input": {"text": "Hello", "voice_name": "Anna"}}) for _ in range(8))
        return await asyncio.gather(*jobs)

    assert len({result["audio"] for result in asyncio.run(scenario())}) == 1
    assert engine_of(worker).num_embedded == 1 and counts(worker)["from_memory"] == 7


def test_other_ways_of_preparing_a_voice_never_find_what_was_prepared_before(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_worker()
    save(first, "Anna")
    first.close()
    monkeypatch.setattr("engine.draft.MODEL_KEY", "draft/2")
    changed = make_worker()
    assert "error" not in run(changed, text="Hello", voice_name="Anna")
    assert engine_of(changed).num_embedded == 1 and counts(changed)["from_store"] == 0
    changed.close()
    again = make_worker()
    assert "error" not in run(again, text="Hello", voice_name="Anna")
    assert engine_of(again).num_embedded == 0


def foreign(_: bytes) -> bytes:
    """Sound conditionals, of another voice."""
    return Draft.make().embed(VoicePrompt(speech(3.0, pitch_hz=90.0), 24_000)).to_bytes(compact=True)


@pytest.mark.parametrize(
    ("damage", "num_damaged"),
    [(lambda data: data[:-20], 1), (lambda _: b"\x00" * 64, 1), (foreign, 1), (lambda _: None, 0)],
)
def test_stored_conditionals_that_are_of_no_use_are_computed_again_and_never_spoken(
    make_worker: MakeWorker, damage: Callable[[bytes], bytes | None], num_damaged: int, local: Settings
) -> None:
    first = make_worker()
    saved = save(first, "Anna", 170.0, seed=1, text="Hello there")
    first.close()
    (stored,) = (local.voices_dir or Path()).rglob("*.safetensors")
    found = damage(stored.read_bytes())
    stored.unlink()
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        if found is not None:
            key = engine_of(first).voice_key(saved["voice_info"]["audio_hash"])
            library.put_conditionals(saved["voice_info"]["voice_id"], key, found)
    second = make_worker()
    assert run(second, text="Hello there", seed=1, voice_name="Anna")["audio"] == saved["audio"]
    assert counts(second)["damaged"] == num_damaged and engine_of(second).num_embedded == 1


def test_conditionals_that_rotted_on_the_disk_are_computed_again(make_worker: MakeWorker, local: Settings) -> None:
    first = make_worker()
    saved = save(first, "Anna", 170.0, seed=1, text="Hello there")
    first.close()
    (stored,) = (local.voices_dir or Path()).rglob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    second = make_worker()
    assert run(second, text="Hello there", seed=1, voice_name="Anna")["audio"] == saved["audio"]
    second.close()
    third = make_worker()
    assert run(third, text="Hello there", seed=1, voice_name="Anna")["audio"] == saved["audio"]
    assert engine_of(third).num_embedded == 0


@pytest.mark.parametrize("wanted", [("Anna", "Nobody"), 1])
def test_preloaded_voices_are_ready_and_one_that_is_not_there_harms_nothing(
    make_worker: MakeWorker, wanted: Any
) -> None:
    first = make_worker()
    save(first, "Anna")
    save(first, "Berta", 200.0)
    run(first, text="Hello", voice_name="Anna")
    first.close()
    second = make_worker()
    assert second._voices is not None
    second._voices.preload(wanted).result(30)
    assert counts(second)["preloaded"] == 1
    assert counts(second)["preload_failures"] == (0 if isinstance(wanted, int) else 1)
    run(second, text="Hello", voice_name="Anna")
    assert (counts(second)["from_memory"], engine_of(second).num_embedded) == (1, 0)


def test_a_voice_that_cannot_be_preloaded_for_unknown_reasons_is_told_and_the_next_one_is_ready(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_worker()
    save(first, "Anna")
    save(first, "Berta", 200.0)
    first.close()
    second = make_worker()
    assert second._voices is not None
    conditionals = second._voices.conditionals

    def failing(voice: Voice, **options: Any) -> Conditionals:
        if voice.name == "Anna":
            raise RuntimeError("unforeseen")
        return conditionals(voice, **options)

    monkeypatch.setattr(second._voices, "conditionals", failing)
    second._voices.preload(("Anna", "Berta")).result(30)
    assert (counts(second)["preloaded"], counts(second)["preload_failures"]) == (1, 1)
    assert "'Anna' could not be made ready" in caplog.text


def test_a_worker_that_is_loaded_has_the_library_of_its_settings_and_says_so(local: Settings) -> None:
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        library.add("Anna", speech(6.0), 24_000)
    worker = Worker.load(local.model_copy(update={"preload_voices": "Anna", "default_voice": "Anna"}))
    assert run(worker, text="Hello")["voice"] == "Anna"
    info = run(worker, operation="info")
    figures = info["voice_library"]
    assert (figures["num_voices"], figures["location"]) == (1, str(local.voices_dir))
    assert figures["conditionals"]["computed"] == figures["conditionals"]["preloaded"] == 1
    assert info["limits"]["max_voices"] is None
    worker.close()
    with VoiceLibrary.open(str(local.voices_dir)) as library:
        assert library.stats().num_conditionals == 1


# ------------------------------------------------------------------------------------- looking after voices


def test_voices_are_listed_by_filter_and_page_looked_at_and_deleted(make_worker: MakeWorker) -> None:
    worker = make_worker()
    for name, pitch_hz, about in (
        ("Anna", 170.0, {"gender": "f", "tags": ["warm"], "language": "de"}),
        ("Berta", 180.0, {"gender": "f", "voice_id": "b-1", "source": "studio"}),
        ("Carl", 100.0, {"gender": "m", "description": "old and warm"}),
    ):
        assert "error" not in save(worker, name, pitch_hz, **about)

    def names(**conditions: Any) -> list[str]:
        return [each["name"] for each in run(worker, operation="list_local_voices", **conditions)["voices"]]

    assert names() == ["Anna", "Berta", "Carl"]
    assert (names(gender="f"), names(language="de"), names(tag="warm")) == (["Anna", "Berta"], ["Anna"], ["Anna"])
    assert (names(text="warm"), names(offset=1, limit=1), names(offset=9)) == (["Anna", "Carl"], ["Berta"], [])
    page = run(worker, operation="list_voices", limit=1)
    assert (page["total"], page["offset"], len(page["voices"]), page["warnings"]) == (3, 0, 1, [])
    shown = run(worker, operation="get_voice", voice_id="b-1")["voice_info"]
    assert (shown["name"], shown["source"], shown["language"], "part" in shown["quality"]) == (
        *("Berta", "studio", None),
        True,
    )
    assert run(worker, operation="delete_voice", voice_id="b-1")["deleted"]
    assert run(worker, operation="delete_voice", voice_name="Carl")["voice_info"]["name"] == "Carl"
    assert names() == ["Anna"]
    for operation in ({"operation": "get_voice"}, {"operation": "delete_voice"}, {"text": "Hello"}):
        result = run(worker, **operation, voice_id="b-1")
        assert (result["error_code"], result["field"]) == ("voice_not_found", "voice_id")


def test_a_voice_deleted_by_another_worker_is_gone_here_too(make_worker: MakeWorker) -> None:
    one, other = make_worker(), make_worker()
    save(one, "Anna")
    assert run(other, text="Hello", voice_name="Anna")["voice"] == "Anna"
    run(one, operation="delete_voice", voice_name="Anna")
    assert other._voices is not None
    other._voices.library.refresh()  # which happens by itself, a second later
    assert run(other, text="Hello", voice_name="Anna")["error_code"] == "voice_not_found"


def test_two_workers_that_save_one_name_at_the_same_time_have_one_winner(make_worker: MakeWorker) -> None:
    workers = [make_worker(), make_worker()]
    clone = {"operation": "voice_clone", "voice_name": "Anna", "save_to_library": True, "text": "Hello"}

    async def scenario() -> list[dict[str, Any]]:
        jobs = [
            worker.run({"input": {**clone, "reference_audio": recorded(pitch_hz)}})
            for worker, pitch_hz in zip(workers, (120.0, 180.0), strict=True)
        ]
        return await asyncio.gather(*jobs)

    results = asyncio.run(scenario())
    (lost,) = [result for result in results if "error" in result]
    (won,) = [result["voice_info"] for result in results if "error" not in result]
    assert (lost["error_code"], lost["field"]) == ("voice_exists", "voice_name")
    kept = run(make_worker(), operation="get_voice", voice_name="Anna")["voice_info"]
    assert kept["audio_hash"] == won["audio_hash"]


# ------------------------------------------------------------------------------------- a model's own


def test_a_model_speaks_a_stored_voice_bit_for_bit_as_the_worker_that_computed_it(
    make_worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import Engine
    from engine.random_checkpoint import PlantedSpeech, write_checkpoint

    weights = write_checkpoint(tmp_path / "weights", "turbo", plan=PlantedSpeech(tokens=tuple(range(100, 120))))

    def load() -> Engine:
        return Engine.load(
            EngineConfig(model="turbo", model_dir=weights, device="cpu", num_threads=1, max_rows=2, watermark=False)
        )

    def misses(worker: Worker) -> int:
        return int(run(worker, operation="info")["engine"]["conditionals_cache"]["misses"])

    first = make_worker(load())
    short = save(first, "Short", reference_audio=recorded(duration_s=4.0))
    assert (short["error_code"], short["field"]) == ("reference_too_short", "reference_audio")
    saved = save(first, "Anna", 170.0, text="Hello there", seed=3)
    spoken = run(first, text="Hello there", seed=3, voice_name="Anna")
    assert saved["audio"] == spoken["audio"] and misses(first) == 1
    first.close()

    second = make_worker(load())
    assert run(second, text="Hello there", seed=3, voice_name="Anna")["audio"] == spoken["audio"]
    assert misses(second) == 0 and counts(second)["from_store"] == 1
    assert second._voices is not None
    kept = second._voices.conditionals(second._voices.find("Anna", "voice_name"))
    assert kept.key == engine_of(second).voice_key(saved["voice_info"]["audio_hash"]) + COMPACT_MARK
    direct = engine_of(second).speak(SpeechRequest(text="Hello there", seed=3, voice=kept)).waveform
    heard = soundfile.read(io.BytesIO(base64.b64decode(spoken["audio"])), dtype="float32")[0]
    np.testing.assert_allclose(direct, heard, atol=2**-15)

    monkeypatch.setattr("engine.conditioning.PREPROCESSING_VERSION", 99)
    changed = make_worker(load())
    assert "error" not in run(changed, text="Hello there", voice_name="Anna")
    assert misses(changed) == 1 and counts(changed)["from_store"] == 0
