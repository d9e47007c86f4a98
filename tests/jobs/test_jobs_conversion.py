"""A recording in another voice, as a job: what it takes, what it gives, and what each bad one is told."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import soundfile

from engine.errors import SpeechError
from engine.types import ConversionRequest, Speech
from jobs.errors import JobError
from jobs.schema import VoiceConversion, parse_job
from jobs.settings import Settings
from jobs.worker import Worker

Recording = Callable[..., bytes]


def run(worker: Worker, **fields: Any) -> dict[str, Any]:
    return asyncio.run(worker.run({"id": "1", "input": {"operation": "voice_conversion"} | fields}))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def clip(recording: Recording) -> str:
    """Two seconds at 16 kHz."""
    return encoded(recording(rate=16_000, duration_s=2))


def refusal(**fields: object) -> JobError:
    with pytest.raises(JobError) as caught:
        parse_job({"input": {"operation": "voice_conversion", "input_audio": "AAAA"} | fields})
    return caught.value


def test_the_result_is_that_of_speech_and_as_long_as_the_recording(
    worker: Worker, engine: Any, clip: str, reference: str
) -> None:
    result = run(worker, input_audio=clip, target_audio=reference, seed=4)
    spoken = asyncio.run(worker.run({"id": "2", "input": {"text": "Hello"}}))
    assert set(result) == set(spoken)
    assert set(result["timings"]) == set(spoken["timings"])
    assert (result["duration_s"], result["seed"], result["voice"]) == (2.0, 4, "reference")
    assert (result["watermarked"], result["warnings"]) == (True, [])
    assert result["chunks"] == [{"index": 0, "text": "", "start_s": 0.0, "end_s": 2.0, "attempts": 1, "flags": []}]
    (request,) = engine.conversions
    assert (request.sample_rate, request.duration_s, request.voice.duration_s, request.seed) == (16_000, 2.0, 6.0, 4)


def test_without_a_target_the_models_own_voice_speaks(worker: Worker, engine: Any, clip: str) -> None:
    assert run(worker, input_audio=clip)["voice"] == "built-in"
    assert engine.conversions[0].voice is None


@pytest.mark.parametrize("operation", ["voice_conversion", "voice_transfer"])
@pytest.mark.parametrize("mode", [None, "embedding", "audio"])
@pytest.mark.parametrize("target", ["target_audio", "target_speaker"])
def test_other_workers_names_for_it_are_understood(operation: str, mode: str | None, target: str) -> None:
    fields = {"operation": operation, "transfer_mode": mode, "input_audio": "AAAA", target: "BBBB"}
    parsed = parse_job({"input": fields | {"conversion_strength": 0.7}})
    assert isinstance(parsed.request, VoiceConversion)
    assert (parsed.request.input_audio, parsed.request.target_audio) == ("AAAA", "BBBB")
    assert [warning.split()[0] for warning in parsed.warnings] == ["conversion_strength"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input_audio": None}, "input_audio"),
        ({"input_audio": 3}, "input_audio"),
        ({"target_audio": {"url": "x"}}, "target_audio"),
        ({"target_audio": "AAAA", "target_speaker": "AAAA"}, "target_speaker"),
        ({"target_audio": "AAAA", "voice_id": "v"}, "target_audio"),
        ({"voice_name": "ann", "voice_id": "v"}, "voice_name"),
        ({"transfer_mode": "magic"}, "transfer_mode"),
        ({"text": "Hello"}, "text"),
        ({"temperature": 0.5}, "temperature"),
        ({"inputaudio": "AAAA"}, "inputaudio"),
        ({"seed": -1}, "seed"),
        ({"loudness_lufs": -20, "audio_normalization": "peak"}, "loudness_lufs"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    error = refusal(**fields)
    assert (error.code, error.field) == ("invalid_request", field)


def test_audio_comes_in_the_format_rate_and_level_asked_for(worker: Worker, clip: str) -> None:
    result = run(worker, input_audio=clip, output_format="flac", sample_rate=48_000, audio_normalization="peak")
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(result["audio"])))
    assert (result["format"], rate, audio.size) == ("flac", 48_000, 96_000)
    assert np.abs(audio).max() == pytest.approx(10 ** (-1 / 20), abs=1e-3)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        ({"duration_s": 0.05}, "reference_too_short"),
        ({"duration_s": 61, "rate": 8_000}, "reference_too_long"),
        ({"duration_s": 3_600, "rate": 8_000, "file_format": "FLAC"}, "reference_too_long"),
        ({"channels": 9, "duration_s": 1}, "reference_unreadable"),
    ],
)
def test_a_recording_of_no_use_gets_its_code_before_anything_is_spoken(
    engine: Any, settings: Settings, recording: Recording, make: dict[str, Any], code: str
) -> None:
    worker = Worker(engine, settings.model_copy(update={"max_input_s": 60.0}))
    result = run(worker, input_audio=encoded(recording(**make)))
    assert (result["error_code"], result["field"]) == (code, "input_audio")
    assert engine.conversions == []
    assert "error" not in run(worker, input_audio=encoded(recording(duration_s=60, rate=8_000)))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("%%%", "reference_unreadable"),
        ("", "reference_unreadable"),
        ("aGVsbG8=", "reference_unreadable"),
        ("file:/etc/passwd", "download_refused"),
        ("ftp://x.test/a.wav", "download_refused"),
        ("A" * 4_000_000, "reference_too_long"),
    ],
)
@pytest.mark.parametrize("field", ["input_audio", "target_audio"])
def test_what_is_no_recording_gets_its_code_and_the_name_of_its_field(
    engine: Any, settings: Settings, clip: str, source: str, code: str, field: str
) -> None:
    worker = Worker(engine, settings.model_copy(update={"max_reference_bytes": 2_000_000}))
    result = run(worker, **({"input_audio": clip} | {field: source}))
    assert (result["error_code"], result["field"]) == (code, field)
    assert engine.conversions == []


def test_a_result_that_is_surely_too_large_is_refused_with_the_way_out_before_anything_is_done(
    engine: Any, settings: Settings, recording: Recording
) -> None:
    worker = Worker(engine, settings.model_copy(update={"max_result_bytes": 500_000}))
    long = encoded(recording(rate=8_000, duration_s=10))  # 0.64 MB of wav at 24 kHz, as base64
    result = run(worker, input_audio=long, target_audio="%%%")  # refused first
    assert (result["error_code"], result["field"]) == ("result_too_large", "output_format")
    assert "opus or mp3" in result["error"] and engine.conversions == []
    for fields in ({"output_format": "opus"}, {"output_format": "mp3"}, {"sample_rate": 16_000}):
        assert "error" not in run(worker, input_audio=long, **fields)


def test_silence_is_nothing_to_convert(worker: Worker) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(32_000, np.float32), 16_000, format="WAV")
    result = run(worker, input_audio=encoded(buffer.getvalue()))
    assert (result["error_code"], result["field"]) == ("reference_silent", "input_audio")


@pytest.mark.parametrize(
    ("engines", "jobs"), [("audio", "input_audio"), ("reference_audio", "target_audio"), ("seed", "seed")]
)
def test_what_the_engine_refuses_is_told_in_the_jobs_own_names(
    worker: Worker, engine: Any, clip: str, reference: str, engines: str, jobs: str
) -> None:
    def refuse(_: ConversionRequest) -> Future[Speech]:
        raise SpeechError("reference_too_short", "more is needed", engines)

    engine.submit_conversion = refuse
    result = run(worker, input_audio=clip, target_audio=reference)
    assert (result["error_code"], result["field"]) == ("reference_too_short", jobs)


def test_a_cancelled_conversion_frees_the_engine(worker: Worker, engine: Any, clip: str) -> None:
    engine.converts = False

    async def scenario() -> None:
        job = asyncio.create_task(worker.run({"input": {"operation": "voice_conversion", "input_audio": clip}}))
        while not engine.futures:
            await asyncio.sleep(0.001)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(scenario())
    assert engine.futures[0].cancelled()


def test_the_draft_voice_converts_too_and_takes_the_targets_pitch(
    settings: Settings, recording: Recording, clip: str
) -> None:
    from engine.audio.pitch import median_f0

    with_draft = Worker.load(settings.model_copy(update={"model": "draft"}))
    target = encoded(recording(duration_s=3))
    result = run(with_draft, input_audio=clip, target_audio=target, seed=6)
    assert (result.get("error"), result["model"], result["seed"]) == (None, "draft", 6)
    assert result["watermarked"] and result["duration_s"] == pytest.approx(2.0, abs=0.01)
    own = run(with_draft, input_audio=clip)
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(own["audio"])), dtype="float32")
    assert median_f0(audio, rate) == pytest.approx(106, rel=0.08)
    with_draft.close()
