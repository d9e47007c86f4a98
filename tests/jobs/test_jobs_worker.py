"""A worker's promises: complete results, coded errors, and jobs that leave each other alone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import soundfile

from engine.errors import SpeechError
from engine.types import Speech, SpeechRequest
from jobs.settings import Settings
from jobs.worker import OPERATIONS, BrokenWorker, Worker, download_progress, load_engine

RESULT_FIELDS = {
    "audio",
    "format",
    "sample_rate",
    "duration_s",
    "model",
    "voice",
    "seed",
    "chunks",
    "timings",
    "warnings",
    "watermarked",
}
TIMINGS = {
    *("queue", "condition", "prefill", "decode", "vocode", "master", "encode", "total"),
    *("real_time_factor", "first_audio_s"),
}


def run(worker: Worker | BrokenWorker, **fields: Any) -> dict[str, Any]:
    return asyncio.run(worker.run({"id": "1", "input": fields}))


def test_a_result_has_the_fields_of_the_job_api(worker: Worker) -> None:
    result = run(worker, text="Hello there", seed=3)
    assert set(result) == RESULT_FIELDS
    assert set(result["timings"]) == TIMINGS
    assert set(result["chunks"][0]) == {"index", "text", "start_s", "end_s", "attempts", "flags"}
    assert (result["seed"], result["model"], result["voice"]) == (3, "tone", "built-in")
    assert (result["watermarked"], result["warnings"]) == (True, [])


@pytest.mark.parametrize("audio_format", ["wav", "flac", "mp3", "opus"])
@pytest.mark.parametrize("rate", [None, 48_000])
def test_audio_comes_in_the_format_and_rate_asked_for(worker: Worker, audio_format: str, rate: int | None) -> None:
    result = run(worker, text="Hello there", output_format=audio_format, sample_rate=rate)
    info = soundfile.info(io.BytesIO(base64.b64decode(result["audio"])))
    assert (result["format"], result["sample_rate"]) == (audio_format, rate or 24_000)
    assert info.samplerate == result["sample_rate"]
    assert info.duration == pytest.approx(result["duration_s"], abs=0.1)


def test_loudness_asked_for_is_loudness_given(worker: Worker) -> None:
    import pyloudnorm

    for target in (-30.0, -20.0):
        result = run(worker, text="Hello there, " * 10, audio_normalization="loudness", loudness_lufs=target)
        audio, rate = soundfile.read(io.BytesIO(base64.b64decode(result["audio"])))
        assert pyloudnorm.Meter(rate).integrated_loudness(audio) == pytest.approx(target, abs=0.5)


def test_the_engine_gets_what_the_job_said(worker: Worker, engine: Any, reference: str) -> None:
    run(worker, text="Bonjour", language="FR", temperature=0.5, top_k=9, cfg=0.3, seed=4, reference_audio=reference)
    (request,) = engine.requests
    assert (request.text, request.language, request.seed) == ("Bonjour", "fr", 4)
    assert (request.temperature, request.top_k, request.cfg_weight, request.top_p) == (0.5, 9, 0.3, None)
    assert request.voice.duration_s == 6.0


def test_a_voice_clone_tells_of_the_voice_and_speaks_a_sample_when_no_text_is_given(
    worker: Worker, engine: Any, reference: str
) -> None:
    result = run(worker, operation="voice_clone", reference_audio=reference, voice_name="Ann")
    assert result["voice"] == result["voice_info"]["name"] == "Ann"
    assert result["voice_info"]["duration_s"] == 6.0
    assert result["sample_audio"] == result["audio"]
    assert "sample" in engine.requests[0].text
    spoken = run(worker, operation="voice_clone", reference_audio=reference, text="Hello")
    assert "sample_audio" not in spoken
    assert spoken["voice"] == "reference"


def test_info_says_what_this_worker_is(worker: Worker) -> None:
    result = run(worker, operation="info")
    assert (result["model"], result["device"], result["engine"]["rows"]) == ("tone", "cpu", 1)
    assert result["limits"]["max_text_chars"] == 5_000
    assert {"worker-chatterbox", "python", "torch", "chatterbox-tts", "runpod"} <= set(result["versions"])
    json.dumps(result)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"text": ""}, "text_empty", "text"),
        ({"text": " \n\t "}, "text_empty", "text"),
        ({"text": "😀🎉"}, "text_empty", "text"),
        ({"text": "\x00\x07\x1b"}, "text_empty", "text"),
        ({"text": "a" * 5_001}, "text_too_long", "text"),
        ({"text": "Hello", "colour": 1}, "invalid_request", "colour"),
        ({"text": 7}, "invalid_request", "text"),
        ({"text": "Hello", "temperature": True}, "invalid_request", "temperature"),
        ({"text": "Hello", "temperature": float("nan")}, "invalid_request", "temperature"),
        ({"text": "Hello", "temperature": 99}, "invalid_request", "temperature"),
        ({"text": "Hello", "language": "xx"}, "language_unsupported", "language"),
        ({"text": "Hello", "language": ""}, "language_unsupported", "language"),
        ({"text": "Hello", "voice_id": "v1"}, "voice_not_found", "voice_id"),
        ({"text": "Hello", "voice_name": "ann"}, "voice_not_found", "voice_name"),
        ({"text": "Hello", "reference_audio": "%%%"}, "reference_unreadable", "reference_audio"),
        ({"text": "Hello", "reference_audio": "aGVsbG8="}, "reference_unreadable", "reference_audio"),
        ({"text": "Hello", "reference_audio": "https://x.test/a.wav"}, "download_refused", "reference_audio"),
        ({"text": "Hello", "reference_audio": "file:/etc/passwd"}, "download_refused", "reference_audio"),
    ],
)
def test_bad_input_gets_its_code_and_nothing_else_happens(
    worker: Worker, engine: Any, fields: dict[str, Any], code: str, field: str
) -> None:
    result = run(worker, **fields)
    assert set(result) == {"error", "error_code", "field"}
    assert (result["error_code"], result["field"]) == (code, field)
    assert engine.requests == []


def test_a_rate_that_a_format_cannot_hold_is_refused_before_anything_is_spoken(worker: Worker, engine: Any) -> None:
    result = run(worker, text="Hello", output_format="opus", sample_rate=44_100)
    assert (result["error_code"], result["field"]) == ("invalid_request", "sample_rate")
    assert engine.requests == []


def test_a_loudness_that_would_clip_is_a_warning_with_what_was_reached(worker: Worker) -> None:
    result = run(worker, text="Hello there, " * 10, loudness_lufs=-1)
    assert "would clip" in result["warnings"][0]


@pytest.mark.parametrize(
    ("duration_s", "scale", "code"),
    [(0.3, 1.0, "reference_too_short"), (6, 0.0, "reference_silent"), (7_200, 1.0, "reference_too_long")],
)
def test_a_recording_of_no_use_gets_its_code(
    worker: Worker, engine: Any, duration_s: float, scale: float, code: str
) -> None:
    import numpy as np

    buffer = io.BytesIO()
    rate = 8_000
    wave = (scale * np.sin(np.arange(int(duration_s * rate)) / 20)).astype(np.float32)
    soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
    result = run(worker, text="Hello", reference_audio=base64.b64encode(buffer.getvalue()).decode())
    assert (result["error_code"], result["field"]) == (code, "reference_audio")
    assert engine.requests == []


def test_text_of_exactly_the_limit_is_spoken(worker: Worker) -> None:
    assert "error" not in run(worker, text="a" * 5_000)


def test_warnings_of_input_and_engine_each_come_once(worker: Worker) -> None:
    result = run(worker, text="Hello", speed=2, mode="streaming", streaming=True, exaggeration=0.7)
    assert len(result["warnings"]) == len(set(result["warnings"])) == 4
    assert "tone has no such parameter" in result["warnings"]


def test_a_result_over_the_limit_is_refused_with_the_way_out(engine: Any, settings: Settings) -> None:
    small = Worker(engine, settings.model_copy(update={"max_result_bytes": 20_000}))
    result = run(small, text="Hello there, " * 20)
    assert result["error_code"] == "result_too_large"
    assert "opus" in result["error"]
    unlimited = Worker(engine, settings.model_copy(update={"max_result_bytes": 0}))
    assert "error" not in run(unlimited, text="Hello there, " * 20)


def test_the_default_voice_is_an_error_while_there_is_no_library(engine: Any, settings: Settings) -> None:
    worker = Worker(engine, settings.model_copy(update={"default_voice": "ann"}))
    assert run(worker, text="Hello")["error_code"] == "voice_not_found"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpeechError("generation_failed", "no end found"), "generation_failed"),
        (MemoryError(), "out_of_memory"),
        (ZeroDivisionError("bug"), "internal"),
    ],
)
def test_an_engines_failure_is_its_jobs_failure_and_not_the_next_ones(
    error: Exception, code: str, make_engine: Callable[..., Any], settings: Settings
) -> None:
    worker = Worker(make_engine(lambda request, future: future.set_exception(error)), settings)
    assert run(worker, text="Hello")["error_code"] == code
    assert run(worker, operation="info")["model"] == "tone"


def test_a_cancelled_job_frees_the_engine_and_leaves_the_one_beside_it_alone(
    make_engine: Callable[..., Any], settings: Settings
) -> None:
    def answer(request: SpeechRequest, future: Future[Speech]) -> None:
        if request.text != "endless":
            engine.finish(request, future)

    engine = make_engine(answer)
    worker = Worker(engine, settings)

    async def scenario() -> dict[str, Any]:
        endless = asyncio.create_task(worker.run({"input": {"text": "endless"}}))
        beside = asyncio.create_task(worker.run({"input": {"text": "Hello"}}))
        while len(engine.futures) < 2:
            await asyncio.sleep(0)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        return await beside

    assert "error" not in asyncio.run(scenario())
    assert engine.futures[0].cancelled()


def test_a_job_that_the_engine_gives_up_is_cancelled_in_words(
    make_engine: Callable[..., Any], settings: Settings
) -> None:
    worker = Worker(make_engine(lambda request, future: future.cancel()), settings)
    assert run(worker, text="Hello")["error_code"] == "cancelled"


def test_a_job_past_its_time_is_timed_out_and_frees_the_engine(
    make_engine: Callable[..., Any], settings: Settings
) -> None:
    engine = make_engine(lambda request, future: None)
    worker = Worker(engine, settings.model_copy(update={"job_timeout_s": 0.05}))
    assert run(worker, text="Hello")["error_code"] == "timed_out"
    assert engine.futures[0].cancelled()


def test_an_unknown_model_does_not_load(settings: Settings) -> None:
    with pytest.raises(SpeechError) as caught:
        load_engine(settings.model_copy(update={"model": "turbot"}))
    assert caught.value.code == "model_unavailable"


def test_a_download_draws_a_bar_and_ready_weights_draw_none(capsys: pytest.CaptureFixture[str]) -> None:
    with download_progress("nano", shown=True):
        pass
    assert capsys.readouterr().err == ""
    with download_progress("nano", shown=True) as progress:
        assert progress is not None
        progress(5, 10)
    assert "nano" in capsys.readouterr().err
    with download_progress("nano", shown=False) as progress:
        assert progress is None


def test_a_worker_without_its_model_answers_with_the_reason_and_asks_to_be_replaced() -> None:
    result = run(BrokenWorker(SpeechError("weights_missing", "no t3", "model")), text="Hello")
    assert (result["error_code"], result["refresh_worker"]) == ("weights_missing", True)


def test_every_operation_has_a_schema() -> None:
    from jobs.schema import INPUT_MODELS

    assert set(OPERATIONS) == set(INPUT_MODELS)
