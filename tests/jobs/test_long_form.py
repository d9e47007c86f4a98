"""Long texts and segments as jobs: what is said by whom and when, what is kept, and what each bad one is told."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest
import soundfile

from engine.audio.pitch import median_f0
from engine.stream import SpeechStream
from engine.types import Chunk, FloatArray, Speech, SpeechRequest
from engine.work import WorkStore
from jobs import long_form, spool
from jobs.long_form import duration_text
from jobs.schema import LongForm
from jobs.settings import Settings
from jobs.spool import Spool
from jobs.work import Work
from jobs.worker import Worker
from tests.jobs.conftest import RATE, ToneEngine, tone
from tests.jobs.voice_support import Draft, MakeWorker, recorded, run, save
from voice_library.folder_store import FolderStore

NOTHING = np.zeros(0, np.float32)
PASSAGE = "It was a bright cold day in April. The clocks were striking thirteen. Nobody looked up at all."


class Scripted(ToneEngine):
    """Gives so many seconds of a tone, a chunk each, and then ends or, if it is endless, goes on for ever."""

    def __init__(self, num_pieces: int, *, endless: bool = False, keeps: bool = False) -> None:
        super().__init__()
        self._num_pieces, self._endless, self._keeps = num_pieces, endless, keeps

    def stream(self, request: SpeechRequest, *, early: bool = True, work: WorkStore | None = None) -> SpeechStream:
        assert not early
        future: Future[Speech] = Future()
        self.requests.append(request)
        self.futures.append(future)
        stream = SpeechStream(future)
        num_chunks = 1_935 if self._endless else self._num_pieces
        for number in range(self._num_pieces):
            if work is not None and self._keeps:
                work.put(f"audio/{number}", b"spoken")
            stream.put_audio(tone(1.0), RATE, number + 1, num_chunks)
        if not self._endless:
            chunks = tuple(Chunk(n, "One second.", float(n), n + 1.0) for n in range(self._num_pieces))
            future.set_result(Speech(NOTHING, RATE, chunks, request.known_seed, "tone", watermarked=True))
        return stream


class Stalling(FolderStore):
    """Is asked for audio, and does not answer before it may."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_go_on = threading.Event()

    def read(self, key: str, max_bytes: int) -> bytes | None:
        if key.startswith("audio/"):
            self.may_go_on.wait(60)
        return super().read(key, max_bytes)


def long(worker: Worker, **fields: Any) -> dict[str, Any]:
    return run(worker, operation="long_form", **fields)


def decoded(result: dict[str, Any]) -> tuple[FloatArray, int]:
    assert "error" not in result, result
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(result["audio"])), dtype="float32")
    return audio, rate


def span(audio: FloatArray, start_s: float, end_s: float) -> FloatArray:
    return audio[round(start_s * RATE) : round(end_s * RATE)]


def num_nameless_files() -> int:
    """Open files of this process that have no name."""
    num = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            num += "(deleted)" in str(link.readlink())
        except OSError:
            continue
    return num


@pytest.fixture
def plain(settings: Settings) -> Settings:
    """Without the limit of a platform."""
    return settings.model_copy(update={"max_result_bytes": 0, "job_timeout_s": 0.0})


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(FolderStore(tmp_path / "checkpoints"), max_age_s=3_600.0, max_bytes=1 << 30)


@pytest.fixture(scope="module")
def draft() -> Draft:
    return Draft.make()


@pytest.fixture
def speaker(draft: Draft, plain: Settings) -> Worker:
    """The draft voice, without a library."""
    return Worker(draft, plain)


# ---------------------------------------------------------------------------------- what is said


