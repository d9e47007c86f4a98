"""Audio in a bucket: all of it, under a name of its own, or an error that says what became of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile

from jobs import bucket as bucket_module
from jobs.audio_file import AudioFile
from jobs.bucket import GivenBucket, Label, OwnBucket, deliver, open_bucket
from jobs.errors import JobError
from jobs.guarded import Deadline
from jobs.intake import derived_seed
from jobs.s3_config import S3Config, parse_s3_config
from jobs.schema import parse_job
from jobs.settings import Settings
from jobs.work import Work
from jobs.worker import Worker
from tests.jobs.conftest import ToneEngine
from tests.jobs.test_long_form import Scripted, num_nameless_files
from tests.jobs.voice_support import run
from tests.voice_library.test_voices_s3_failures import without_rights
from voice_library import S3Options
from voice_library.folder_store import FolderStore
from voice_library.s3_store import s3_client

PART_BYTES = 5 << 20
"""S3 takes no smaller parts but the last."""

SECRET = "a-secret-that-nobody-may-see"
LABEL = Label("job-1", None, "wav")


class Flaky:
    """A server before the S3 service, which answers so many requests itself, badly, before it hands them on.

    Attributes:
        num_to_fail: how many requests it still fails; those of `only`, where that is not None.
        status: what it answers then; 0 for hanging up.
        seen: method and path of all requests.
    """

    def __init__(self, target: str) -> None:
        self.num_to_fail, self.status = 0, 503
        self.only: Callable[[str, str], bool] = lambda _method, _path: True
        self.seen: list[tuple[str, str]] = []
        flaky, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    flaky.seen.append((self.command, self.path))
                    fails = flaky.num_to_fail > 0 and flaky.only(self.command, self.path)
                    flaky.num_to_fail -= fails
                if fails and not flaky.status:
                    self.close_connection = True
                    return
                headers = {name: value for name, value in self.headers.items() if name != "Expect"}
                got = (
                    httpx.Response(flaky.status, content=b"<Error><Code>SlowDown</Code></Error>")
                    if fails
                    else httpx.request(self.command, target + self.path, headers=headers, content=body)
                )
                self.send_response(got.status_code)
                for name in ("ETag", "Content-Type"):
                    if name in got.headers:
                        self.send_header(name, got.headers[name])
                self.send_header("Content-Length", str(len(got.content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(got.content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def flaky(s3_options: S3Options) -> Iterator[Flaky]:
    server = Flaky(s3_options.endpoint_url or "")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(bucket_module, "PATIENCE_S", 5.0)


def objects(bucket: str, options: S3Options) -> dict[str, bytes]:
    """All objects of a bucket, by name."""
    with contextlib.closing(s3_client(options)) as client:
        names = [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", ())]
        return {name: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}


def num_uploads_under_way(bucket: str, options: S3Options) -> int:
    with contextlib.closing(s3_client(options)) as client:
        return len(client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()))


def impatient(url: str) -> S3Options:
    return S3Options(url, "us-east-1", "id", SECRET, connect_timeout_s=1.0, read_timeout_s=2.0, attempts=1)


def own(bucket: str, options: S3Options, **changes: Any) -> OwnBucket:
    return OwnBucket(bucket, "", options, **{"url_lifetime_s": 600, **changes})


def fetched(url: str) -> httpx.Response:
    answer = httpx.get(url)
    answer.raise_for_status()
    return answer


@pytest.fixture
def with_bucket(settings: Settings, bucket: str, s3_options: S3Options, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a deployment with a bucket, and results of at most 100 KB."""
    monkeypatch.setenv("BUCKET_NAME", bucket)
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3_options.endpoint_url or "")
    monkeypatch.setenv("BUCKET_REGION", "us-east-1")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MAX_RESULT_BYTES", "100000")
    return Settings()


@pytest.fixture
def delivering(engine: ToneEngine, with_bucket: Settings) -> Iterator[Worker]:
    worker = Worker(engine, with_bucket, bucket=open_bucket(with_bucket))
    yield worker
    worker.close()


# ---------------------------------------------------------------------------------- where it goes


