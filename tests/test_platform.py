"""The platform's stand-in: by plain HTTP, with a worker played by hand, and behind it the SDK's real loop."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from scripts.local_platform import LocalPlatform, LocalWorker
from scripts.local_platform.limits import Rate
from scripts.local_platform.processes import pause_s
from scripts.local_platform.spool import Spool
from tests.platform import LIMITS, Fault, Platform, wait_until

ROOT = Path(__file__).resolve().parent.parent

QUICK = dataclasses.replace(
    LIMITS, rates={}, hold_s=0.05, stream_hold_s=0.05, min_execution_timeout_s=0.0, min_ttl_s=0.0, lost_after_s=0.0
)
"""For a worker played by hand, whose pings come when the test sends them."""

SCRIPT = """
import asyncio, os, time
import runpod

async def plain(job):
    asked = job["input"]
    if "progress" in asked:
        runpod.serverless.progress_update(job, asked["progress"])
    while asked.get("until") and not os.path.exists(asked["until"]):
        await asyncio.sleep(0.02)
    return {**asked.get("result", {}), "said": asked.get("say"), "pod": os.environ["RUNPOD_POD_ID"]}

async def stream(job):
    for number in range(job["input"]["count"]):
        yield {"number": number}
    if "error" in job["input"]:
        yield {"error": job["input"]["error"]}

handler = stream if os.environ.get("KIND") == "stream" else plain
runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: 8})
"""


class Hand:
    """A worker played by hand: what the SDK's loop would ask, one by one."""

    def __init__(self, platform: Platform) -> None:
        self.pod_id = f"hand-{uuid.uuid4()}"
        given = platform.environment(self.pod_id)
        self._variables = {name: value.replace("$RUNPOD_POD_ID", self.pod_id) for name, value in given.items()}
        self._http = platform.http

    def take(self, num_wanted: int = 1) -> list[dict[str, Any]]:
        url = self._variables["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", self.pod_id)
        answer = self._http.get(f"{url.replace('/job-take/', '/job-take-batch/')}&batch_size={num_wanted}")
        return answer.json() if answer.status_code == 200 else []

    def stops(self) -> list[str]:
        url = self._variables["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", self.pod_id)
        answer = self._http.get(url.replace("/job-take/", "/job-stop/"))
        return answer.json()["jobsToStop"] if answer.status_code == 200 else []

    def ping(self, *job_ids: str) -> None:
        self._http.get(self._variables["RUNPOD_WEBHOOK_PING"], params={"job_id": ",".join(job_ids)} if job_ids else {})

    def end(self, job_id: str, **result: Any) -> int:
        url = self._variables["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$ID", job_id)
        return self._http.post(url, content=json.dumps(result)).status_code

    def give(self, job_id: str, piece: Any) -> int:
        url = self._variables["RUNPOD_WEBHOOK_POST_STREAM"].replace("$ID", job_id)
        return self._http.post(url, content=json.dumps({"output": piece})).status_code


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def shared() -> Iterator[Platform]:
    with Platform(QUICK) as platform:
        yield platform


@pytest.fixture
def platform(shared: Platform) -> Platform:
    """With nothing in its queue and nothing wrong with it."""
    shared.fault = lambda _operation, _job_id: None
    while shared.ask("GET", "health")["jobs"]["inQueue"]:
        shared.ask("POST", "purge-queue")
    return shared


@pytest.fixture
def hand(platform: Platform) -> Hand:
    return Hand(platform)


def running(platform: Platform, hand: Hand, **fields: Any) -> str:
    """A job that a hand has."""
    job_id = platform.submit(**fields or {"say": "x"})
    assert [job["id"] for job in hand.take()] == [job_id]
    return job_id


# ---------------------------------------------------------------------------------- a job's way, by hand