def test_segments_are_said_in_order_each_in_its_voice_with_its_pause_behind_it(make_worker: MakeWorker) -> None:
    worker = make_worker(max_result_bytes=0)
    for name, pitch_hz in (("Anna", 210.0), ("Ben", 90.0)):
        assert "error" not in save(worker, name, pitch_hz)
    segments = [
        {"text": "Good morning, said the first of the two.", "pause_after_s": 1.5},
        {"text": "Good evening, said the other one then.", "voice_name": "Ben", "pause_after_s": 0},
        {"text": "Bonjour tout le monde, dit la voix.", "language": "fr", "pause_after_s": 0.75},
        {"text": "And so it ended, said the second again.", "voice_name": "Ben", "pause_after_s": 2},
    ]
    result = long(worker, segments=segments, voice_name="Anna", subtitles="srt")
    audio, _ = decoded(result)
    chunks = result["chunks"]
    assert [chunk["text"] for chunk in chunks] == [segment["text"] for segment in segments]
    assert result["voice"] == "Anna, Ben"
    for chunk, pitch_hz in zip(chunks, (210.0, 90.0, 210.0, 90.0), strict=True):
        said = span(audio, chunk["start_s"], chunk["end_s"])
        assert median_f0(said, RATE) == pytest.approx(pitch_hz, rel=0.12)
    ends = [*(chunk["start_s"] for chunk in chunks[1:]), result["duration_s"]]
    for chunk, end_s, segment in zip(chunks, ends, segments, strict=True):
        assert end_s - chunk["end_s"] == pytest.approx(segment["pause_after_s"], abs=1e-3)
        assert not span(audio, chunk["end_s"] + 1e-3, end_s - 1e-3).any()
    assert audio.size == pytest.approx(result["duration_s"] * RATE, abs=2)


def test_subtitles_say_the_text_while_it_is_said(speaker: Worker) -> None:
    result = long(speaker, segments=[{"text": PASSAGE, "pause_after_s": 3}, {"text": PASSAGE}], subtitles="srt")
    cues = re.findall(r"(\d+:\d+:\d+,\d+) --> (\d+:\d+:\d+,\d+)\n(.+?)(?:\n\n|\Z)", result["subtitles"], re.DOTALL)
    assert " ".join(" ".join(text for *_, text in cues).split()) == f"{PASSAGE} {PASSAGE}"
    first, second = result["chunks"][0], result["chunks"][-1]
    for start, end, _ in cues:
        start_s, end_s = (sum(float(p) * s for p, s in zip(re.split("[:,]", t), (3600, 60, 1, 1e-3), strict=True))
                          for t in (start, end))  # fmt: skip
        inside = [c for c in result["chunks"] if c["start_s"] - 0.002 <= start_s and end_s <= c["end_s"] + 1.0]
        assert inside and (end_s <= first["end_s"] + 3 or start_s >= second["start_s"] - 0.002)


def test_the_audio_is_that_of_the_same_text_spoken_in_one_go(speaker: Worker) -> None:
    for fields in ({}, {"audio_normalization": "peak"}, {"loudness_lufs": -20.0}, {"sample_rate": 16_000}):
        whole, _ = decoded(run(speaker, text=PASSAGE * 5, output_format="flac", **fields))
        pieces, _ = decoded(long(speaker, text=PASSAGE * 5, output_format="flac", **fields))
        assert pieces.size == whole.size
        assert np.abs(pieces - whole).max() <= 2 / 32_768


@pytest.mark.parametrize("audio_format", ["wav", "flac", "mp3", "opus"])
@pytest.mark.parametrize("level", [{}, {"audio_normalization": "rms", "sample_rate": 48_000}])
def test_every_format_decodes_to_what_was_said_and_bears_its_title(
    speaker: Worker, audio_format: str, level: dict[str, Any]
) -> None:
    result = long(speaker, text=PASSAGE * 3, output_format=audio_format, title="Über alles", **level)
    audio, rate = decoded(result)
    assert (result["format"], rate) == (audio_format, level.get("sample_rate", RATE))
    assert audio.size / rate == pytest.approx(result["duration_s"], abs=0.15)
    data = base64.b64decode(result["audio"])
    if audio_format == "mp3":
        assert "Über alles".encode("utf-16-le") in data[:200]
    else:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            assert file.title == "Über alles"