def test_audio_goes_into_the_result_where_it_fits_and_into_the_bucket_where_it_does_not(
    delivering: Worker, settings: Settings, bucket: str, s3_options: S3Options
) -> None:
    small, large = run(delivering, text="One.", seed=1), run(delivering, text="One. " * 30, seed=1)
    assert "audio" in small and "audio_url" not in small
    assert "audio" not in large and large["audio_url_expires_s"] == 86_400
    unlimited = Worker(ToneEngine(), settings.model_copy(update={"max_result_bytes": 0}))
    whole = base64.b64decode(run(unlimited, text="One. " * 30, seed=1)["audio"])
    assert fetched(large["audio_url"]).content == whole
    assert list(objects(bucket, s3_options).values()) == [whole]
    assert run(delivering, text="One. " * 30, delivery="inline")["error_code"] == "result_too_large"


def test_what_is_asked_to_go_into_the_bucket_goes_there_however_small(delivering: Worker, reference: str) -> None:
    jobs: list[dict[str, Any]] = [
        {"text": "One."},
        {"operation": "long_form", "text": "One."},
        {"operation": "voice_clone", "reference_audio": reference, "text": "One."},
        {"operation": "voice_clone", "reference_audio": reference},
        {"operation": "voice_conversion", "input_audio": reference},
    ]
    for fields in jobs:
        result = run(delivering, **fields, delivery="s3")
        assert not {"audio", "sample_audio"} & set(result), result
        audio, rate = soundfile.read(io.BytesIO(fetched(result["audio_url"]).content))
        assert audio.size / rate == pytest.approx(result["duration_s"], abs=1e-3)
        assert result["timings"]["total"] >= result["timings"]["upload"] > 0
        is_sample = fields["operation"] == "voice_clone" and "text" not in fields if "operation" in fields else False
        assert result.get("sample_audio_url") == (result["audio_url"] if is_sample else None)


def test_two_copies_of_a_sample_count_twice(engine: ToneEngine, with_bucket: Settings, reference: str) -> None:
    roomy = with_bucket.model_copy(update={"max_result_bytes": 170_000})  # 64 KB are left for what is said of a voice
    worker = Worker(engine, roomy, bucket=open_bucket(with_bucket))
    clone = {"operation": "voice_clone", "reference_audio": reference, "seed": 1}
    sample = run(worker, **clone)
    said = run(worker, **clone, text=engine.requests[0].text)
    assert "sample_audio_url" in sample and "audio" in said and said["duration_s"] == sample["duration_s"]
    worker.close()


def test_audio_longer_than_a_result_is_only_refused_ahead_where_there_is_no_bucket(
    delivering: Worker, settings: Settings, reference: str
) -> None:
    convert = {"operation": "voice_conversion", "input_audio": reference}  # 6 s, 288 KB
    assert "audio_url" in run(delivering, **convert)
    assert "error" not in run(delivering, operation="long_form", text="One. [pause 10s] Two.")
    for worker, fields in (
        (Worker(ToneEngine(), settings.model_copy(update={"max_result_bytes": 100_000})), {}),
        (delivering, {"delivery": "inline"}),
    ):
        for job in (convert, {"operation": "long_form", "text": "One. [pause 10s] Two."}):
            assert run(worker, **job, **fields)["error_code"] == "result_too_large"


def test_a_bucket_is_asked_for_in_vain_before_anything_is_spoken(worker: Worker, engine: ToneEngine) -> None:
    for fields in ({"text": "One."}, {"operation": "long_form", "text": "One."}):
        result = run(worker, **fields, delivery="s3")
        assert (result["error_code"], result["field"]) == ("invalid_request", "delivery")
        assert "s3Config" in result["error"]
    assert engine.requests == []


def test_a_stream_takes_no_bucket(with_bucket: Settings, engine: ToneEngine) -> None:
    streaming = Worker(engine, with_bucket, bucket=open_bucket(with_bucket))

    async def last(job: dict[str, Any]) -> dict[str, Any]:
        return [piece async for piece in streaming.stream(job)][-1]

    refused = asyncio.run(last({"id": "1", "input": {"text": "One.", "delivery": "s3"}}))
    assert json.loads(refused["error"])["field"] == "delivery" and "STREAMING" in refused["error"]
    own_bucket = asyncio.run(last({"id": "1", "input": {"text": "One. " * 60}, "s3Config": GIVEN}))
    assert own_bucket["final"] and own_bucket["warnings"] == [
        "s3Config was ignored: this worker gives its audio in pieces (STREAMING)"
    ]
    streaming.close()


