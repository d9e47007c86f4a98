"""Recordings named by their address: fetched whole or not at all, in bounded time and memory, telling nothing."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import numpy as np
import pytest

from jobs.errors import JobError
from jobs.fetch import MAX_AT_ONCE, MAX_REDIRECTS, Fetcher
from jobs.guarded import Rules
from jobs.settings import Settings
from jobs.worker import Worker
from tests.jobs.https_server import HOST, Exchange, HttpsServer
from tests.jobs.https_server import server as server
from voice_library import S3Options

Recording = Callable[..., bytes]
MakeFetcher = Callable[..., Fetcher]

SECRET = "X-Amz-Signature=5ecre7"
PATIENCE_S = 20.0
"""For how long what should end soon may take on a machine under load."""


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.fetch._FIRST_WAIT_S", 0.001)


@pytest.fixture
def make_fetcher(server: HttpsServer, settings: Settings) -> Iterator[MakeFetcher]:
    made = []

    def make(rules: Rules | None = None, **changes: Any) -> Fetcher:
        made.append(Fetcher(settings.model_copy(update=changes), rules or server.rules()))
        return made[-1]

    yield make
    for fetcher in made:
        fetcher.close()


@pytest.fixture
def fetcher(make_fetcher: MakeFetcher) -> Fetcher:
    return make_fetcher()


def fetch(fetcher: Fetcher, address: str) -> bytes:
    async def fetched() -> bytes:
        return await fetcher(address, "reference_audio")

    return asyncio.run(fetched())


def refusal(fetcher: Fetcher, address: str) -> JobError:
    """Why it is not fetched; no word of the address may be in it."""
    with pytest.raises(JobError) as caught:
        fetch(fetcher, address)
    error = caught.value
    assert error.field == "reference_audio" and error.message.startswith("reference_audio: ")
    assert not any(word in error.message for word in ("5ecre7", "Amz", HOST, "127.0.0", "?"))
    return error


def signed(server: HttpsServer, path: str = "/a") -> str:
    return server.url(f"{path}?{SECRET}")


def run(worker: Worker, **fields: Any) -> dict[str, Any]:
    return asyncio.run(worker.run({"id": "1", "input": fields}))


# ---------------------------------------------------------------------------------- what a job gets


@pytest.mark.parametrize(("file_format", "content_type"), [("WAV", "audio/wav"), ("MP3", "text/html")])
def test_a_recording_at_an_address_gives_the_voice_that_it_gives_as_base64(
    file_format: str,
    content_type: str,
    server: HttpsServer,
    fetcher: Fetcher,
    engine: Any,
    settings: Settings,
    recording: Recording,
) -> None:
    data = recording(file_format=file_format)
    server.answers["/a"] = lambda exchange: exchange.answer(data, Content_Type=content_type)
    worker = Worker(engine, settings, fetch=fetcher)
    for source in (f" {signed(server)}\n", base64.b64encode(data).decode()):
        assert run(worker, text="Hello.", reference_audio=source)["voice"] == "reference"
    fetched, sent = (request.voice for request in engine.requests)
    assert fetched.key == sent.key
    totals = worker.metrics.totals().sums
    assert (totals["num_downloads"], totals["num_downloaded_bytes"]) == (1, len(data))
    worker.close()


def test_every_audio_field_may_be_an_address(
    server: HttpsServer, fetcher: Fetcher, engine: Any, settings: Settings, recording: Recording
) -> None:
    server.answers["/a"] = lambda exchange: exchange.answer(recording())
    worker = Worker(engine, settings, fetch=fetcher)
    url = server.url("/a")
    cloned = run(worker, operation="voice_clone", reference_audio=url, text="Hello.")
    converted = run(worker, operation="voice_conversion", input_audio=url, target_audio=url)
    assert cloned["voice_info"]["duration_s"] == converted["duration_s"] == 6.0
    worker.close()


def test_segments_that_name_one_address_cost_one_download(
    server: HttpsServer, fetcher: Fetcher, engine: Any, settings: Settings, recording: Recording
) -> None:
    server.answers["/a"] = server.answers["/b"] = lambda exchange: exchange.answer(recording())
    segments = [{"text": "One.", "reference_audio": server.url(path)} for path in ("/a", "/b", "/a", "/a")]
    worker = Worker(engine, settings, fetch=fetcher)
    result = run(
        worker, operation="long_form", segments=[*segments, {"text": "Two."}], reference_audio=server.url("/b")
    )
    assert "error" not in result
    assert sorted(server.requests) == ["/a", "/b"]
    missing = run(worker, operation="long_form", segments=[segments[0], {**segments[0], "reference_audio": "s3://x"}])
    assert (missing["error_code"], missing["field"]) == ("download_refused", "segments[1].reference_audio")
    worker.close()


def test_what_is_fetched_is_looked_at_like_what_is_sent(
    server: HttpsServer, fetcher: Fetcher, engine: Any, settings: Settings
) -> None:
    worker = Worker(engine, settings, fetch=fetcher)
    for body in (b"", b"<html>not found</html>"):
        server.answers["/a"] = lambda exchange, body=body: exchange.answer(body)  # type: ignore[misc]
        result = run(worker, text="Hello.", reference_audio=server.url("/a"))
        assert (result["error_code"], result["field"]) == ("reference_unreadable", "reference_audio")
    worker.close()


def test_a_workers_own_rules_let_it_reach_nothing_on_its_machine(
    server: HttpsServer, engine: Any, settings: Settings
) -> None:
    worker = Worker(engine, settings)
    for host in ("127.0.0.1", "localhost", HOST):
        result = run(worker, text="Hello.", reference_audio=server.url("/a", host=host))
        assert result["error_code"] == "download_refused"
    assert server.num_connections == 0
    worker.close()


# ---------------------------------------------------------------------------------- where it may lie


@pytest.mark.parametrize(
    "address",
    [
        *("https://10.0.0.1/a", "https://[::1]/a", "https://169.254.169.254/latest/meta-data/", "https://2130706433/a"),
        *("https://user:5ecre7@voices.example/a", "https://voices.example:22/a", "https://inside/a", "https://", "s3:"),
        f"https://voices.example/{'a' * 2_000}",
    ],
)
def test_an_address_that_may_not_be_reached_is_refused(address: str, fetcher: Fetcher) -> None:
    assert refusal(fetcher, address).code == "download_refused"


def test_refusals_of_addresses_inside_and_of_unknown_names_read_alike(make_fetcher: MakeFetcher) -> None:
    inside = make_fetcher(Rules(resolve=lambda host, port: ["10.0.0.1"]))
    told = {refusal(inside, f"https://{host}/a").message for host in ("a.example", "127.0.0.1", "[fd00:ec2::254]")}
    assert len(told) == 1


@pytest.mark.parametrize(
    "location", ["http://voices.example/a", "https://127.0.0.2/", "//10.0.0.1/", "https://[::ffff:7f00:1]/", "ftp://x/"]
)
def test_a_redirect_to_what_may_not_be_reached_is_refused(location: str, server: HttpsServer, fetcher: Fetcher) -> None:
    server.answers["/a"] = lambda exchange: exchange.redirect(location)
    assert refusal(fetcher, signed(server)).code == "download_refused"
    assert server.num_connections == 1


def _hops(num: int) -> Callable[[Exchange], None]:
    def answer(exchange: Exchange) -> None:
        hop = int(exchange.path.rpartition("=")[2])
        if hop < num:
            exchange.redirect(f"/a?hop={hop + 1}")
        else:
            exchange.answer(b"sound")

    return answer


def test_five_redirects_are_followed_and_a_loop_is_left(server: HttpsServer, fetcher: Fetcher) -> None:
    server.answers["/a"] = _hops(MAX_REDIRECTS)
    assert fetch(fetcher, server.url("/a?hop=0")) == b"sound"
    server.requests.clear()
    server.answers["/a"] = _hops(1_000)
    assert refusal(fetcher, server.url("/a?hop=0")).code == "download_failed"
    assert len(server.requests) == MAX_REDIRECTS + 1


def test_what_comes_with_a_redirect_is_not_read(server: HttpsServer, fetcher: Fetcher) -> None:
    def endless(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 302 Found\r\nLocation: /b\r\nTransfer-Encoding: chunked\r\n\r\n")
        exchange.wait_for_hang_up()

    server.answers["/a"] = endless
    server.answers["/b"] = lambda exchange: exchange.answer(b"sound")
    assert fetch(fetcher, server.url("/a")) == b"sound"


# ---------------------------------------------------------------------------------- how much of it


def test_a_length_over_the_limit_is_refused_before_anything_is_read(
    server: HttpsServer, make_fetcher: MakeFetcher
) -> None:
    server.answers["/a"] = lambda exchange: exchange.answer(b"sound", Content_Length=10**15)
    assert refusal(make_fetcher(max_reference_bytes=1_000), signed(server)).code == "reference_too_long"


def test_bytes_are_counted_as_they_come(server: HttpsServer, make_fetcher: MakeFetcher) -> None:
    def far_too_much(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2_000):
            exchange.send(b"1000\r\n" + bytes(4_096) + b"\r\n")
        exchange.send(b"0\r\n\r\n")

    server.answers["/a"] = far_too_much
    assert refusal(make_fetcher(max_reference_bytes=100_000), signed(server)).code == "reference_too_long"
    server.answers["/a"] = lambda exchange: exchange.answer(bytes(1_000))
    assert fetch(make_fetcher(max_reference_bytes=1_000), signed(server)) == bytes(1_000)
    assert refusal(make_fetcher(max_reference_bytes=999), signed(server)).code == "reference_too_long"


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_what_was_compressed_unasked_is_not_expanded(encoding: str, server: HttpsServer, fetcher: Fetcher) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    server.answers["/a"] = lambda exchange: exchange.answer(bomb, Content_Encoding=encoding)
    assert refusal(fetcher, signed(server)).code == "download_failed"
    assert "accept-encoding: identity\r\n" in server.heads[0].lower()


# ---------------------------------------------------------------------------------- when it goes wrong


@pytest.mark.parametrize(("status", "num_requests"), [("404 Not Found", 1), ("403 Forbidden", 1), ("304 Same", 1)])
def test_a_refusal_is_final(status: str, num_requests: int, server: HttpsServer, fetcher: Fetcher) -> None:
    server.answers["/a"] = lambda exchange: exchange.answer(b"no", status=status)
    error = refusal(fetcher, signed(server))
    assert error.code == "download_failed" and status[:3] in error.message
    assert len(server.requests) == num_requests


@pytest.mark.parametrize("status", ["500 Oh", "503 Busy", "429 Slowly"])
def test_a_server_in_trouble_is_asked_again(status: str, server: HttpsServer, fetcher: Fetcher) -> None:
    def recovers(exchange: Exchange) -> None:
        exchange.answer(b"sound") if len(server.requests) > 1 else exchange.answer(status=status)

    server.answers["/a"] = recovers
    assert fetch(fetcher, server.url("/a")) == b"sound"
    server.answers["/a"] = lambda exchange: exchange.answer(status=status)
    server.requests.clear()
    error = refusal(fetcher, signed(server))
    assert error.code == "download_failed" and status[:3] in error.message
    assert 1 < len(server.requests) < 10


def test_a_connection_cut_halfway_is_tried_again_and_half_a_file_is_never_taken(
    server: HttpsServer, fetcher: Fetcher
) -> None:
    def cut(exchange: Exchange) -> None:
        exchange.answer(b"half", Content_Length=8)

    server.answers["/a"] = lambda exchange: cut(exchange) if len(server.requests) < 3 else exchange.answer(b"whole")
    assert fetch(fetcher, server.url("/a")) == b"whole"
    server.answers["/a"] = cut
    assert refusal(fetcher, signed(server)).code == "download_failed"


def test_a_bad_certificate_is_told_and_not_tried_again(server: HttpsServer, fetcher: Fetcher) -> None:
    error = refusal(fetcher, server.url(f"/a?{SECRET}", host="other.example"))
    assert error.code == "download_failed" and "certificate" in error.message
    assert server.num_connections == 1


def test_nobody_at_the_address_is_a_failure(server: HttpsServer, fetcher: Fetcher) -> None:
    server.close()
    assert refusal(fetcher, signed(server)).code == "download_failed"


def _drip(head: bytes, drop: bytes, end: bytes) -> Callable[[Exchange], None]:
    """A whole answer, but over half a minute: who does not count the time gets it."""

    def answer(exchange: Exchange) -> None:
        exchange.send(head)
        for _ in range(1_500):
            if exchange.is_over.wait(0.02):
                return
            exchange.send(drop)
        exchange.send(end)

    return answer


SLOW = {
    "body": _drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", b"0\r\n\r\n"),
    "head": _drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", b"Content-Length: 0\r\n\r\n"),
    "word": _drip(b"HTTP/1.1 200 OK\r\nA: ", b"b", b"\r\nContent-Length: 0\r\n\r\n"),
    "silence": _drip(b"", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "stall": _drip(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na", b"", b"b"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_slow_server_is_left_when_the_time_is_over(kind: str, server: HttpsServer, make_fetcher: MakeFetcher) -> None:
    server.answers["/a"] = SLOW[kind]
    error = refusal(make_fetcher(fetch_timeout_s=0.3), signed(server))
    assert error.code == "download_failed" and "FETCH_TIMEOUT_S" in error.message


def test_a_cancelled_job_hangs_up(server: HttpsServer, fetcher: Fetcher, engine: Any, settings: Settings) -> None:
    is_asked, hung_up = threading.Event(), threading.Event()

    def wait(exchange: Exchange) -> None:
        is_asked.set()
        if exchange.wait_for_hang_up():
            hung_up.set()

    server.answers["/a"] = wait
    worker = Worker(engine, settings, fetch=fetcher)

    async def cancelled() -> None:
        job = {"id": "1", "input": {"text": "Hello.", "reference_audio": server.url("/a")}}
        task = asyncio.create_task(worker.run(job))
        while not is_asked.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE_S)
        assert task.cancelled()

    asyncio.run(cancelled())
    assert hung_up.wait(PATIENCE_S)
    worker.close()


def test_downloads_leave_the_loops_own_threads_alone_and_are_so_many_at_most(
    server: HttpsServer, fetcher: Fetcher
) -> None:
    class NoThreads(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("a download took a thread of the event loop's")

    lock, most, now = threading.Lock(), 0, 0
    is_full = threading.Event()

    def counted(exchange: Exchange) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
            if now >= MAX_AT_ONCE:
                is_full.set()
        assert is_full.wait(PATIENCE_S)
        exchange.is_over.wait(0.2)  # for more to come, if more may
        with lock:
            now -= 1
        exchange.answer(b"sound")

    server.answers["/a"] = counted

    async def all_fetched() -> list[bytes]:
        asyncio.get_running_loop().set_default_executor(NoThreads(1))
        return await asyncio.gather(*(fetcher(server.url("/a"), "reference_audio") for _ in range(3 * MAX_AT_ONCE)))

    assert asyncio.run(all_fetched()) == [b"sound"] * 3 * MAX_AT_ONCE
    assert most == MAX_AT_ONCE


def test_to_wait_for_a_thread_takes_none_of_the_servers_time(server: HttpsServer, make_fetcher: MakeFetcher) -> None:
    fetcher = make_fetcher(fetch_timeout_s=3.0)
    busy = threading.Event()
    for _ in range(MAX_AT_ONCE):
        fetcher._threads.submit(busy.wait)
    server.answers["/a"] = lambda exchange: exchange.answer(b"sound")

    async def fetched() -> bytes:
        task = asyncio.create_task(fetcher(server.url("/a"), "reference_audio"))
        await asyncio.sleep(0)
        (deadline,) = fetcher._running
        deadline._ends_s = -1.0  # as if it had waited for so long
        busy.set()
        return await task

    assert asyncio.run(fetched()) == b"sound"


def test_closing_ends_what_runs_and_takes_nothing_more(server: HttpsServer, fetcher: Fetcher) -> None:
    is_asked = threading.Event()

    def wait(exchange: Exchange) -> None:
        is_asked.set()
        exchange.wait_for_hang_up()

    server.answers["/a"] = wait

    async def closed() -> None:
        task = asyncio.create_task(fetcher(server.url("/a"), "reference_audio"))
        while not is_asked.is_set():
            await asyncio.sleep(0.01)
        fetcher.close()
        with pytest.raises(JobError):
            await asyncio.wait_for(task, PATIENCE_S)

    asyncio.run(closed())
    with pytest.raises(JobError, match="closing"):
        fetch(fetcher, server.url("/a"))


# ---------------------------------------------------------------------------------- buckets


@pytest.fixture
def client(s3_options: S3Options) -> Iterator[Any]:
    options = s3_options
    client = boto3.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
    )
    yield client
    client.close()


@pytest.fixture
def in_bucket(
    make_fetcher: MakeFetcher, s3_options: S3Options, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Fetcher]:
    """Makes fetchers that may read the bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def make(**changes: Any) -> Fetcher:
        usual = {"bucket_endpoint_url": s3_options.endpoint_url, "reference_buckets": bucket}
        return make_fetcher(**usual | changes)

    return make