def test_the_loudness_asked_for_is_reached(speaker: Worker) -> None:
    result = long(speaker, text=PASSAGE * 8, audio_normalization="loudness", output_format="flac")
    audio, rate = decoded(result)
    assert pyloudnorm.Meter(rate).integrated_loudness(audio.astype(np.float64)) == pytest.approx(-16.0, abs=0.5)
    assert result["warnings"] == []


def test_a_loudness_that_cannot_be_reached_is_a_warning_with_what_was(plain: Settings) -> None:
    result = long(Worker(Scripted(5), plain), text="One.", loudness_lufs=-1)
    assert "the audio has" in result["warnings"][0]


def test_the_result_is_that_of_tts_with_subtitles_where_they_are_asked_for(speaker: Worker) -> None:
    spoken, plain, titled = (
        run(speaker, text="One."),
        long(speaker, text="One."),
        long(speaker, text="One.", subtitles="vtt"),
    )
    assert set(plain) == set(spoken) and set(plain["timings"]) == set(spoken["timings"])
    assert set(titled) == {*spoken, "subtitles"} and titled["subtitles"].startswith("WEBVTT")


def test_tts_and_voice_clone_give_subtitles_and_take_a_title_and_pronunciations_too(
    worker: Worker, engine: Any, reference: str
) -> None:
    more = {"subtitles": "srt", "title": "Title", "pronunciations": {"SQL": "sequel"}}
    for fields in ({"text": "SQL."}, {"operation": "voice_clone", "reference_audio": reference, "text": "SQL."}):
        result = run(worker, **fields, **more)
        assert "00:00:00,000 --> " in result["subtitles"]
        with soundfile.SoundFile(io.BytesIO(base64.b64decode(result["audio"]))) as file:
            assert file.title == "Title"
    assert [dict(request.pronunciations) for request in engine.requests] == [{"SQL": "sequel"}] * 2


def test_pronunciations_and_parameters_reach_the_engine(plain: Settings) -> None:
    engine = Scripted(1)
    long(Worker(engine, plain), text="SQL.", pronunciations={"SQL": "sequel"}, temperature=0.5, language="FR")
    (request,) = engine.requests
    assert (dict(request.pronunciations), request.temperature, request.language) == ({"SQL": "sequel"}, 0.5, "fr")


def test_a_job_without_a_seed_has_the_same_one_each_time(plain: Settings) -> None:
    engine = Scripted(1)
    worker = Worker(engine, plain)
    assert long(worker, text="One.")["seed"] == long(worker, text="One.")["seed"] == long_form.DEFAULT_SEED
    assert long(worker, text="One.", seed=8)["seed"] == 8


def test_a_streaming_worker_gives_it_in_pieces_and_keeps_its_work_too(plain: Settings, work: Work) -> None:
    class Recorded(Draft):
        def stream(self, request: SpeechRequest, *, early: bool = True, work: WorkStore | None = None) -> SpeechStream:
            assert early and work is not None
            return super().stream(request, work=work)

    async def pieces() -> list[dict[str, Any]]:
        job = {"input": {"operation": "long_form", "segments": [{"text": PASSAGE}] * 3, "output_format": "pcm"}}
        return [piece async for piece in Worker(Recorded.make(), plain, work=work).stream(job)]

    streamed = asyncio.run(pieces())
    last = streamed[-1]
    assert len(streamed) > 1 and last["final"]
    assert " ".join(chunk["text"] for chunk in last["chunks"]) == " ".join([PASSAGE] * 3)
    num_bytes = sum(len(base64.b64decode(piece["audio"])) for piece in streamed)
    assert num_bytes == pytest.approx(last["duration_s"] * RATE * 2, abs=4)


# ---------------------------------------------------------------------------------- who says it