def test_what_is_said_beside_the_audio_is_checked_before_it_is_uploaded(
    engine: ToneEngine, with_bucket: Settings, bucket: str, s3_options: S3Options
) -> None:
    tiny = with_bucket.model_copy(update={"max_result_bytes": 4_500})
    worker = Worker(engine, tiny, bucket=open_bucket(tiny))
    result = run(worker, text="One. " * 150, delivery="s3")
    assert result["error_code"] == "result_too_large" and "opus" not in result["error"]
    assert objects(bucket, s3_options) == {}
    worker.close()


# ---------------------------------------------------------------------------------- what it is called


def test_a_file_says_what_it_is_and_is_called_by_its_title(delivering: Worker) -> None:
    for audio_format, kind in bucket_module.CONTENT_TYPES.items():
        result = run(delivering, text="One.", delivery="s3", output_format=audio_format, title='A "tale" of/two\n')
        headers = fetched(result["audio_url"]).headers
        assert headers["Content-Type"] == kind
        assert headers["Content-Disposition"] == f'inline; filename="A tale oftwo.{audio_format}"'
    foreign = Label("j", "Märchen 夜", "mp3").headers["ContentDisposition"]
    assert foreign == "inline; filename=\"Marchen.mp3\"; filename*=UTF-8''M%C3%A4rchen%20%E5%A4%9C.mp3"
    assert 'filename="job-7.opus"' in Label("job-7", None, "opus").headers["ContentDisposition"]


def test_no_job_overwrites_or_guesses_another_ones_audio(
    engine: ToneEngine, with_bucket: Settings, bucket: str, s3_options: S3Options
) -> None:
    prefixed = with_bucket.model_copy(update={"bucket_prefix": "speech/"})
    worker = Worker(engine, prefixed, bucket=open_bucket(prefixed))
    for _ in range(2):
        job = {"id": "../a b/ü-7", "input": {"text": "One.", "delivery": "s3"}}
        assert "audio_url" in asyncio.run(worker.run(job))
    names = list(objects(bucket, s3_options))
    assert len(set(names)) == 2
    for name in names:
        folder, _, last = name.rpartition("/")
        assert folder == "speech/a-b-7" and len(last) == len(".wav") + 32 and last.endswith(".wav")
    worker.close()


# ---------------------------------------------------------------------------------- large files


