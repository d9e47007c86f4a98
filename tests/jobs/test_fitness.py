"""A machine that could not speak is told from one that can, before it takes a job."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import SpeechError
from engine.manifest import FileRecord, Manifest, sha256_of, write_manifest
from engine.types import Speech, SpeechRequest
from jobs import fitness
from jobs.fitness import UnfitError
from jobs.settings import Settings
from jobs.worker import Worker
from tests.jobs.conftest import ToneEngine, tone_speech
from tests.jobs.voice_support import Draft, MakeWorker

NO_GPU: dict[str, str] = {}


def run_all(engine: Any, settings: Settings, **environment: str) -> None:
    for check in fitness.checks(engine, None, settings, environment):
        check()


def named(engine: Any, settings: Settings, name: str) -> fitness.Check:
    return next(check for check in fitness.checks(engine, None, settings, NO_GPU) if check.__name__ == name)


def test_a_sound_machine_is_fit(engine: ToneEngine, settings: Settings) -> None:
    run_all(engine, settings)
    assert [request.text for request in engine.requests] == [fitness.PROBE_TEXT]


def test_the_draft_voice_is_fit(make_worker: MakeWorker) -> None:
    for check in make_worker(Draft.make()).fitness_checks():
        check()


def test_every_check_is_told_by_its_name(worker: Worker) -> None:
    names = [check.__name__ for check in worker.fitness_checks()]
    assert names == ["device", "free_memory", "weights", "voice_library", "utterance"]


def test_a_gpu_that_goes_unused_is_unfit_unless_the_cpu_was_asked_for() -> None:
    on_cpu = {"device": "cpu", "reasons": ["no kernels for it"]}
    with pytest.raises(UnfitError, match="no kernels for it"):
        fitness.check_device(on_cpu, "auto", has_gpu=True)
    fitness.check_device(on_cpu, "cpu", has_gpu=True)
    fitness.check_device(on_cpu, "auto", has_gpu=False)
    fitness.check_device({"device": "cuda:0"}, "auto", has_gpu=True)


@pytest.mark.parametrize(("counted", "expected"), [("1", True), ("0", False), ("", False), ("many", False)])
def test_the_platform_says_whether_there_is_a_gpu(
    counted: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitness, "_GPU_FILES", ())
    assert fitness.has_gpu({"RUNPOD_GPU_COUNT": counted}) is expected


@pytest.mark.parametrize("place", ["cuda:0", "host"])
def test_too_little_memory_is_unfit_and_says_where(place: str) -> None:
    with pytest.raises(UnfitError, match=f"100 MiB are free on {place}"):
        fitness.check_memory({"cuda:0": 1 << 33, "host": 1 << 33} | {place: 100 << 20})


def test_weights_that_differ_from_what_was_fetched_are_told_by_size_and_if_asked_by_content(
    engine: ToneEngine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "t3.safetensors"
    weights.write_bytes(b"abcdef")
    record = FileRecord(6, sha256_of(weights))
    write_manifest(tmp_path, Manifest("owner/name", "c0ffee", {weights.name: record}))
    monkeypatch.setattr(engine, "stats", lambda: {"device": "cpu", "model_dir": str(tmp_path)})
    hashing = settings.model_copy(update={"verify_weights": True})
    named(engine, hashing, "weights")()
    weights.write_bytes(b"abcdeX")
    named(engine, settings, "weights")()
    with pytest.raises(SpeechError, match=r"t3\.safetensors"):
        named(engine, hashing, "weights")()
    weights.write_bytes(b"abc")
    with pytest.raises(SpeechError, match=r"t3\.safetensors"):
        named(engine, settings, "weights")()


@pytest.mark.parametrize(
    "wrong", [np.zeros(0), np.zeros(2_400), np.full(2_400, np.nan)], ids=["empty", "silent", "NaN"]
)
def test_a_device_that_makes_no_sound_is_unfit(wrong: Any, make_engine: type[ToneEngine], settings: Settings) -> None:
    def answer(request: SpeechRequest, future: Future[Speech]) -> None:
        future.set_result(dataclasses.replace(tone_speech(request), waveform=wrong.astype(np.float32)))

    with pytest.raises(UnfitError, match="probe utterance"):
        run_all(make_engine(answer), settings)


def test_a_library_that_is_away_is_told(make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(Draft.make())
    assert worker._voices is not None

    def away() -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(worker._voices, "stats", away)
    check = next(check for check in worker.fitness_checks() if check.__name__ == "voice_library")
    with pytest.raises(OSError, match="stale"):
        check()