def test_a_job_goes_from_the_queue_over_a_worker_to_its_result(platform: Platform, hand: Hand) -> None:
    job_id = platform.submit(say="hello")
    assert platform.status(job_id) == {"id": job_id, "status": "IN_QUEUE"}
    assert hand.take() == [{"id": job_id, "input": {"say": "hello"}}]
    told = platform.status(job_id)
    assert (told["status"], told["workerId"], "output" in told) == ("IN_PROGRESS", hand.pod_id, False)
    assert hand.end(job_id, status="IN_PROGRESS", output={"done": 1}) == 200
    assert platform.status(job_id)["output"] == {"done": 1}
    assert hand.end(job_id, output={"said": "hello"}) == 200
    told = platform.status(job_id)
    assert set(told) == {"id", "status", "delayTime", "executionTime", "workerId", "output"}
    assert (told["status"], told["output"]) == ("COMPLETED", {"said": "hello"})
    assert platform.ask("POST", f"status/{job_id}") == told


def test_an_error_fails_the_job_and_keeps_what_came_with_it(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    hand.end(job_id, error="no", output={"error_code": "x"})
    told = platform.status(job_id)
    assert (told["status"], told["error"], told["output"]) == ("FAILED", "no", {"error_code": "x"})


def test_progress_that_comes_after_the_result_changes_nothing(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    hand.end(job_id, output=1)
    assert hand.end(job_id, status="IN_PROGRESS", output="half") == 200
    assert (platform.status(job_id)["status"], platform.status(job_id)["output"]) == ("COMPLETED", 1)


def test_a_worker_gets_all_that_a_client_sent_and_the_platforms_id(platform: Platform, hand: Hand) -> None:
    sent = {"input": {"text": "\ud800ü"}, "s3Config": {"bucketName": "b"}, "policy": {"lowPriority": True}, "id": "x"}
    job_id = platform.http.post(f"{platform.url}/run", content=json.dumps(sent)).json()["id"]
    assert hand.take() == [{**sent, "id": job_id}]


def test_jobs_are_given_in_the_order_they_came_and_as_many_as_are_wanted(platform: Platform, hand: Hand) -> None:
    ids = [platform.submit(number=number) for number in range(5)]
    taken = [hand.take(3), hand.take(3), hand.take(3)]
    assert [[job["id"] for job in batch] for batch in taken] == [ids[:3], ids[3:], []]


def test_a_cancelled_job_in_the_queue_is_never_given(platform: Platform, hand: Hand) -> None:
    job_id = platform.submit(say="x")
    assert platform.ask("POST", f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
    assert hand.take() == []
    assert platform.status(job_id)["status"] == "CANCELLED"


def test_a_worker_is_told_to_stop_a_cancelled_job_and_its_late_result_is_not_told(
    platform: Platform, hand: Hand
) -> None:
    job_id = running(platform, hand)
    platform.stop(job_id)
    assert hand.stops() == [job_id]
    assert hand.end(job_id, output="late") == 200
    assert {"id": job_id, "status": "CANCELLED"}.items() <= platform.status(job_id).items()
    assert "output" not in platform.status(job_id)


def test_a_stop_that_a_worker_did_not_hear_is_told_again_when_it_pings(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    platform.stop(job_id)
    assert (hand.stops(), hand.stops()) == ([job_id], [])
    hand.ping(job_id)
    assert hand.stops() == [job_id]


def test_a_job_that_failed_can_be_retried_and_one_that_did_not_cannot(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand, say="again")
    hand.end(job_id, error="no")
    assert platform.ask("POST", f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    assert platform.status(job_id) == {"id": job_id, "status": "IN_QUEUE"}
    assert hand.take() == [{"id": job_id, "input": {"say": "again"}}]
    hand.end(job_id, output="yes")
    assert platform.status(job_id)["output"] == "yes"
    assert platform.http.post(f"{platform.url}/retry/{job_id}").status_code == 400


def test_a_purge_cancels_what_waits_and_leaves_what_runs(platform: Platform, hand: Hand) -> None:
    runs = running(platform, hand)
    waits = [platform.submit(number=number) for number in range(2)]
    assert platform.ask("POST", "purge-queue") == {"removed": 2, "status": "completed"}
    assert [platform.status(job_id)["status"] for job_id in [runs, *waits]] == ["IN_PROGRESS"] + 2 * ["CANCELLED"]


def test_runsync_answers_with_the_result_or_how_far_it_is_when_the_wait_is_over(platform: Platform, hand: Hand) -> None:
    told: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: told.append(platform.ask("POST", "runsync", input={"say": "x"})))
    asking.start()
    (job,) = iter(lambda: hand.take(), []).__next__()
    hand.end(job["id"], output="yes")
    asking.join()
    assert (told[0]["id"], told[0]["status"], told[0]["output"]) == (job["id"], "COMPLETED", "yes")
    assert job["id"].startswith("sync-")
    late = platform.ask("POST", "runsync?wait=1000", input={"say": "x"})
    assert late["status"] == "IN_QUEUE"
    assert platform.http.post(f"{platform.url}/runsync?wait=1", json={"input": 1}).status_code == 400


def test_pieces_of_a_stream_are_given_once_and_in_order_and_the_last_with_the_end(
    platform: Platform, hand: Hand
) -> None:
    job_id = running(platform, hand)
    assert platform.ask("GET", f"stream/{job_id}") == {"status": "IN_PROGRESS", "stream": []}
    for number in range(3):
        hand.give(job_id, {"number": number})
    told = platform.ask("GET", f"stream/{job_id}")
    assert told == {"status": "IN_PROGRESS", "stream": [{"output": {"number": number}} for number in range(3)]}
    hand.give(job_id, "x" * 100_000)
    hand.end(job_id, output=[])
    assert platform.ask("POST", f"stream/{job_id}") == {"status": "COMPLETED", "stream": [{"output": "x" * 100_000}]}
    assert platform.ask("GET", f"stream/{job_id}") == {"status": "COMPLETED", "stream": []}


def test_a_job_beyond_its_execution_timeout_is_stopped_and_timed_out(platform: Platform, hand: Hand) -> None:
    job_id = platform.ask("POST", "run", input={"a": 1}, policy={"executionTimeout": 50})["id"]
    hand.take()
    told = platform.ended(job_id)
    assert (told["status"], "execution timeout" in told["error"]) == ("TIMED_OUT", True)
    assert hand.stops() == [job_id]
    assert platform.ask("POST", f"retry/{job_id}")["status"] == "IN_QUEUE"


def test_a_job_that_waits_beyond_its_time_to_live_is_timed_out_and_never_given(platform: Platform, hand: Hand) -> None:
    job_id = platform.ask("POST", "run", input={"a": 1}, policy={"ttl": 50})["id"]
    told = platform.ended(job_id)
    assert (told["status"], "time to live" in told["error"]) == ("TIMED_OUT", True)
    assert hand.take() == []


# ---------------------------------------------------------------------------------- workers that are lost, by hand


def test_a_job_that_its_workers_pings_no_longer_name_is_given_to_another(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    hand.give(job_id, "a piece of the first")
    hand.ping(job_id)
    assert platform.status(job_id)["status"] == "IN_PROGRESS"
    behind = platform.submit(say="behind it")
    hand.ping()
    assert platform.status(job_id)["status"] == "IN_QUEUE"
    other = Hand(platform)
    assert [job["id"] for job in other.take(2)] == [job_id, behind]
    assert platform.ask("GET", f"stream/{job_id}")["stream"] == []


def test_a_ping_may_name_as_many_jobs_as_a_worker_can_have(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    hand.ping(job_id, *(str(uuid.uuid4()) for _ in range(1_600)))
    assert platform.status(job_id)["status"] == "IN_PROGRESS"
    assert len(platform.pings[-1]) > 59_000


def test_a_result_counts_though_the_job_was_given_to_another_who_is_told_to_stop(
    platform: Platform, hand: Hand
) -> None:
    job_id = running(platform, hand)
    hand.ping()
    other = Hand(platform)
    assert [job["id"] for job in other.take()] == [job_id]
    hand.end(job_id, output="first")
    assert (platform.status(job_id)["output"], other.stops()) == ("first", [job_id])
    assert platform.conflicts.count(job_id) == 0
    other.end(job_id, output="second")
    assert platform.status(job_id)["output"] == "first"
    assert platform.conflicts.count(job_id) == 1


def test_the_same_result_again_is_no_conflict(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    assert [hand.end(job_id, output="same") for _ in range(3)] == [200, 200, 200]
    assert platform.conflicts.count(job_id) == 0


def test_a_job_that_loses_worker_after_worker_fails(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    for _ in range(QUICK.max_losses - 1):
        hand.ping()
        assert [job["id"] for job in hand.take()] == [job_id]
    hand.ping()
    told = platform.status(job_id)
    assert (told["status"], "lost its worker 3 times" in told["error"]) == ("FAILED", True)
    assert hand.take() == []


def test_the_jobs_of_a_silent_worker_go_to_others() -> None:
    with Platform(dataclasses.replace(QUICK, silent_after_s=0.1, lost_after_s=60.0)) as platform:
        job_id = running(platform, Hand(platform))
        wait_until(lambda: platform.status(job_id)["status"] == "IN_QUEUE")
        assert [job["id"] for job in Hand(platform).take()] == [job_id]


def test_health_counts_jobs_and_workers() -> None:
    with Platform(QUICK) as platform:
        hand, other = Hand(platform), Hand(platform)
        other.take()
        hand.end(running(platform, hand), output=1)
        hand.end(running(platform, hand), error="no")
        running(platform, hand)
        platform.submit(say="x")
        health = platform.ask("GET", "health")
        assert health["jobs"] == {"completed": 1, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0}
        assert {"ready": 2, "idle": 1, "running": 1, "initializing": 0}.items() <= health["workers"].items()


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[1]",
        b"{}",
        b'{"input": null}',
        b'{"input": {}, "webhook": "file:///etc/passwd"}',
        b'{"input": {}, "policy": {"executionTimeout": "long"}}',
        b'{"input": {}, "policy": {"ttl": 1e12}}',
        b'{"input": {}, "policy": {"ttl": true}}',
    ],
)
def test_a_request_that_cannot_be_meant_is_400(body: bytes, platform: Platform) -> None:
    answer = platform.http.post(f"{platform.url}/run", content=body)
    assert answer.status_code == 400 and answer.json()["error"]


def test_policies_below_the_platforms_least_are_400() -> None:
    with Platform() as platform:
        for policy in ({"executionTimeout": 4_000}, {"ttl": 9_000}):
            answer = platform.http.post(f"{platform.url}/run", json={"input": {}, "policy": policy})
            assert answer.status_code == 400, policy


def test_without_the_key_nothing_is_answered(platform: Platform) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        answer = httpx.get(f"{platform.url}/health", headers=headers, trust_env=False)
        assert answer.status_code == 401
    assert httpx.get(f"{platform.url}/health", headers={"Authorization": platform.api_key}).status_code == 200


def test_what_is_not_there_is_404(platform: Platform) -> None:
    for path in ("status/x", "stream/x", "nothing"):
        assert platform.http.get(f"{platform.url}/{path}").status_code == 404
    assert platform.http.get(f"{platform.url}-other/health").status_code == 404


def test_whoever_does_not_know_the_workers_path_is_no_worker(platform: Platform) -> None:
    origin = platform.url.removesuffix("/v2/local")
    assert httpx.get(f"{origin}/worker/guessed/job-take/by-hand", trust_env=False).status_code == 404
    take = platform.environment("by-hand")["RUNPOD_WEBHOOK_GET_JOB"]
    assert httpx.get(take.replace("$ID", "unknown"), trust_env=False).status_code == 401


def test_requests_results_and_pieces_over_the_limits_are_413() -> None:
    limits = dataclasses.replace(QUICK, run_bytes=1_000, runsync_bytes=2_000, piece_bytes=500)
    with Platform(limits) as platform:
        hand = Hand(platform)
        post = platform.http.post
        assert post(f"{platform.url}/run", json={"input": "x" * 1_000}).status_code == 413
        assert post(f"{platform.url}/runsync?wait=1000", json={"input": "x" * 1_000}).status_code == 200
        assert post(f"{platform.url}/run", json={"input": "x" * 10_000}).status_code == 413
        (job,) = hand.take()
        assert (hand.end(job["id"], output="x" * 1_000), platform.status(job["id"])["status"]) == (200, "COMPLETED")
        job_id = running(platform, hand)
        assert hand.give(job_id, "x" * 500) == 413
        assert (hand.end(job_id, output="x" * 1_000), platform.status(job_id)["status"]) == (413, "IN_PROGRESS")


def test_more_requests_than_the_rate_are_429_with_when_to_come_back() -> None:
    with Platform(dataclasses.replace(LIMITS, rates={"status": 3, "cancel": 1})) as platform:
        answers = [platform.http.get(f"{platform.url}/status/x") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [404, 404, 404, 429]
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 10
        assert platform.http.post(f"{platform.url}/cancel/x").status_code == 404
        assert platform.http.post(f"{platform.url}/cancel/x").status_code == 429


def test_a_rate_has_room_again_when_its_window_has_moved_on() -> None:
    rate = Rate(2, 10.0)
    assert [rate.wait_s(now_s) for now_s in (0.0, 4.0, 5.0, 9.0, 10.0, 11.0)] == [0, 0, 5, 1, 0, 3]


def test_a_queue_that_is_full_takes_no_more() -> None:
    with Platform(dataclasses.replace(LIMITS, queued_anyway=2, queued_per_worker=1)) as platform:
        statuses = [platform.http.post(f"{platform.url}/run", json={"input": 1}).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]


@pytest.mark.parametrize("operation", ["run", "runsync?wait=1000"])
def test_a_result_is_forgotten_when_its_time_is_over(operation: str) -> None:
    is_sync = operation.startswith("runsync")
    limits = dataclasses.replace(QUICK, kept_sync_s=0.05) if is_sync else dataclasses.replace(QUICK, kept_s=0.05)
    with Platform(limits) as platform:
        job_id = platform.ask("POST", operation, input=1)["id"]
        hand = Hand(platform)
        hand.take()
        hand.end(job_id, output=1)
        wait_until(lambda: platform.http.get(f"{platform.url}/status/{job_id}").status_code == 404)


# ---------------------------------------------------------------------------------- webhooks, faults, what is kept


def test_a_webhook_is_told_the_result_and_called_again_until_it_answers_200(platform: Platform, hand: Hand) -> None:
    told: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if len(told) == 2 else 500)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Not of interest."""

    with HTTPServer(("127.0.0.1", 0), Webhook) as server:
        server.timeout = 10.0
        url = f"http://127.0.0.1:{server.server_port}/done"
        job_id = platform.ask("POST", "run", input=1, webhook=url)["id"]
        (job,) = hand.take()
        assert job["webhook"] == url
        hand.end(job_id, output="yes")
        server.handle_request()
        server.handle_request()
    assert told == 2 * [platform.status(job_id)]
    assert (told[0]["status"], told[0]["output"]) == ("COMPLETED", "yes")


def test_faults_come_before_the_request_or_after_its_effect(platform: Platform, hand: Hand) -> None:
    job_id = running(platform, hand)
    platform.fault = lambda operation, _: Fault(status=500) if operation == "job-done" else None
    assert hand.end(job_id, output=1) == 500
    assert platform.status(job_id)["status"] == "IN_PROGRESS"
    platform.fault = lambda operation, _: Fault(is_cut=True) if operation == "job-done" else None
    with pytest.raises(httpx.TransportError):
        hand.end(job_id, output=1)
    assert platform.status(job_id)["status"] == "COMPLETED"


def test_a_worker_that_hung_up_is_given_no_job(platform: Platform) -> None:
    with Platform(dataclasses.replace(QUICK, hold_s=30.0)) as patient:
        url = patient.environment("by-hand")["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", "by-hand")
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(url, timeout=0.1, trust_env=False)
        wait_until(lambda: patient.ask("GET", "health")["workers"]["ready"] == 1)
        job_id = patient.submit(say="x")
        assert patient.status(job_id)["status"] == "IN_QUEUE"


def test_the_spool_gives_back_what_it_was_given_and_frees_its_files() -> None:
    spool = Spool()
    given = [b"", b"small", os.urandom(100_000), os.urandom(300_000)]
    kept = [spool.keep(data) for data in given]
    assert [each.read() for each in kept] == given
    assert (kept[1].file, kept[2].file is kept[3].file) == (None, True)
    assert kept[2].file is not None
    descriptor = kept[2].file.descriptor
    os.fstat(descriptor)
    del spool, kept
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# ---------------------------------------------------------------------------------- the SDK's loop


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "worker.py"
    path.write_text(SCRIPT)
    return path


@dataclass(frozen=True)
class Served:
    """A platform with two places for workers of the SDK, and their logs."""

    platform: Platform
    places: Sequence[LocalWorker]
    logs: Sequence[Path]


@pytest.fixture(scope="module")
def served(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folders = [tmp_path_factory.mktemp("served") for _ in range(2)]
    with Platform() as platform, ExitStack() as stack:
        places = [stack.enter_context(platform.place(script, folder)) for folder in folders]
        yield Served(platform, places, [folder / "log" for folder in folders])


def test_workers_of_the_sdk_share_the_jobs_and_each_answer_is_the_jobs_own(served: Served) -> None:
    platform, places = served.platform, served.places
    wait_until(lambda: platform.ask("GET", "health")["workers"]["ready"] == 2)
    ids = {platform.submit(say=number): number for number in range(30)}
    said = {job_id: platform.ended(job_id) for job_id in ids}
    assert {job_id: told["output"]["said"] for job_id, told in said.items()} == ids
    assert {told["output"]["pod"] for told in said.values()} == {place.pod_id for place in places}
    assert all(told["workerId"] == told["output"]["pod"] for told in said.values())


def test_the_sdks_worker_tells_progress_and_stops_a_job_that_is_cancelled(served: Served, tmp_path: Path) -> None:
    platform, logs = served.platform, served.logs
    job_id = platform.submit(progress={"done": 1}, until=str(tmp_path / "never"))
    wait_until(lambda: platform.status(job_id).get("output") == {"done": 1})
    wait_until(lambda: any(job_id in ping for ping in platform.pings))
    platform.stop(job_id)
    wait_until(lambda: any(f"{job_id} | Job stopped." in log.read_text() for log in logs))
    assert platform.status(job_id)["status"] == "CANCELLED"
    assert job_id not in platform.results


def test_the_job_of_a_worker_that_is_killed_is_done_by_another_and_the_worker_is_replaced(
    served: Served, tmp_path: Path
) -> None:
    platform, places = served.platform, served.places
    job_id = platform.submit(say="survives", until=str(tmp_path / "now"))
    wait_until(lambda: platform.status(job_id)["status"] == "IN_PROGRESS")
    killed_id = platform.status(job_id)["workerId"]
    (killed,) = [place for place in places if place.pod_id == killed_id]
    whole_group = [killed.process.pid, *(child.pid for child in psutil.Process(killed.process.pid).children())]
    assert len(whole_group) == 2  # its heartbeat is the other
    os.kill(killed.process.pid, signal.SIGKILL)
    wait_until(lambda: platform.status(job_id).get("workerId") not in (None, killed_id))
    (tmp_path / "now").touch()
    told = platform.ended(job_id)
    assert (told["status"], told["output"]["said"]) == ("COMPLETED", "survives")
    assert told["output"]["pod"] != killed_id
    wait_until(lambda: killed.pod_id != killed_id and platform.ask("GET", "health")["workers"]["ready"] == 2)
    assert not any(is_running(pid) for pid in whole_group)


def test_a_worker_that_asks_for_it_is_replaced_when_its_other_jobs_are_done(served: Served, tmp_path: Path) -> None:
    platform, places = served.platform, served.places
    held = {platform.submit(say=number, until=str(tmp_path / "now")) for number in range(4)}
    wait_until(lambda: all(platform.status(job_id)["status"] == "IN_PROGRESS" for job_id in held))
    last = platform.ended(platform.submit(result={"refresh_worker": True}))
    (place,) = [place for place in places if place.pod_id == last["workerId"]]
    (tmp_path / "now").touch()
    assert {platform.ended(job_id)["status"] for job_id in held} == {"COMPLETED"}
    wait_until(lambda: place.pod_id != last["workerId"])
    assert platform.ask("GET", "health")["jobs"]["failed"] == 0


def test_a_stream_of_the_sdk_comes_in_order_and_its_error_fails_the_job(script: Path, tmp_path: Path) -> None:
    with Platform() as platform, platform.worker(script, tmp_path, KIND="stream"):
        job_id, failing = platform.submit(count=20), platform.submit(count=2, error="no")
        numbers, status = [], "IN_QUEUE"
        while status in ("IN_QUEUE", "IN_PROGRESS"):
            told = platform.ask("GET", f"stream/{job_id}")
            status = told["status"]
            numbers += [piece["output"]["number"] for piece in told["stream"]]
        assert (status, numbers) == ("COMPLETED", list(range(20)))
        assert (platform.ended(failing)["status"], platform.status(failing)["error"]) == ("FAILED", "no")


# ---------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_the_platforms_process_however_that_ends(signal_number: int, tmp_path: Path) -> None:
    program = """
import pathlib, sys, time
from scripts.local_platform import LocalPlatform, LocalWorker
platform = LocalPlatform()
platform.start()
platform.start_worker(["/bin/sh", "-c", "sleep 1000 & echo $$ $! >pids; wait"], log=pathlib.Path("log"))
time.sleep(1000)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) as process:
        wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(is_running(pid) for pid in pids)
        process.send_signal(signal_number)
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_a_worker_that_ends_at_once_is_started_again_and_less_and_less_often(tmp_path: Path) -> None:
    with LocalPlatform() as platform:
        worker = platform.start_worker(["/bin/sh", "-c", "exit 1"], log=tmp_path / "log")
        wait_until(lambda: worker.num_started == 3)
    assert not is_running(worker.process.pid)
    pauses_s = [pause_s(num_quick) for num_quick in range(1, 2_000)]
    assert pauses_s[:4] == [0, 0.5, 1, 2] and pauses_s == sorted(pauses_s) and pauses_s[-1] == 30


def test_a_worker_that_does_not_end_is_killed(tmp_path: Path) -> None:
    with LocalPlatform() as platform:
        command = ["/bin/sh", "-c", "trap '' TERM; echo >up; sleep 1000"]
        worker = platform.start_worker(command, log=tmp_path / "log", cwd=tmp_path)
        wait_until(lambda: (tmp_path / "up").exists())
        assert not platform.stop_worker(worker, within_s=0.1)
        assert not is_running(worker.process.pid)
        assert platform.workers == ()


def test_a_worker_sees_nothing_of_another_platform_in_its_environment(tmp_path: Path) -> None:
    with LocalPlatform() as platform:
        environment = {"RUNPOD_API_KEY": "secret", "PATH": os.environ["PATH"], "NO_PROXY": "example.org"}
        worker = platform.start_worker(
            ["/bin/sh", "-c", "env"], log=tmp_path / "log", environment=environment, replaces=False
        )
        worker.process.wait()
        lines = (tmp_path / "log").read_text().splitlines()
    assert "secret" not in "".join(lines)
    assert f"RUNPOD_POD_ID={worker.pod_id}" in lines and "NO_PROXY=example.org,127.0.0.1" in lines


def test_a_port_that_is_taken_is_an_error_and_leaves_no_thread() -> None:
    with LocalPlatform() as platform:
        port = int(platform.url.split(":")[2].split("/")[0])
        num_threads = threading.active_count()
        with pytest.raises(OSError, match="address already in use"):
            LocalPlatform(port=port).start()
        assert threading.active_count() == num_threads