def temporary(num_bytes: int) -> tuple[Any, bytes]:
    data = bytes(range(256)) * (num_bytes // 256)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by whoever asked
    file.write(data)
    file.flush()
    return file, data


def test_a_file_on_disk_goes_up_in_parts_and_is_only_read(bucket: str, s3_options: S3Options) -> None:
    file, data = temporary(12_000_000)
    file.seek(77)
    with contextlib.closing(own(bucket, s3_options, part_bytes=PART_BYTES)) as place:
        name = asyncio.run(deliver(AudioFile.of_temporary(file), LABEL, place, time_left_s=60.0))
    assert file.tell() == 77
    assert objects(bucket, s3_options) == {name: data}
    with contextlib.closing(s3_client(s3_options)) as client:
        assert client.head_object(Bucket=bucket, Key=name)["ETag"].endswith('-3"')
    file.close()


def test_a_part_that_fails_is_sent_again_and_no_part_is_left(bucket: str, flaky: Flaky, s3_options: S3Options) -> None:
    flaky.num_to_fail, flaky.only = 2, lambda _method, path: "partNumber=2" in path
    file, data = temporary(12_000_000)
    with contextlib.closing(own(bucket, impatient(flaky.url), part_bytes=PART_BYTES)) as place:
        name = asyncio.run(deliver(AudioFile.of_temporary(file), LABEL, place, time_left_s=60.0))
    assert objects(bucket, s3_options) == {name: data} and num_uploads_under_way(bucket, s3_options) == 0
    file.close()


@pytest.mark.parametrize("also_aborts", [True, False])
def test_an_upload_that_never_succeeds_leaves_no_parts(
    bucket: str, flaky: Flaky, s3_options: S3Options, monkeypatch: pytest.MonkeyPatch, also_aborts: bool
) -> None:
    monkeypatch.setattr(bucket_module, "PATIENCE_S", 0.3)
    is_first_abort = iter([True])

    def fails(method: str, path: str) -> bool:
        return "partNumber=2" in path or (not also_aborts and method == "DELETE" and next(is_first_abort, False))

    flaky.num_to_fail, flaky.only = 1_000, fails
    file, _ = temporary(12_000_000)
    with contextlib.closing(own(bucket, impatient(flaky.url), part_bytes=PART_BYTES)) as place:
        error = refusal(AudioFile.of_temporary(file), place)
    assert error.code == "storage_failed" and "SlowDown" in error.message
    assert objects(bucket, s3_options) == {} and num_uploads_under_way(bucket, s3_options) == 0
    file.close()


def test_an_upload_that_is_given_up_leaves_no_parts(bucket: str, flaky: Flaky, s3_options: S3Options) -> None:
    is_hanging, may_go_on = threading.Event(), threading.Event()

    def hangs(_method: str, path: str) -> bool:
        if "partNumber=2" in path:
            is_hanging.set()
            may_go_on.wait(20)
        return False

    flaky.num_to_fail, flaky.only = 1, hangs
    file, _ = temporary(12_000_000)

    async def give_up(place: OwnBucket) -> None:
        job = asyncio.create_task(deliver(AudioFile.of_temporary(file), LABEL, place, time_left_s=60.0))
        await asyncio.to_thread(is_hanging.wait, 20)
        job.cancel()
        file.close()  # as the job's end does, whatever threads still do
        may_go_on.set()
        with contextlib.suppress(asyncio.CancelledError):
            await job
        assert job.cancelled()

    with contextlib.closing(own(bucket, impatient(flaky.url), part_bytes=PART_BYTES)) as place:
        asyncio.run(give_up(place))
    assert objects(bucket, s3_options) == {} and num_uploads_under_way(bucket, s3_options) == 0


def test_a_long_job_goes_from_its_file_into_the_bucket_and_leaves_none(
    with_bucket: Settings, bucket: str, s3_options: S3Options, tmp_path: Path
) -> None:
    work = Work(FolderStore(tmp_path / "checkpoints"), max_age_s=1e6, max_bytes=1 << 30)
    num_before = num_nameless_files()
    worker = Worker(Scripted(20), with_bucket, work=work, bucket=open_bucket(with_bucket))
    result = run(worker, operation="long_form", text="One.")
    audio, rate = soundfile.read(io.BytesIO(fetched(result["audio_url"]).content))
    assert audio.size / rate == result["duration_s"] == 20.0
    worker.close()
    assert not list((tmp_path / "checkpoints").rglob("*.*"))
    deadline = time.monotonic() + 20
    while num_nameless_files() > num_before:  # the job's thread closes its file, and nobody waits for that
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_file_can_be_read_by_several_at_once_and_after_its_owner_closed_it() -> None:
    file, data = temporary(100_000)
    audio = AudioFile.of_temporary(file)
    first, second = audio.open(), audio.open()
    assert first.read(10) == second.read(10) == data[:10]
    file.close()
    assert first.read() == data[10:] and second.seek(-256, 2) == len(data) - 256 and second.read() == data[-256:]
    first.close()
    assert first.closed and not second.closed and second.seek(0) == 0 and second.read(3) == data[:3]
    second.close()
    assert base64.b64decode(AudioFile.of_bytes(data).as_base64()) == data
    assert AudioFile.of_bytes(b"four").num_base64_chars == len(AudioFile.of_bytes(b"four").as_base64())


# ---------------------------------------------------------------------------------- buckets that fail


def refusal(audio: AudioFile, place: OwnBucket | GivenBucket, time_left_s: float | None = 60.0) -> JobError:
    with pytest.raises(JobError) as caught:
        asyncio.run(deliver(audio, LABEL, place, time_left_s=time_left_s))
    assert SECRET not in caught.value.message and "X-Amz" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("status", [500, 503, 429, 0])
def test_a_bucket_that_is_away_for_a_while_gets_the_audio_when_it_is_back(
    bucket: str, flaky: Flaky, s3_options: S3Options, status: int
) -> None:
    flaky.num_to_fail, flaky.status = 3, status
    with contextlib.closing(own(bucket, impatient(flaky.url))) as place:
        name = asyncio.run(deliver(AudioFile.of_bytes(b"speech"), LABEL, place, time_left_s=60.0))
    assert objects(bucket, s3_options) == {name: b"speech"}


def test_a_bucket_that_stays_away_is_an_error_before_the_jobs_time_is_over(bucket: str, flaky: Flaky) -> None:
    flaky.num_to_fail = 10_000
    with contextlib.closing(own(bucket, impatient(flaky.url))) as place:
        error = refusal(AudioFile.of_bytes(b"speech"), place, time_left_s=1.0)
    assert error.code == "storage_failed"
    assert (
        error.message
        == f"the audio could not be put into the bucket {bucket} (BUCKET_NAME): it answered 503 (SlowDown)"
    )


@pytest.mark.parametrize("time_left_s", [0.0, 0.4])
def test_a_bucket_that_does_not_answer_costs_no_more_than_the_jobs_time(bucket: str, time_left_s: float) -> None:
    with contextlib.ExitStack() as held:
        silent = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        patient = S3Options(f"http://127.0.0.1:{silent.getsockname()[1]}", "us-east-1", "id", SECRET)
        place = own(bucket, patient)
        error = refusal(AudioFile.of_bytes(b"speech"), place, time_left_s)
        assert error.code == "storage_failed" and "no time left" in error.message
    place.close()


def test_what_will_not_pass_is_not_tried_again(bucket: str, s3_options: S3Options, flaky: Flaky) -> None:
    with contextlib.closing(own("no-such-bucket", impatient(flaky.url))) as place:
        assert "does not exist" in refusal(AudioFile.of_bytes(b"speech"), place).message
    assert len([1 for method, _ in flaky.seen if method == "PUT"]) == 1
    with without_rights(s3_options), contextlib.closing(own(bucket, impatient(flaky.url))) as place:
        assert "access denied (InvalidAccessKeyId)" in refusal(AudioFile.of_bytes(b"speech"), place).message
    assert len([1 for method, _ in flaky.seen if method == "PUT"]) == 2


def test_a_job_whose_upload_fails_says_so_and_one_that_fits_never_needed_it(
    with_bucket: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bucket_module, "PATIENCE_S", 0.05)
    away = with_bucket.model_copy(update={"bucket_endpoint_url": "http://127.0.0.1:9"})
    work = Work(FolderStore(tmp_path / "checkpoints"), max_age_s=1e6, max_bytes=1 << 30)
    worker = Worker(Scripted(20, keeps=True), away, work=work, bucket=open_bucket(away))
    result = run(worker, operation="long_form", text="One.")
    assert result["error_code"] == "storage_failed" and "kept in WORK_DIR" in result["error"]
    assert SECRET not in result["error"]
    assert "audio" in run(worker, text="One.")
    worker.close()


def test_a_result_that_only_its_texts_make_too_large_names_what_is_kept(settings: Settings, tmp_path: Path) -> None:
    work = Work(FolderStore(tmp_path / "checkpoints"), max_age_s=1e6, max_bytes=1 << 30)
    engine = Scripted(12, keeps=True)
    job = {"operation": "long_form", "text": "One.", "output_format": "flac"}
    roomy = run(Worker(engine, settings, work=work), **job)
    audio_bytes = len(roomy["audio"])
    result = run(Worker(engine, settings.model_copy(update={"max_result_bytes": audio_bytes + 10}), work=work), **job)
    assert result["error_code"] == "result_too_large" and "kept in WORK_DIR" in result["error"]


# ---------------------------------------------------------------------------------- a job's own bucket


GIVEN = {
    "accessId": "AKIDEXAMPLE",
    "accessSecret": SECRET,
    "bucketName": "theirs",
    "endpointUrl": "https://s3.test.example",
}


class _Redirecting(httpx.BaseTransport):
    """Carries requests for anywhere to the test's own service, or answers them as it was told to."""

    def __init__(self, endpoint_url: str, answers: list[tuple[int, str]]) -> None:
        self._endpoint, self._answers = httpx.URL(endpoint_url), answers
        self._transport = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.scheme == "https", request.url
        if self._answers:
            status, code = self._answers.pop(0)
            if not status:
                raise httpx.ConnectError(str(request.url))
            said = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
            return httpx.Response(status, stream=httpx.ByteStream(said))
        there = request.url.copy_with(scheme="http", host=self._endpoint.host, port=self._endpoint.port)
        headers = {**request.headers, "host": "127.0.0.1"}  # moto looks for a bucket in names
        return self._transport.handle_request(
            httpx.Request(request.method, there, headers=headers, stream=request.stream)
        )

    def close(self) -> None:
        self._transport.close()


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch, s3_options: S3Options) -> list[tuple[int, str]]:
    """What goes to a job's own bucket goes to the test's service; what is put in here is answered first."""
    answers: list[tuple[int, str]] = []

    def client(_deadline: Deadline) -> httpx.Client:
        return httpx.Client(transport=_Redirecting(s3_options.endpoint_url or "", answers))

    monkeypatch.setattr(bucket_module, "guarded_client", client)
    return answers