def test_a_recording_is_listened_to_once_however_many_segments_name_it(settings: Settings) -> None:
    engine = Draft.make()
    worker = Worker(engine, settings.model_copy(update={"max_result_bytes": 0}))
    anna, ben = recorded(200.0), recorded(95.0)
    segments = [{"text": "One.", "reference_audio": voice} for voice in (anna, ben, anna, ben, anna)]
    assert long(worker, segments=segments)["voice"] == "reference"
    assert engine.num_embedded == 2


def test_the_jobs_voice_is_not_looked_for_where_every_segment_has_its_own(speaker: Worker) -> None:
    segments = [{"text": "One.", "reference_audio": recorded()}]
    assert "error" not in long(speaker, segments=segments, voice_name="nobody")
    result = long(speaker, segments=[*segments, {"text": "Two."}], voice_name="nobody")
    assert (result["error_code"], result["field"]) == ("voice_not_found", "voice_name")


def test_more_recordings_than_may_be_are_refused_by_the_name_of_the_first_too_many(
    speaker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_form, "MAX_RECORDINGS", 2)
    first, second, third = (recorded(pitch_hz) for pitch_hz in (100.0, 120.0, 140.0))
    segments = [{"text": "One.", "reference_audio": voice} for voice in (first, second, first, third)]
    result = long(speaker, segments=segments)
    assert (result["error_code"], result["field"]) == ("invalid_request", "segments[3].reference_audio")
    assert "error" not in long(speaker, segments=segments[:3])


GOOD = {"text": "One."}


