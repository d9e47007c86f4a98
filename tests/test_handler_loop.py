"""Plain workers of the draft voice through the SDK's real loop, behind the stand-in of the platform."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import handler
from scripts.local_platform import LocalWorker
from tests.platform import Platform, wait_until
from tests.speaking_jobs import LONG, Alone, alone, recording, sentence

HANDLER = Path(handler.__file__).resolve()
SETTINGS = {"MODEL": "draft", "MAX_CONCURRENCY": "8", "MAX_RESULT_BYTES": "1000000"}
ENDLESS = LONG * 20
"""A text that takes minutes."""


@dataclass(frozen=True)
class Served:
    """A platform, a place with a worker, and its folder: with the log, and tmp for temporary files."""

    platform: Platform
    place: LocalWorker
    folder: Path

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("worker")
    (folder / "tmp").mkdir()
    settings = {**SETTINGS, "TMPDIR": str(folder / "tmp"), "WORK_DIR": str(folder / "work")}
    with Platform() as platform, platform.place(HANDLER, folder, settings) as place:
        yield Served(platform, place, folder)


@pytest.fixture(scope="module")
def by_itself() -> Iterator[Alone]:
    with alone() as worker:
        yield worker


def test_eight_jobs_at_once_each_get_their_own_sentence_in_their_own_voice(served: Served, by_itself: Alone) -> None:
    platform = served.platform
    voices = [{"reference_audio": recording(hz)} for hz in (90.0, 150.0, 210.0)] + [{}]
    asked = [{"text": sentence(number), "seed": number, **voices[number % 4]} for number in range(8)]
    ids = [platform.submit(**fields) for fields in asked]
    told = [platform.ended(job_id) for job_id in ids]
    for fields, answer in zip(asked, told, strict=True):
        assert answer["status"] == "COMPLETED", answer
        output = answer["output"]
        assert (output["chunks"][0]["text"], output["seed"]) == (fields["text"], fields["seed"])
        assert output["audio"] == by_itself.result(fields)["audio"]
    assert len({answer["output"]["audio"] for answer in told}) == 8


def test_bad_jobs_fail_with_their_codes_beside_a_good_one(served: Served) -> None:
    platform = served.platform
    good = platform.submit(text="All is well.")
    bad = {
        platform.submit(text=""): "text_empty",
        platform.submit(text="Hello", voice_name="Nobody"): "voice_not_found",
        platform.submit(text="Hello", reference_audio="AAAA"): "reference_unreadable",
        platform.submit(text="Hello", language="xx"): "language_unsupported",
        platform.submit(text="Hello", no_such_field=1): "invalid_request",
    }
    told = {job_id: platform.ended(job_id) for job_id in bad}
    assert {job_id: answer["output"]["error_code"] for job_id, answer in told.items()} == bad
    assert {answer["status"] for answer in told.values()} == {"FAILED"}
    assert all(answer["error"] for answer in told.values())
    assert platform.ended(good)["status"] == "COMPLETED"


def test_a_result_that_is_too_large_is_an_error_with_the_way_out_and_that_way_works(served: Served) -> None:
    platform = served.platform
    text = " ".join(sentence(number) for number in range(16))
    whole, small = platform.submit(text=text), platform.submit(text=text, output_format="mp3")
    told = platform.ended(whole)
    assert (told["status"], told["output"]["error_code"]) == ("FAILED", "result_too_large")
    assert platform.ended(small)["status"] == "COMPLETED"


def test_a_job_that_is_cancelled_stops_and_frees_its_place_for_one_that_waits(served: Served, by_itself: Alone) -> None:
    platform = served.platform
    endless = {"operation": "long_form", "text": ENDLESS, "output_format": "opus"}  # wav is soon too large a result
    running = [platform.submit(**endless) for _ in range(8)]
    wait_until(lambda: platform.ask("GET", "health")["jobs"]["inProgress"] == 8)
    cancelled, waiting = platform.submit(text="Never."), platform.submit(text=sentence(1))
    platform.stop(cancelled)
    assert platform.status(waiting)["status"] == "IN_QUEUE"
    for job_id in running:
        platform.stop(job_id)
    told = platform.ended(waiting)
    assert told["output"]["audio"] == by_itself.result({"text": sentence(1)})["audio"]
    wait_until(lambda: all(f"job {job_id}: stopped" in served.log() for job_id in running))
    assert cancelled not in served.log()
    assert not platform.results.keys() & {cancelled, *running}


def test_a_worker_that_is_killed_while_it_speaks_is_replaced_and_the_job_is_spoken_again(
    served: Served, by_itself: Alone
) -> None:
    platform, place = served.platform, served.place
    killed_id = place.pod_id
    asked = {"text": " ".join([sentence(2)] * 12), "output_format": "mp3"}
    job_id = platform.submit(**asked)
    wait_until(lambda: platform.status(job_id)["status"] == "IN_PROGRESS")
    os.kill(place.process.pid, signal.SIGKILL)
    told = platform.ended(job_id)
    assert (told["status"], place.num_started) == ("COMPLETED", 2)
    assert told["workerId"] == place.pod_id != killed_id
    assert told["output"]["audio"] == by_itself.result(asked)["audio"]


def test_a_worker_that_is_told_to_end_finishes_its_job_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    with Platform() as platform:
        (tmp_path / "tmp").mkdir()
        with platform.place(HANDLER, tmp_path, {**SETTINGS, "TMPDIR": str(tmp_path / "tmp")}):
            job_id = platform.submit(text=" ".join([sentence(3)] * 12), output_format="mp3")
            wait_until(lambda: platform.status(job_id)["status"] == "IN_PROGRESS")
        assert platform.status(job_id)["status"] == "COMPLETED"
        assert list((tmp_path / "tmp").iterdir()) == []