@pytest.mark.parametrize("key", ["a.wav", "some/where/a b+c?d=ü.wav", "/a//b.wav", "%2e%2e/a"])
def test_an_object_of_an_allowed_bucket_is_fetched(
    key: str, in_bucket: Callable[..., Fetcher], bucket: str, client: Any
) -> None:
    client.put_object(Bucket=bucket, Key=key, Body=b"sound")
    assert fetch(in_bucket(reference_buckets=f"others, {bucket}"), f"s3://{bucket}/{key}") == b"sound"


def test_the_bucket_of_results_is_allowed_unless_buckets_are_named(
    in_bucket: Callable[..., Fetcher], bucket: str, client: Any
) -> None:
    client.put_object(Bucket=bucket, Key="a", Body=b"sound")
    address = f"s3://{bucket}/a"
    assert fetch(in_bucket(reference_buckets=None, bucket_name=bucket), address) == b"sound"
    for named in ("others", ",", None):
        fetcher = in_bucket(reference_buckets=named, bucket_name=None if named is None else bucket)
        assert refusal(fetcher, address).code == "download_refused"


def test_other_buckets_are_refused_alike_whether_they_are_there_or_not(
    in_bucket: Callable[..., Fetcher], bucket: str, client: Any
) -> None:
    other = f"{bucket}-other"
    client.create_bucket(Bucket=other)
    client.put_object(Bucket=other, Key="a", Body=b"sound")
    fetcher = in_bucket()
    told = {
        refusal(fetcher, address).message
        for address in (
            *(f"s3://{other}/a", "s3://nowhere/a", f"s3://{bucket}/../{other}/a", f"s3://{bucket}/b/../../{other}/a"),
            *(f"s3://{bucket}/./a", f"s3://{bucket}", f"s3://{bucket}/", "s3://", f"s3://{bucket}/a\nb"),
            *(f"s3://{bucket}/{'a' * 1_025}", f"s3://key:secret@{bucket}/a", f"s3://{bucket}.evil/a"),
        )
    }
    assert len(told) == 1
    assert refusal(fetcher, f"s3://{bucket}/missing").code == "download_failed"