@pytest.mark.parametrize(
    ("segment", "code", "field"),
    [
        ({"text": "Two.", "voicename": "x"}, "invalid_request", "voicename"),
        ({"text": 2}, "invalid_request", "text"),
        ({"text": "Two.", "pause_after_s": 61}, "invalid_request", "pause_after_s"),
        ({"text": "Two.", "pause_after_s": True}, "invalid_request", "pause_after_s"),
        ({"text": "Two.", "voice_id": "a", "voice_name": "b"}, "invalid_request", "voice_name"),
        ({"text": "Two \ud800."}, "invalid_request", "text"),
        ({"text": "Two <break/>."}, "invalid_request", "text"),
        ({"text": "Two [pause 99s]."}, "invalid_request", "text"),
        ({"text": " 😀 "}, "text_empty", "text"),
        ({"text": "Two.", "language": "xx"}, "language_unsupported", "language"),
        ({"text": "Two.", "voice_id": "anna"}, "voice_not_found", "voice_id"),
        ({"text": "Two.", "voice_name": "Anna"}, "voice_not_found", "voice_name"),
        ({"text": "Two.", "reference_audio": "%%%"}, "reference_unreadable", "reference_audio"),
        ({"text": "Two.", "reference_audio": "file:/etc/passwd"}, "download_refused", "reference_audio"),
        ({"text": "Two.", "reference_audio": recorded(duration_s=0.5)}, "reference_too_short", "reference_audio"),
    ],
)
def test_a_bad_segment_is_refused_by_name_before_anything_is_said(
    plain: Settings, segment: dict[str, Any], code: str, field: str
) -> None:
    engine = Scripted(1)
    result = long(Worker(engine, plain), segments=[GOOD, segment, GOOD])
    assert (result["error_code"], result["field"]) == (code, f"segments[1].{field}")
    assert f"segments[1].{field}" in result["error"] and "expected expected" not in result["error"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({}, "invalid_request", "text"),
        ({"text": "One.", "segments": [GOOD]}, "invalid_request", "text"),
        ({"segments": []}, "invalid_request", "segments"),
        ({"segments": [GOOD] * 10_001}, "invalid_request", "segments"),
        ({"segments": {"text": "One."}}, "invalid_request", "segments"),
        ({"segments": [GOOD, "Two."]}, "invalid_request", "segments[1]"),
        ({"text": "x" * 501}, "text_too_long", "text"),
        ({"segments": [{"text": "x" * 251}] * 2}, "text_too_long", "segments"),
        ({"segments": [GOOD | {"pause_after_s": 60}] * 24 * 61}, "text_too_long", "segments"),
        ({"text": "One.", "title": "x" * 201}, "invalid_request", "title"),
        ({"text": "One.", "subtitles": "ass"}, "invalid_request", "subtitles"),
        ({"text": "One.", "pronunciations": {"SQL": 1}}, "invalid_request", "pronunciations"),
        ({"text": "One.", "sample_rate": 44_100, "output_format": "opus"}, "invalid_request", "sample_rate"),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is(
    plain: Settings, fields: dict[str, Any], code: str, field: str
) -> None:
    engine = Scripted(1)
    limits = {"max_long_form_chars": 500 if code == "text_too_long" and "x" in str(fields) else 500_000}
    result = long(Worker(engine, plain.model_copy(update=limits)), **fields)
    assert (result["error_code"], result["field"]) == (code, field)
    assert engine.requests == []


def test_what_is_too_long_for_tts_is_told_of_long_form(worker: Worker) -> None:
    result = run(worker, text="a" * 5_001)
    assert result["error_code"] == "text_too_long" and "long_form takes up to 500,000" in result["error"]


# ---------------------------------------------------------------------------------- how far it came


def timed_out(engine: ToneEngine, settings: Settings, work: Work | None = None) -> str:
    """What a job is told whose time ends."""
    worker = Worker(engine, settings.model_copy(update={"job_timeout_s": 0.4}), work=work)
    result = long(worker, text="One.")
    assert result["error_code"] == "timed_out"
    assert engine.futures[0].cancelled()
    message: str = result["error"]
    return message


def test_a_job_whose_time_ends_says_how_far_it_came_and_what_sending_it_again_gains(
    settings: Settings, work: Work
) -> None:
    far = "JOB_TIMEOUT_S (0.4 s): 3 of 1,935 chunks, 3 s of audio are done; "
    assert timed_out(Scripted(3, endless=True, keeps=True), settings, work).endswith(
        far + "the same job sent again goes on from there"
    )
    message = timed_out(Scripted(3, endless=True), settings, work)
    assert far in message and message.endswith("the same job sent again starts anew")
    message = timed_out(Scripted(3, endless=True), settings)
    assert far in message and "starts anew" in message and "WORK_DIR is not set" in message
    assert "no audio is done yet" in timed_out(Scripted(0, endless=True), settings)


def test_a_job_whose_time_ends_while_it_is_encoded_says_so(
    settings: Settings, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def master_for_ever(_: Spool) -> bool:
        time.sleep(0.05)
        return True

    monkeypatch.setattr(Spool, "master", master_for_ever)
    worker = Worker(Scripted(2, keeps=True), settings.model_copy(update={"job_timeout_s": 0.4}), work=work)
    result = long(worker, text="One.", audio_normalization="peak")
    assert "all 2 chunks are spoken, 2 s of audio, and were being encoded; sent again, it need" in result["error"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (5520, "1 h 32 min")]
)
def test_durations_are_told_as_people_tell_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("level", [None, "peak"])
def test_a_cancelled_job_frees_the_engine_and_its_files(plain: Settings, level: str | None) -> None:
    engine = Scripted(3, endless=True)
    worker = Worker(engine, plain)
    num_before = num_nameless_files()
    told: list[dict[str, Any]] = []

    async def scenario() -> None:
        fields = {"operation": "long_form", "text": "One.", "audio_normalization": level}
        job = asyncio.create_task(worker.run({"input": fields}, told.append))
        while not told:
            await asyncio.sleep(0.001)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(scenario())
    assert engine.futures[0].cancelled()
    while num_nameless_files() > num_before:
        time.sleep(0.005)


def test_the_platform_is_told_once_a_second_and_at_the_end(plain: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(every_s: float) -> list[dict[str, Any]]:
        monkeypatch.setattr(long_form, "_REPORT_EVERY_S", every_s)
        reports: list[dict[str, Any]] = []
        job = {"input": {"operation": "long_form", "text": "One."}}
        assert "error" not in asyncio.run(Worker(Scripted(4), plain).run(job, reports.append))
        return reports

    assert [report["chunks_done"] for report in told(0.0)] == [1, 2, 3, 4, 4]
    first, last = told(60.0)
    assert (first["chunks_done"], first["chunks"], first["audio_s"]) == (1, 4, 1.0)
    assert (last["chunks_done"], last["chunks"], last["audio_s"]) == (4, 4, 4.0)
    assert 0 <= first["elapsed_s"] <= last["elapsed_s"]


def test_checkpoints_that_could_not_be_kept_are_a_warning(plain: Settings, tmp_path: Path) -> None:
    (tmp_path / "place").write_text("in the way")
    work = Work(FolderStore(tmp_path / "place" / "x"), max_age_s=3_600.0, max_bytes=1 << 30)
    (warning,) = long(Worker(Scripted(3, keeps=True), plain, work=work), text="One.")["warnings"]
    assert "3 checkpoints could not be kept" in warning


def test_a_job_that_was_broken_off_goes_on_in_another_worker_and_gives_the_same_audio(
    plain: Settings, tmp_path: Path
) -> None:
    from engine import Engine, EngineConfig
    from engine.random_checkpoint import PlantedSpeech, write_checkpoint

    weights = write_checkpoint(tmp_path / "weights", "turbo", plan=PlantedSpeech(tokens=tuple(range(100, 140))))
    config = EngineConfig(model="turbo", model_dir=weights, device="cpu", num_threads=1, max_rows=2, watermark=False)
    folder = tmp_path / "work" / "checkpoints"
    fields = {"segments": [{"text": f"This is sentence number {number}."} for number in range(4)]}

    def kept() -> dict[str, int]:
        entries = FolderStore(folder).list("")
        return {entry.key: os.stat(folder / entry.key).st_mtime_ns for entry in entries if entry.key[:3] != "tmp"}

    def speak(engine: Engine, store: FolderStore | None, **more: Any) -> dict[str, Any]:
        work = None if store is None else Work(store, max_age_s=3_600.0, max_bytes=1 << 30)
        job = {"input": {"operation": "long_form", **fields, **more}}

        async def scenario() -> dict[str, Any]:
            running = asyncio.create_task(Worker(engine, plain, work=work).run(job))
            if isinstance(store, Stalling):
                while not kept():
                    await asyncio.sleep(0.001)
                running.cancel()
                store.may_go_on.set()
            return await running

        return asyncio.run(scenario())

    with Engine.load(config) as first:
        undisturbed = speak(first, None)
        with pytest.raises(asyncio.CancelledError):
            speak(first, Stalling(folder))
    before = kept()
    with Engine.load(config) as second:
        resumed = speak(second, FolderStore(folder))
        after = kept()
        assert "error" not in speak(second, FolderStore(folder), output_format="opus")
    assert resumed["chunks"] == undisturbed["chunks"]
    np.testing.assert_allclose(decoded(resumed)[0], decoded(undisturbed)[0], atol=2**-15)
    assert len(before) < len(after) and before.items() <= after.items()
    assert kept() == after


# ---------------------------------------------------------------------------------- what is too much


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_audio_that_is_surely_too_large_stops_while_it_is_said(
    settings: Settings, work: Work, audio_format: str
) -> None:
    small = settings.model_copy(update={"max_result_bytes": 100_000, "job_timeout_s": 10.0})
    engine = Scripted(40, endless=True, keeps=True)  # which would never come to its end
    result = long(Worker(engine, small, work=work), text="One.", output_format=audio_format)
    assert (result["error_code"], result["field"]) == ("result_too_large", "output_format")
    assert "kept in WORK_DIR" in result["error"] and "opus" in result["error"]
    assert engine.futures[0].cancelled()
    forgetful = long(Worker(Scripted(40, endless=True), small), text="One.", output_format=audio_format)
    assert "opus or mp3" in forgetful["error"] and "WORK_DIR" not in forgetful["error"]


def test_pauses_that_are_surely_too_large_are_refused_before_anything_is_said(settings: Settings) -> None:
    engine = Scripted(1)
    small = settings.model_copy(update={"max_result_bytes": 100_000})
    for fields in ({"text": "One. [pause 2s] Two."}, {"segments": [GOOD | {"pause_after_s": 2}]}):
        assert long(Worker(engine, small), **fields)["error_code"] == "result_too_large"
    assert engine.requests == []


def test_audio_over_the_most_hours_stops(plain: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_form, "MAX_AUDIO_S", 3.0)
    ends = plain.model_copy(update={"job_timeout_s": 10.0})
    result = long(Worker(Scripted(5, endless=True), ends), text="One.")
    assert (result["error_code"], result["field"]) == ("text_too_long", "text")
    assert "error" not in long(Worker(Scripted(3), plain), text="One.")


# ---------------------------------------------------------------------------------- its files


def spooled(folder: Path | None = None, **fields: Any) -> Spool:
    return Spool(LongForm(text="One.", **fields), RATE, folder)


def most_memory(duration_s: int) -> int:
    """Bytes that so much audio takes at a time, from its first piece to its file."""
    piece = tone(2.0)
    tracemalloc.start()
    try:
        audio = spooled(audio_normalization="rms", output_format="flac")
        for _ in range(duration_s // 2):
            audio.push(piece)
        while audio.master():
            pass
        assert audio._chain is not None
        audio._chain.finish()
        return tracemalloc.get_traced_memory()[1]
    finally:
        audio.close()
        tracemalloc.stop()


def test_hours_of_audio_take_no_more_memory_than_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "BLOCK_S", 2.0)
    assert most_memory(40) < most_memory(20) + 200_000  # 1.9 MB more of audio


@pytest.mark.parametrize("level", ["none", "loudness"])
def test_a_full_disk_is_told_as_what_it_is(
    speaker: Worker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], level: str
) -> None:
    full = Path("/dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir=None: full.open("r+b"))
    for audio_format in ("wav", "flac", "mp3", "opus"):
        result = long(speaker, text=PASSAGE * 4, output_format=audio_format, audio_normalization=level)
        assert result["error_code"] == "storage_failed" and "No space left" in result["error"], result
    assert "Traceback" not in capfd.readouterr().err


def test_its_files_have_no_names_and_end_with_it(tmp_path: Path) -> None:
    num_before = num_nameless_files()
    audio = spooled(tmp_path / "tmp", audio_normalization="peak")
    audio.push(tone(1.0))
    audio.master()
    assert num_nameless_files() == num_before + 2
    assert list((tmp_path / "tmp").iterdir()) == []
    audio.close()
    assert num_nameless_files() == num_before


def test_a_folder_that_cannot_be_written_to_gives_way_to_the_systems(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("in the way")
    audio = spooled(tmp_path / "place" / "tmp")
    audio.push(tone(1.0))
    assert audio.num_encoded_bytes > 0
    audio.close()


@pytest.mark.parametrize("sizes", [[1], [0, 3, 0], [5_000] * 7, [70_000, 1]])
@pytest.mark.parametrize("fields", [{}, {"audio_normalization": "loudness", "sample_rate": 44_100}])
def test_however_audio_is_cut_into_pieces_the_file_is_the_same(sizes: list[int], fields: dict[str, Any]) -> None:
    samples = tone(4.0)[: sum(sizes)]
    files = []
    for pieces in ([samples], np.split(samples, np.cumsum(sizes)[:-1])):
        audio = spooled(output_format="flac", **fields)
        for piece in pieces:
            audio.push(piece)
        while audio.master():
            pass
        files.append(audio.finish().audio.as_base64())
        audio.close()
    assert files[0] == files[1]
