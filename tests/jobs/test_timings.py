"""A result's timings add up: stages fit into the whole, and what is derived from the whole follows from it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from jobs.audio_file import AudioFile
from jobs.settings import Settings
from jobs.streaming import join
from jobs.worker import Worker
from tests.jobs.voice_support import Draft, MakeWorker, recorded

STAGES = ("queue", "condition", "prefill", "decode", "vocode", "master", "encode")
ROUNDED = 1e-4
TEXT = "The first sentence. [pause 0.2s] And a second one, which is a little longer than the first."


@pytest.fixture(scope="module")
def recording() -> str:
    return recorded(duration_s=6.0)


def jobs_that_speak(recording: str) -> dict[str, dict[str, Any]]:
    loud = {"audio_normalization": "loudness", "sample_rate": 16_000, "output_format": "flac"}
    return {
        "tts": {"text": TEXT, **loud},
        "tts with a recording": {"text": TEXT, "reference_audio": recording},
        "voice_clone": {"operation": "voice_clone", "text": TEXT, "reference_audio": recording},
        "voice_conversion": {"operation": "voice_conversion", "input_audio": recording, "target_audio": recording},
        "long_form": {"operation": "long_form", "text": TEXT * 3},
        "long_form with a level": {"operation": "long_form", "text": TEXT * 3, **loud},
    }


OPERATIONS = list(jobs_that_speak(""))


async def streamed(worker: Worker, fields: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    async for piece in worker.stream({"input": fields}):
        join(result, piece)
    return result


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_stages_of_a_result_fit_into_its_whole(name: str, make_worker: MakeWorker, recording: str) -> None:
    result = asyncio.run(make_worker().run({"input": jobs_that_speak(recording)[name]}))
    timings = result["timings"]
    assert all(timings[stage] >= 0 for stage in STAGES)
    assert timings["decode"] > 0
    assert all(timings[stage] <= timings["total"] + ROUNDED for stage in STAGES)
    if not name.startswith("long_form"):  # which encodes beside the speaking
        assert sum(timings[stage] for stage in STAGES) <= timings["total"] + ROUNDED * len(STAGES)
    assert timings["first_audio_s"] == timings["total"]
    assert timings["real_time_factor"] == pytest.approx(timings["total"] / result["duration_s"], abs=2 * ROUNDED)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_stage_of_a_stream_fits_into_its_whole(name: str, make_worker: MakeWorker, recording: str) -> None:
    """Together they need not: encoding goes on beside the speaking."""
    result = asyncio.run(streamed(make_worker(), jobs_that_speak(recording)[name]))
    timings = result["timings"]
    assert all(0 <= timings[stage] <= timings["total"] + ROUNDED for stage in STAGES)
    is_heard_early = name != "voice_conversion"
    assert (timings["first_audio_s"] < timings["total"]) == is_heard_early
    assert timings["real_time_factor"] == pytest.approx(timings["total"] / result["duration_s"], abs=2 * ROUNDED)


class SlowShelf:
    """A bucket that takes its time."""

    prefix, max_bytes, named_by = "", None, "a test"

    def describe(self) -> str:
        return "a shelf"

    async def put(self, name: str, audio: AudioFile, headers: Mapping[str, str], within_s: float | None) -> None:
        await asyncio.sleep(0.2)

    async def clean(self, name: str) -> None:
        """There is nothing."""

    async def has(self, name: str) -> bool:
        return True

    async def url(self, name: str) -> str:
        return f"https://shelf.test/{name}"

    def close(self) -> None:
        """There is nothing."""


def test_an_upload_is_part_of_the_whole_and_of_all_that_follows_from_it(settings: Settings) -> None:
    worker = Worker(Draft.make(), settings, bucket=SlowShelf())
    result = asyncio.run(worker.run({"input": {"text": TEXT, "delivery": "s3"}}))
    worker.close()
    timings = result["timings"]
    assert timings["upload"] >= 0.2
    assert sum(timings[stage] for stage in (*STAGES, "upload")) <= timings["total"] + ROUNDED * len(STAGES)
    assert timings["first_audio_s"] == timings["total"]
    assert timings["real_time_factor"] == pytest.approx(timings["total"] / result["duration_s"], abs=2 * ROUNDED)
    sums = worker.metrics.totals().sums
    assert sums["num_s3_bytes"] > 0 == sums["num_inline_bytes"]