def run_with(worker: Worker, given: Any, **fields: Any) -> dict[str, Any]:
    return asyncio.run(worker.run({"id": "job-1", "input": fields, "s3Config": given}))


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_job_that_brings_a_bucket_finds_its_audio_there_and_its_secret_nowhere(
    worker: Worker, bucket: str, s3_options: S3Options, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    given = GIVEN | {"bucketName": bucket}
    with caplog.at_level(logging.DEBUG):
        if place == "beside":
            result = run_with(worker, given, text="One.", title="Ours")
        else:
            result = run(worker, text="One.", title="Ours", s3Config=given)
    ((name, data),) = objects(bucket, s3_options).items()
    assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(result["duration_s"], abs=1e-3)
    url = httpx.URL(result["audio_url"])
    assert url.host == "s3.test.example" and url.path == f"/{bucket}/{name}"
    there = str(url.copy_with(scheme="http", host="127.0.0.1", port=httpx.URL(s3_options.endpoint_url or "").port))
    answer = fetched(there)
    assert answer.content == data and answer.headers["Content-Type"] == "audio/wav"
    assert 'filename="Ours.wav"' in answer.headers["Content-Disposition"]
    ours = "\n".join(record.getMessage() for record in caplog.records)
    assert SECRET not in json.dumps(result) + ours


@pytest.mark.usefixtures("carried")
def test_a_job_that_brings_a_bucket_may_want_its_audio_in_the_result_all_the_same(
    worker: Worker, bucket: str, s3_options: S3Options
) -> None:
    given = GIVEN | {"bucketName": bucket}
    for delivery in ("auto", "inline"):
        assert "audio" in run_with(worker, given, text="One.", delivery=delivery)
    assert objects(bucket, s3_options) == {}


@pytest.mark.usefixtures("carried")
def test_a_large_file_goes_into_a_jobs_own_bucket_at_once(bucket: str, s3_options: S3Options) -> None:
    file, data = temporary(6_000_000)
    options = S3Options("https://s3.test.example", "us-east-1", "id", SECRET)
    place = GivenBucket(bucket, "theirs", options, url_lifetime_s=60)
    name = asyncio.run(deliver(AudioFile.of_temporary(file), LABEL, place, time_left_s=60.0))
    assert objects(bucket, s3_options) == {name: data}
    assert asyncio.run(place.has(name)) and not asyncio.run(place.has("other"))
    place.close()
    file.close()


def test_a_jobs_own_bucket_that_refuses_is_told_by_what_it_answered(
    worker: Worker,
    bucket: str,
    carried: list[tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = run_with(worker, GIVEN | {"bucketName": "no-such-bucket"}, text="One.")
    assert result["error_code"] == "storage_failed" and "the bucket does not exist" in result["error"]
    for status, code, told in (
        (403, "SignatureDoesNotMatch", "access denied (SignatureDoesNotMatch)"),
        (301, "PermanentRedirect", "another region"),
        (418, "", "it answered 418"),
    ):
        carried.append((status, code))
        result = run_with(worker, GIVEN | {"bucketName": bucket}, text="One.")
        assert told in result["error"] and "s3Config" in result["error"] and carried == []
        assert SECRET not in result["error"] and "AKIDEXAMPLE" not in result["error"]
    carried += [(503, "SlowDown"), (0, ""), (0, "")]
    assert "audio_url" in run_with(worker, GIVEN | {"bucketName": bucket}, text="One.")
    assert carried == []
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("jobs")]
    assert any("cannot be reached" in line for line in ours) and not any("X-Amz" in line for line in ours)
    monkeypatch.setattr(GivenBucket, "max_bytes", 100)
    result = run_with(worker, GIVEN | {"bucketName": bucket}, text="One.")
    assert (result["error_code"], result["field"]) == ("result_too_large", "output_format")


@pytest.mark.parametrize("endpoint", ["https://127.0.0.1", "https://169.254.169.254/latest", "https://[::1]"])
def test_a_jobs_own_bucket_is_never_inside_the_workers_network(worker: Worker, endpoint: str) -> None:
    result = run_with(worker, GIVEN | {"endpointUrl": endpoint}, text="One.")
    assert (result["error_code"], result["field"]) == ("invalid_request", "s3Config.endpointUrl")


def test_a_service_that_never_answers_holds_no_job_beyond_its_time(settings: Settings) -> None:
    hangs = threading.Event()

    class Hanging(httpx.BaseTransport):
        def __init__(self, deadline: Deadline) -> None:
            self._deadline = deadline

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            hangs.set()
            while not self._deadline.is_over:
                self._deadline.rest(0.01)
            raise httpx.ReadTimeout("over")

    options = S3Options("https://s3.test.example", "us-east-1", "id", SECRET)
    place = GivenBucket(
        "b", "theirs", options, url_lifetime_s=60, make_client=lambda end: httpx.Client(transport=Hanging(end))
    )
    assert refusal(AudioFile.of_bytes(b"speech"), place, time_left_s=0.6).code == "storage_failed"

    async def give_up() -> None:
        hangs.clear()
        job = asyncio.create_task(deliver(AudioFile.of_bytes(b"speech"), LABEL, place, time_left_s=None))
        await asyncio.to_thread(hangs.wait, 20)
        job.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await job

    asyncio.run(give_up())
    place._thread.shutdown(wait=True)  # its thread was woken, or this would never end


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"accessId": None}, "s3Config.accessId"),
        ({"accessSecret": None}, "s3Config.accessSecret"),
        ({"accessSecret": ""}, "s3Config.accessSecret"),
        ({"accessSecret": 7}, "s3Config.accessSecret"),
        ({"accessSecret": [SECRET]}, "s3Config.accessSecret"),
        ({"accessId": f"{SECRET}\n"}, "s3Config.accessId"),
        ({"accessId": SECRET * 20}, "s3Config.accessId"),
        ({"bucketName": None}, "s3Config.bucketName"),
        ({"bucketName": f"{SECRET}/x"}, "s3Config.bucketName"),
        ({"bucketName": "a?b"}, "s3Config.bucketName"),
        ({"bucketName": "a--use1-az4--x-s3"}, "s3Config.bucketName"),
        ({"endpointUrl": "http://s3.test.example"}, "s3Config.endpointUrl"),
        ({"endpointUrl": f"https://id:{SECRET}@s3.test.example"}, "s3Config.endpointUrl"),
        ({"endpointUrl": f"https://s3.test.example?x={SECRET}"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://s3.test.example:9000"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://localhost"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://\ud800"}, "s3Config.endpointUrl"),
        ({"endpointUrl": ["https://s3.test.example"]}, "s3Config.endpointUrl"),
        ({"region": "eu west"}, "s3Config.region"),
        ({SECRET: 1}, "s3Config"),
        ({"accessKey": 1}, "s3Config"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_bucket_that_cannot_be_one_is_refused_by_its_field_and_shows_no_secret(
    worker: Worker, engine: ToneEngine, changes: dict[str, Any], field: str, place: str
) -> None:
    given = GIVEN | changes
    result = run_with(worker, given, text="One.") if place == "beside" else run(worker, text="One.", s3Config=given)
    assert (result["error_code"], result["field"]) == ("invalid_request", field)
    assert SECRET not in json.dumps(result) and engine.requests == []


@pytest.mark.parametrize("given", [[], "x", 7, True])
def test_what_is_no_object_is_no_bucket(worker: Worker, given: Any) -> None:
    assert run_with(worker, given, text="One.")["field"] == "s3Config"
    assert run_with(worker, GIVEN, text="One.", s3Config=GIVEN)["field"] == "s3Config"


def test_a_bucket_for_no_audio_is_a_warning(worker: Worker) -> None:
    assert run_with(worker, GIVEN, operation="info")["warnings"] == [
        "s3Config was ignored: operation info gives no audio"
    ]
    assert "s3Config" not in parse_job({"input": {"text": "One."}, "s3Config": GIVEN}).request.model_dump()


@pytest.mark.parametrize(
    ("endpoint", "region"),
    [
        ("https://s3.eu-west-1.amazonaws.com", "eu-west-1"),
        ("https://s3-eu-west-1.amazonaws.com/", "eu-west-1"),
        ("https://s3.dualstack.us-east-2.amazonaws.com", "us-east-2"),
        ("https://s3.amazonaws.com", "us-east-1"),
        ("https://s3.us-west-004.backblazeb2.com", "us-west-004"),
        ("https://nyc3.digitaloceanspaces.com", "nyc3"),
        ("https://s3api-eu-ro-1.runpod.io", "eu-ro-1"),
        ("https://account.r2.cloudflarestorage.com", "us-east-1"),
        (None, "us-east-1"),
    ],
)
def test_the_region_is_what_the_address_says(endpoint: str | None, region: str) -> None:
    assert parse_s3_config(GIVEN | {"endpointUrl": endpoint}).known_region == region
    assert parse_s3_config(GIVEN | {"endpointUrl": endpoint, "region": "eu-1"}).known_region == "eu-1"


def test_a_bucket_shows_its_secrets_in_no_representation() -> None:
    config = parse_s3_config(GIVEN)
    assert isinstance(config, S3Config)
    assert SECRET not in f"{config!r}{config}{config.model_dump()}{config.place}"


# ---------------------------------------------------------------------------------- seeds that repeat


def test_a_job_that_is_run_again_has_the_same_seed(worker: Worker, reference: str) -> None:
    def seed(job_id: str | None, **fields: Any) -> int:
        result = asyncio.run(worker.run({"id": job_id, "input": fields} if job_id else {"input": fields}))
        return int(result["seed"])

    convert = {"operation": "voice_conversion", "input_audio": reference}
    for fields in ({"text": "One."}, convert):
        assert seed("a", **fields) == seed("a", **fields) == derived_seed("job", "a") != seed("b", **fields)
        keyed = {**fields, "idempotency_key": "k"}
        assert seed("a", **keyed) == seed("b", **keyed) == seed(None, **keyed) == derived_seed("key", "k")
        assert seed("a", **fields, seed=9) == 9
    assert seed(None, **convert) != seed(None, **convert)
    assert seed("a", operation="long_form", text="One.") == 0
    assert 0 <= derived_seed("key", "k") < 2**31


# ---------------------------------------------------------------------------------- settings


def test_a_worker_opens_the_bucket_and_closes_it(with_bucket: Settings) -> None:
    worker = Worker.load(with_bucket.model_copy(update={"model": "draft"}))
    assert with_bucket.unused == []
    result = run(worker, text="One.", delivery="s3")
    assert fetched(result["audio_url"]).content[:4] == b"RIFF"
    worker.close()


@pytest.mark.parametrize("prefix", ["/a", "a//b", "../a", "a b", "ü/"])
def test_a_prefix_that_names_cannot_begin_with_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_PREFIX", prefix)
    with pytest.raises(ValueError, match="bucket_prefix|BUCKET_PREFIX"):
        Settings()


def test_what_belongs_to_a_bucket_is_unused_without_one(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setenv("BUCKET_PREFIX", "a/")
    monkeypatch.setenv("BUCKET_REGION", "eu-1")
    assert Settings().unused == ["BUCKET_REGION", "BUCKET_PREFIX"]
    monkeypatch.setenv("VOICES_URI", "s3://b/v")
    assert Settings().unused == ["BUCKET_PREFIX"]
    monkeypatch.setenv("BUCKET_NAME", "bucket")
    assert Settings().unused == []