def test_a_large_object_is_not_read_to_its_end(in_bucket: Callable[..., Fetcher], bucket: str, client: Any) -> None:
    client.put_object(Bucket=bucket, Key="a", Body=bytes(300_000))
    assert len(fetch(in_bucket(max_reference_bytes=300_000), f"s3://{bucket}/a")) == 300_000
    assert refusal(in_bucket(max_reference_bytes=299_999), f"s3://{bucket}/a").code == "reference_too_long"


def test_an_endpoint_that_cannot_be_reached_or_used_is_a_failure(
    in_bucket: Callable[..., Fetcher], bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    away = in_bucket(bucket_endpoint_url="http://127.0.0.1:9", fetch_timeout_s=2)
    told = refusal(away, f"s3://{bucket}/clients-key")
    assert told.code == "download_failed" and "connection" in told.message  # tried again until the time was over
    odd = in_bucket(bucket_endpoint_url="not an address")
    assert refusal(odd, f"s3://{bucket}/clients-key").code == "download_failed"
    assert "clients-key" not in caplog.text


# ---------------------------------------------------------------------------------- what decoding takes


def test_a_fetched_recording_that_expands_to_hours_is_refused(
    server: HttpsServer, fetcher: Fetcher, engine: Any, settings: Settings
) -> None:
    import soundfile

    target = io.BytesIO()
    with soundfile.SoundFile(target, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(120):
            file.write(np.zeros(8_000 * 60, np.float32))
    data = target.getvalue()
    server.answers["/a"] = lambda exchange: exchange.answer(data)
    worker = Worker(engine, settings, fetch=fetcher)
    result = run(worker, text="Hello.", reference_audio=server.url("/a"))
    assert len(data) < 2_000_000 and result["error_code"] == "reference_too_long"
    worker.close()
