"""The relay between the SDK and the platform: what can be delivered is, once it can be; nothing late or altered."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from jobs import loop
from jobs.errors import JobError
from jobs.outbox import Outbox
from jobs.streaming import error_piece
from jobs.worker import BrokenWorker
from scripts.batch.outcomes import outcome_of

KEY = {"Authorization": "a-key"}
CUT = 0
"""In place of a status: the post is taken and the connection cut before the answer."""


class FakePlatform:
    """Answers posts with the statuses that it was given, then with 200; remembers what came."""

    def __init__(self, port: int = 0) -> None:
        self.statuses: list[int] = []
        self.posts: list[tuple[str, str, bytes, int]] = []  # path, key, body, answer
        self.may_answer = threading.Event()
        self.may_answer.set()
        platform = self

        class Requests(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = platform.statuses.pop(0) if platform.statuses else 200
                platform.posts.append((self.path, self.headers["Authorization"], body, status))
                platform.may_answer.wait(20)
                if status == CUT:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Requests)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server.server_port}/v2/e"
        return {
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
        }


@pytest.fixture
def platform() -> Iterator[FakePlatform]:
    platform = FakePlatform()
    yield platform
    platform.may_answer.set()
    platform.server.shutdown()
    platform.server.server_close()


@pytest.fixture
def outbox(platform: FakePlatform) -> Iterator[Outbox]:
    with Outbox(platform.environment, sleep=lambda _: time.sleep(0.001)) as outbox:
        yield outbox


def post(outbox: Outbox, body: Any, *, job: str = "job-1", stream: bool = False, ends_stream: bool = False) -> int:
    """As the SDK fills in the template and posts."""
    template = outbox.environment["RUNPOD_WEBHOOK_POST_STREAM" if stream else "RUNPOD_WEBHOOK_POST_OUTPUT"]
    url = template.replace("$RUNPOD_POD_ID", "worker-1").replace("$ID", job)
    url += f"&isStream={'true' if ends_stream else 'false'}"
    return httpx.post(url, content=json.dumps(body), headers=KEY, timeout=30).status_code


def piece(outbox: Outbox, seq: int, *, job: str = "job-1") -> int:
    return post(outbox, {"output": {"seq": seq, "audio": ""}}, job=job, stream=True)


def end(outbox: Outbox, *, job: str = "job-1", **more: Any) -> int:
    """As a stream is ended."""
    return post(outbox, {"output": [], **more}, job=job, ends_stream=True)


@pytest.mark.parametrize("stream", [False, True], ids=["result", "piece"])
@pytest.mark.parametrize("trouble", [[503], [429, 429], [408], [CUT], [500, CUT, 502, 429]])
def test_an_answer_is_posted_until_it_is_taken(
    trouble: list[int], stream: bool, outbox: Outbox, platform: FakePlatform
) -> None:
    platform.statuses = list(trouble)
    assert post(outbox, {"output": "ü"}, stream=stream) == 200
    kind = "job-stream" if stream else "job-done"
    expected = (f"/v2/e/{kind}/worker-1/job-1?gpu=none&isStream=false", "a-key", json.dumps({"output": "ü"}).encode())
    assert [entry[:3] for entry in platform.posts] == [expected] * (len(trouble) + 1)


def test_a_platform_that_is_away_is_waited_for(platform: FakePlatform) -> None:
    platform.server.server_close()
    port = platform.server.server_port
    back: list[FakePlatform] = []

    def sleep(_: float) -> None:
        if not back:
            back.append(FakePlatform(port))

    with Outbox(platform.environment, sleep=sleep) as outbox:
        assert post(outbox, {"output": 1}) == 200
    assert len(back[0].posts) == 1
    back[0].server.shutdown()
    back[0].server.server_close()


@pytest.mark.parametrize("status", [404, 410, 451])
def test_what_is_refused_for_good_is_not_tried_again(status: int, outbox: Outbox, platform: FakePlatform) -> None:
    platform.statuses = [status]
    assert post(outbox, {"output": 1}) == status
    assert len(platform.posts) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_result_that_the_platform_does_not_take_becomes_an_error_that_says_so(
    status: int, outbox: Outbox, platform: FakePlatform
) -> None:
    platform.statuses = [status, 503]
    assert post(outbox, {"output": {"audio": "x" * 1_000_000}}) == 200
    told = json.loads(platform.posts[-1][2])
    assert told["output"]["error_code"] == "result_too_large" and f"HTTP {status}" in told["error"]


def test_a_refused_piece_is_not_replaced(outbox: Outbox, platform: FakePlatform) -> None:
    platform.statuses = [413]
    assert post(outbox, {"output": {"seq": 0}}, stream=True) == 413
    assert len(platform.posts) == 1


def test_patience_ends_with_a_status_that_the_sdk_does_not_try_again(platform: FakePlatform) -> None:
    platform.statuses = [500] * 100_000
    with Outbox(platform.environment, patience_s=0.2, sleep=lambda _: time.sleep(0.01)) as outbox:
        assert post(outbox, {"output": 1}) == 424
    assert len(platform.posts) > 1


def test_progress_is_posted_once_and_never_behind_the_result(outbox: Outbox, platform: FakePlatform) -> None:
    platform.statuses = [503]
    progress = {"status": "IN_PROGRESS", "output": {"chunks_done": 1}}
    assert post(outbox, progress) == 200
    assert len(platform.posts) == 1
    assert post(outbox, {"output": 1}) == 200
    assert post(outbox, progress) == 200
    assert post(outbox, progress, job="job-2") == 200
    assert [(path.split("/")[5].partition("?")[0], json.loads(body)) for path, _, body, _ in platform.posts] == [
        ("job-1", progress),
        ("job-1", {"output": 1}),
        ("job-2", progress),
    ]


def test_a_result_waits_for_the_progress_that_is_on_its_way(outbox: Outbox, platform: FakePlatform) -> None:
    platform.may_answer.clear()
    progress = threading.Thread(target=post, args=(outbox, {"status": "IN_PROGRESS", "output": 1}))
    progress.start()
    while not platform.posts:
        time.sleep(0.005)
    result = threading.Thread(target=post, args=(outbox, {"output": 2}))
    result.start()
    result.join(0.2)
    assert len(platform.posts) == 1 and result.is_alive()
    platform.may_answer.set()
    progress.join(20)
    result.join(20)
    assert [json.loads(body)["output"] for _, _, body, _ in platform.posts] == [1, 2]


def test_jobs_do_not_wait_for_each_other(outbox: Outbox, platform: FakePlatform) -> None:
    platform.may_answer.clear()
    threads = [threading.Thread(target=post, args=(outbox, {"output": i}), kwargs={"job": f"j{i}"}) for i in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(platform.posts) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    platform.may_answer.set()
    for thread in threads:
        thread.join(20)


def test_nobody_who_does_not_know_its_place_can_post(outbox: Outbox, platform: FakePlatform) -> None:
    host = outbox.environment["RUNPOD_WEBHOOK_POST_OUTPUT"].split("/")[2]
    assert httpx.post(f"http://{host}/v2/e/job-done/worker-1/job-1", content=b"{}").status_code == 404
    assert platform.posts == []


def test_a_variable_that_the_platform_does_not_set_stays_unset(platform: FakePlatform) -> None:
    environment = {"RUNPOD_WEBHOOK_POST_OUTPUT": platform.environment["RUNPOD_WEBHOOK_POST_OUTPUT"]}
    with Outbox(environment) as outbox:
        assert set(outbox.environment) == set(environment)


@pytest.mark.parametrize("status", [401, 403, 307])
def test_a_gateway_that_refuses_for_a_moment_is_asked_again(
    status: int, outbox: Outbox, platform: FakePlatform
) -> None:
    platform.statuses = [status, status]
    assert post(outbox, {"output": 1}) == 200
    assert len(platform.posts) == 3


@pytest.mark.parametrize("status", [401, 403, 307])
def test_a_refusal_that_is_no_longer_doubted_is_final(status: int, platform: FakePlatform) -> None:
    platform.statuses = [status]
    with Outbox(platform.environment, doubt_s=0.0) as outbox:
        assert post(outbox, {"output": 1}) == status
    assert len(platform.posts) == 1


def test_a_stream_that_lost_a_piece_sends_no_more_and_ends_as_any_stream_that_failed(
    outbox: Outbox, platform: FakePlatform
) -> None:
    platform.statuses = [200, 413]
    assert piece(outbox, 0) == 200
    assert piece(outbox, 1) == 413
    assert piece(outbox, 2) != 200
    assert end(outbox) == 200
    told = json.loads(platform.posts[-1][2])
    assert told == error_piece(json.loads(told["error"]))
    about = json.loads(told["error"])
    assert set(about) == {"error", "error_code", "field"}
    assert "piece" in about["error"] and about["error_code"] == "internal"
    assert len(platform.posts) == 3
    assert end(outbox, job="job-2") == 200
    assert json.loads(platform.posts[-1][2]) == {"output": []}


def test_what_submits_batches_understands_how_a_broken_stream_ends(outbox: Outbox, platform: FakePlatform) -> None:
    platform.statuses = [413]
    piece(outbox, 0)
    end(outbox)
    failure = outcome_of({"status": "FAILED", **json.loads(platform.posts[-1][2])}).failure
    assert failure is not None and failure.code == "internal" and failure.may_pass
    assert "piece" in failure.message and "{" not in failure.message


def test_a_broken_stream_that_failed_by_itself_says_why(outbox: Outbox, platform: FakePlatform) -> None:
    platform.statuses = [413]
    piece(outbox, 0)
    own = {"error": json.dumps({"error": "too slow", "error_code": "timed_out", "field": None}), "stopPod": True}
    assert post(outbox, own, ends_stream=True) == 200
    assert json.loads(platform.posts[-1][2]) == own


def test_the_wish_for_a_fresh_worker_outlives_its_result(outbox: Outbox, platform: FakePlatform) -> None:
    platform.statuses = [413]
    piece(outbox, 0)
    end(outbox, stopPod=True)
    assert json.loads(platform.posts[-1][2])["stopPod"] is True
    platform.statuses = [413]
    post(outbox, {"output": {"audio": "x"}, "stopPod": True}, job="job-2")
    assert json.loads(platform.posts[-1][2])["stopPod"] is True


def test_a_streams_end_that_the_platform_does_not_take_is_told_in_a_streams_form(
    outbox: Outbox, platform: FakePlatform
) -> None:
    platform.statuses = [400]
    assert end(outbox) == 200
    told = json.loads(platform.posts[-1][2])
    assert set(told) == {"error"} and json.loads(told["error"])["error_code"] == "result_too_large"


def test_a_job_that_is_run_again_may_stream_although_its_stream_was_broken(
    outbox: Outbox, platform: FakePlatform
) -> None:
    platform.statuses = [200, 413]
    assert [piece(outbox, 0), piece(outbox, 1)] == [200, 413]  # and then it was stopped: it has no end
    assert [piece(outbox, 0), piece(outbox, 1)] == [200, 200]
    assert end(outbox) == 200
    assert json.loads(platform.posts[-1][2]) == {"output": []}


def test_a_stream_stays_broken_when_its_end_is_posted_twice(outbox: Outbox, platform: FakePlatform) -> None:
    platform.statuses = [413]
    piece(outbox, 0)
    assert [end(outbox), end(outbox)] == [200, 200]
    assert all("error" in json.loads(body) for _, _, body, _ in platform.posts[-2:])


def test_no_more_than_so_many_jobs_are_remembered(platform: FakePlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.outbox._MAX_REMEMBERED", 3)
    platform.statuses = [413] * 5
    with Outbox(platform.environment) as outbox:
        for number in range(5):
            piece(outbox, 0, job=f"j{number}")
        end(outbox, job="j0")
        assert json.loads(platform.posts[-1][2]) == {"output": []}
        end(outbox, job="j4")
        assert "error" in json.loads(platform.posts[-1][2])


def test_a_job_that_is_run_again_tells_its_progress_again(outbox: Outbox, platform: FakePlatform) -> None:
    progress = {"status": "IN_PROGRESS", "output": {"chunks_done": 1}}
    post(outbox, {"output": 1})
    outbox.begin("job-1")
    assert post(outbox, progress) == 200
    assert json.loads(platform.posts[-1][2]) == progress
    post(outbox, {"output": 2})
    post(outbox, progress)
    assert json.loads(platform.posts[-1][2]) == {"output": 2}


def test_the_loop_says_when_a_job_begins(outbox: Outbox, platform: FakePlatform) -> None:
    handler = loop._handler(BrokenWorker(JobError("internal", "broken")), None, outbox)
    post(outbox, {"output": 1})
    asyncio.run(handler({"id": "job-1", "input": {}}))
    post(outbox, {"status": "IN_PROGRESS", "output": 2})
    assert [json.loads(body)["output"] for _, _, body, _ in platform.posts] == [1, 2]


def test_what_goes_wrong_in_the_relay_itself_is_told_to_the_log(
    outbox: Outbox, platform: FakePlatform, caplog: pytest.LogCaptureFixture
) -> None:
    url = outbox.environment["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$ID", "job-1")
    with pytest.raises(httpx.HTTPError):
        httpx.post(url, content=b"no json", timeout=30)
    deadline = time.monotonic() + 20
    while "a post was given up" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_posts_go_to_the_platform_whatever_proxies_the_environment_names(
    platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with Outbox(platform.environment, patience_s=0.0) as outbox:
        url = outbox.environment["RUNPOD_WEBHOOK_POST_OUTPUT"]
        path = "/" + url.split("/", 3)[3]
        assert outbox.forward(path, KEY, b'{"output": 1}') == 200
    assert len(platform.posts) == 1


def test_a_result_too_large_for_any_platform_is_answered_in_its_place(
    outbox: Outbox, platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.outbox._MAX_BODY_BYTES", 10_000)
    assert post(outbox, {"output": {"audio": "x" * 25_000}}) == 200
    told = json.loads(platform.posts[-1][2])
    assert told["output"]["error_code"] == "result_too_large" and len(platform.posts) == 1
