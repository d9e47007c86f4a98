"""What the worker says of its work: lines that machines can read, each with its job, none with what clients sent."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

import handler
from engine.types import Speech, SpeechRequest
from jobs import logs
from jobs.logs import MAX_LINE_BYTES, JsonLines, TextLines, about_job, before_jobs, in_context, job_content, known_field
from jobs.settings import Settings
from jobs.worker import Worker
from tests.jobs.voice_support import MakeWorker, recorded, save
from tests.platform import Platform, wait_until

MARK = "Marmaladium"
ANYTHING = st.text(st.characters(), max_size=200) | st.text(st.characters(categories=["Cs", "Cc", "So"]), max_size=50)
WHERE = {"RUNPOD_POD_ID": "a-worker"}

ours = logging.getLogger("jobs.a_room")
theirs = logging.getLogger("a_library.part")


@pytest.fixture
def _loggers() -> Iterator[None]:
    """As they were, afterwards."""
    root, rooms = logging.getLogger(), [logging.getLogger(name) for name in logs.ROOMS]
    before = [(logger, logger.level) for logger in (root, *rooms)]
    handlers, root.handlers = root.handlers, []
    yield
    root.handlers = handlers
    for logger, level in before:
        logger.setLevel(level)


Written = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def log_to(settings: Settings, _loggers: None) -> Callable[..., io.StringIO]:
    """Has the process log as settings say, to a text."""

    def configure(environment: Mapping[str, str] = WHERE, **changes: Any) -> io.StringIO:
        stream = io.StringIO()
        logs.configure(settings.model_copy(update=changes), environment, stream)
        return stream

    return configure


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def record(message: object, *args: object, name: str = "jobs.a_room", error: Any = None, **extra: Any) -> Any:
    made = logging.LogRecord(name, logging.INFO, "/a/file.py", 7, message, args, error and (type(error), error, None))
    for key, value in extra.items():
        setattr(made, key, value)
    return made


def raised(error: BaseException) -> BaseException:
    """An error with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


# ---------------------------------------------------------------------------------- lines


def test_a_line_is_an_object_with_time_level_logger_message_job_and_worker(log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to()
    with about_job("job-7"):
        ours.warning("%d of %s", 3, "four", extra={"figures": {"operation": "tts", "seconds": 1.5, "nothing": None}})
    ours.debug("not at this level")
    (line,) = objects(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "WARNING",
        "logger": "jobs.a_room",
        "message": "3 of four",
        "job_id": "job-7",
        "worker_id": "a-worker",
        "operation": "tts",
        "seconds": 1.5,
    }


@given(ANYTHING, ANYTHING, ANYTHING, st.booleans())
def test_whatever_is_said_makes_one_line_of_json_that_is_not_too_long(
    message: str, more: str, word: str, shows_content: bool
) -> None:
    lines = JsonLines(worker_id=word, secrets=[word], shows_content=shows_content)
    error = raised(ValueError(more * 300))
    with about_job(more):
        line = lines.format(
            record(message * 300, more, error=error, figures={"field": word * 200}, content={"text": more * 100})
        )
    assert line.isascii() and "\n" not in line and len(line) <= MAX_LINE_BYTES
    assert json.loads(line)["level"] == "INFO"
    json.dumps(json.loads(line), ensure_ascii=False).encode()  # no half surrogates


@given(ANYTHING, ANYTHING)
def test_in_text_nothing_forges_a_line_or_speaks_to_the_terminal(message: str, job_id: str) -> None:
    with about_job(job_id):
        line = TextLines().format(record("%s", message))
    assert line.isprintable()


def test_text_names_the_job_once(log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to(log_format="text")
    with about_job("7"):
        ours.warning("something")
        ours.warning("job 7: done")
    heads = [line.partition("jobs.a_room: ")[2] for line in stream.getvalue().splitlines()]
    assert heads == ["job 7: something", "job 7: done"]


def test_figures_that_are_no_numbers_are_left_to_no_reader(log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to()
    ours.warning("x", extra={"figures": {"real_time_factor": float("inf")}})
    assert objects(stream)[0]["real_time_factor"] is None


def test_an_exception_is_one_field_and_its_end_is_kept(log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to(log_content=True)
    ours.error("it broke", exc_info=raised(ValueError("start " + "x" * 50_000 + " end")))
    (line,) = objects(stream)
    assert line["message"] == "it broke" and line["exception"].endswith(" end\n")


def test_a_line_that_cannot_be_written_is_given_up_without_a_word(
    log_to: Callable[..., io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    stream = log_to()
    ours.warning("%d", MARK)  # the argument does not fit
    assert MARK not in stream.getvalue() and objects(stream)[0]["message"] == "%d"
    stream.close()
    ours.warning(MARK)
    assert capsys.readouterr() == ("", "")


def test_the_form_is_json_on_the_platform_and_text_elsewhere(settings: Settings) -> None:
    assert settings.log_format == "json"
    assert settings.for_local_test().log_format == "text"


# ---------------------------------------------------------------------------------- what is left out


def quoting_error() -> BaseException:
    """Chained, grouped, with notes: each of them quotes the mark."""
    cause = raised(UnicodeEncodeError("ascii", MARK, 0, 1, MARK))
    error = ExceptionGroup(MARK, [ValueError(MARK)])
    error.add_note(MARK)
    try:
        try:
            raise KeyError(MARK) from cause
        except KeyError:
            raise error  # noqa: B904
    except ExceptionGroup as caught:
        return caught


def test_of_an_exception_only_types_and_places_are_told(log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to()
    ours.error("it broke", exc_info=quoting_error())
    told = objects(stream)[0]["exception"]
    assert MARK not in told
    for shown in ("UnicodeEncodeError", "KeyError", "ExceptionGroup", "in quoting_error", "LOG_CONTENT=1"):
        assert shown in told
    ours.error("it broke", exc_info=raised(FileNotFoundError(2, MARK)))
    assert "FileNotFoundError (ENOENT, " in stream.getvalue() and MARK not in stream.getvalue()


@pytest.mark.parametrize("circumstance", ["with LOG_CONTENT", "before there are jobs"])
def test_the_words_are_there(circumstance: str, log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to(log_content=circumstance == "with LOG_CONTENT")
    with ExitStack() as stack:
        if circumstance == "before there are jobs":
            stack.enter_context(before_jobs())
        ours.error("it broke", exc_info=quoting_error())
        theirs.warning(MARK)
    broke, library = objects(stream)
    assert broke["exception"].count(MARK) >= 4
    assert library["message"] == MARK


def test_of_a_library_only_the_template_is_told_and_where_it_stands(log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to()
    theirs.warning("found %s in %d places", MARK, 3)
    theirs.warning("found " + MARK)
    theirs.info("not at this level")
    template, nothing = objects(stream)
    assert template["message"] == "found %s in %d places"
    assert MARK not in nothing["message"]
    assert nothing["place"].startswith("test_logs.py:")


def test_content_is_shown_with_log_content_only(log_to: Callable[..., io.StringIO]) -> None:
    for shows, expected in ((False, None), (True, MARK)):
        stream = log_to(log_content=shows)
        ours.warning("done", extra={"content": {"text": MARK}})
        assert objects(stream)[0].get("text") == expected


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://x.test/a.wav?token=hidden", "https://x.test/a.wav?…"),
        ("https://x.test/a.wav#hidden", "https://x.test/a.wav#…"),
        ("s3://name:hidden@bucket/key", "s3://bucket/key"),
        ("https://hidden@x.test?hidden", "https://x.test?…"),
        ("https://x.test/a@b/c", "https://x.test/a@b/c"),
        ("https://x.test", "https://x.test"),
    ],
)
@pytest.mark.parametrize("shows_content", [False, True])
def test_an_address_loses_its_query_and_who_asks(address: str, shown: str, shows_content: bool) -> None:
    lines = JsonLines(shows_content=shows_content)
    fields = json.loads(lines.format(record("got '%s', %s and more", address, address)))
    assert fields["message"] == f"got '{shown}', {shown} and more"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_secrets_of_the_worker_are_in_no_line_of_any_form(log_format: str, log_to: Callable[..., io.StringIO]) -> None:
    secrets = {"BUCKET_SECRET_ACCESS_KEY": "hush/now+1", "RUNPOD_AI_API_KEY": "a-key-of-theirs", "HF_TOKEN": "hf_hush"}
    held = SecretStr(secrets["BUCKET_SECRET_ACCESS_KEY"])
    stream = log_to(secrets, log_content=True, log_format=log_format, bucket_secret_access_key=held)
    everything = " ".join(secrets.values())
    with about_job(everything):
        error = raised(ValueError(everything))
        ours.warning("%s", everything, exc_info=error, extra={"content": {"text": everything, "error": everything}})
    assert "***" in stream.getvalue()
    assert [secret for secret in secrets.values() if secret in stream.getvalue()] == []


def test_a_secret_is_hidden_whole_even_where_the_text_is_cut() -> None:
    lines = JsonLines(secrets=["0123456789" * 4])
    for num_before in range(2_950, 3_010):
        line = lines.format(record("x" * num_before + "0123456789" * 4))
        assert "012" not in json.loads(line)["message"]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("temperature", "temperature"),
        ("segments[3].text", "segments[3].text"),
        (MARK, None),
        (f"segments[0].{MARK}", None),
        ("text\n", None),
        (None, None),
    ],
)
def test_a_field_is_told_if_it_is_ours(field: str | None, told: str | None) -> None:
    assert known_field(field) == told


@given(st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda inner: st.lists(inner, max_size=3)))
def test_content_is_found_in_whatever_a_job_is(value: Any) -> None:
    job_content({"input": value}, {})
    job_content({"input": {"text": value, "segments": value}}, {"error": value})


def test_content_is_the_beginning_of_the_text_and_the_error() -> None:
    segments = [{"text": "two"}, {"text": "three"}]
    job = {"input": {"text": "one" + "x" * 10_000, "segments": segments, "reference_audio": MARK}}
    content = job_content(job, {"error": "wrong"})
    assert (
        content["text"].startswith("onex") and content["text"].endswith(" two three") and len(content["text"]) < 4_000
    )
    assert content["error"] == "wrong" and MARK not in str(content)


# ---------------------------------------------------------------------------------- whose line it is


def test_a_job_ends_with_a_line_of_its_figures(worker: Worker, log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to()
    asyncio.run(worker.run({"id": "job-1", "input": {"text": "Hello there"}}))
    asyncio.run(worker.run({"id": "job-2", "input": {"text": "Hello", "temperature": MARK}}))
    done, refused = objects(stream)
    assert (done["job_id"], done["operation"], done["outcome"], done["num_chars"]) == ("job-1", "tts", "done", 11)
    assert {"seconds", "audio_s", "num_chunks", "attempts", "first_audio_s", "num_inline_bytes"} <= set(done)
    assert (refused["outcome"], refused["field"]) == ("invalid_request", "temperature")
    assert MARK not in stream.getvalue()


def test_jobs_beside_each_other_each_write_under_their_own_id(
    make_engine: Callable[..., Any], settings: Settings, log_to: Callable[..., io.StringIO]
) -> None:
    engine = make_engine(lambda request, future: None)
    worker = Worker(engine, settings)

    async def scenario() -> None:
        ids = [f"job-{number}" for number in range(8)]
        jobs = [asyncio.create_task(worker.run({"id": job_id, "input": {"text": job_id}})) for job_id in ids]
        while len(engine.futures) < len(ids):
            await asyncio.sleep(0)
        for future in reversed(engine.futures):
            future.set_exception(ZeroDivisionError("a fault"))
        await asyncio.gather(*jobs)

    stream = log_to()
    asyncio.run(scenario())
    lines = objects(stream)
    assert len(lines) == 16
    for job_id in {line["job_id"] for line in lines}:
        assert [line["logger"] for line in lines if line["job_id"] == job_id] == ["jobs.errors", "jobs.worker"]


def test_a_line_of_a_stream_and_of_a_job_that_is_taken_back_has_its_id(
    make_engine: Callable[..., Any], settings: Settings, log_to: Callable[..., io.StringIO]
) -> None:
    def wait(request: SpeechRequest, future: Future[Speech]) -> None:
        """For ever."""

    stream = log_to()
    engine = make_engine(wait)

    async def scenario() -> None:
        pieces = Worker(engine, settings).stream({"id": "a-stream", "input": {"text": "Hello"}})
        taking = asyncio.create_task(anext(pieces))
        while not engine.futures:
            await asyncio.sleep(0)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        await pieces.aclose()

    asyncio.run(scenario())
    (line,) = objects(stream)
    assert (line["job_id"], line["outcome"]) == ("a-stream", "stopped")


def test_threads_that_work_for_a_job_write_under_its_id(log_to: Callable[..., io.StringIO]) -> None:
    stream = log_to()

    async def work() -> None:
        with about_job("7"):
            await asyncio.to_thread(ours.warning, "in a thread")
            await asyncio.get_running_loop().run_in_executor(None, in_context(ours.warning, "in a pool"))
        ours.warning("afterwards")

    asyncio.run(work())
    assert [line.get("job_id") for line in objects(stream)] == ["7", "7", None]


def test_the_library_and_what_it_does_in_the_background_write_under_the_jobs_id(
    make_worker: MakeWorker, log_to: Callable[..., io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    assert worker._voices is not None
    library = worker._voices.library
    monkeypatch.setattr(library, "get_conditionals", lambda *_, **__: b"damaged")
    monkeypatch.setattr(library, "put_conditionals", lambda *_: raise_storage_failed())
    save(worker, "Anna")
    worker._voices._storing.submit(lambda: None).result()
    worker._voices._kept.clear()
    stream = log_to()
    asyncio.run(worker.run({"id": "7", "input": {"text": "Hello", "voice_name": "Anna"}}))
    worker._voices._storing.submit(lambda: None).result()
    written = [line for line in objects(stream) if line["logger"] == "jobs.voices"]
    assert [("no use" in line["message"], line["job_id"]) for line in written] == [(True, "7"), (False, "7")]


def raise_storage_failed() -> None:
    from voice_library import LibraryError

    raise LibraryError("storage_failed", "the store is away")


# ---------------------------------------------------------------------------------- a real worker


FAULTY = """
import logging, os, pathlib, sys
sys.path.insert(0, {root!r})
os.environ["RUNPOD_ENDPOINT_ID"] = "an-endpoint"
pathlib.Path("key").write_text(os.environ["RUNPOD_AI_API_KEY"])
import handler
from engine.draft import DraftEngine

speak = DraftEngine._speak_chunk

def speak_with_faults(self, chunk, text, *rest):
    logging.getLogger("a_library").warning("speaks " + text)
    if "fault" in text:
        raise ValueError(f"{{text}} {{os.environ['BUCKET_SECRET_ACCESS_KEY']}} {{os.environ['RUNPOD_AI_API_KEY']}}")
    return speak(self, chunk, text, *rest)

DraftEngine._speak_chunk = speak_with_faults
sys.exit(handler.main([]))
"""
"""A worker that has a fault of its own, and a library that says too much."""

SECRET = f"bucket-{MARK}"


@pytest.fixture(scope="module")
def recording() -> str:
    return recorded(duration_s=6.0)


def marked_jobs(recording: str) -> list[dict[str, Any]]:
    """Jobs that succeed and jobs that fail in many ways, each with the mark where a client's words may be."""
    address = f"name:{MARK}@127.0.0.1:1/{MARK}.wav?token={MARK}"
    s3_config = {"accessId": MARK, "accessSecret": MARK, "bucketName": "a-bucket"}
    return [
        {"text": f"{MARK} one.", "title": MARK, "pronunciations": {MARK: MARK}, "reference_audio": recording},
        {"text": f"A fault of {MARK}."},
        {"text": "Hello", "temperature": MARK},
        {"text": "Hello", MARK: 1},
        {"text": "Hello", "language": MARK},
        {"text": f"Hello <{MARK}/>"},
        {"operation": MARK},
        {"text": "Hello", "reference_audio": f"{MARK}%%%"},
        {"text": "Hello", "reference_audio": f"https://{address}"},
        {"text": "Hello", "reference_audio": f"ftp://{address}"},
        {"text": "Hello", "reference_audio": f"s3://a-bucket/{MARK}?{MARK}"},
        {"text": "Hello", "s3Config": {**s3_config, "endpointUrl": f"https://{address}"}, "delivery": "s3"},
        {"text": "Hello", "s3Config": {**s3_config, "endpointUrl": MARK}, "delivery": "s3"},
        {"text": "Hello", "idempotency_key": MARK},
        {"operation": "long_form", "segments": [{"text": MARK}, {"text": "Hello", MARK: MARK}]},
        {"operation": "long_form", "segments": [{"text": MARK}]},
        {"operation": "voice_conversion", "input_audio": MARK},
    ]


def run_jobs(script: Path, jobs: list[dict[str, Any]], **settings: str) -> tuple[str, dict[str, dict[str, Any]], str]:
    """All that a worker with these jobs wrote, its results by job, and what Prometheus was told."""
    cwd = script.parent
    script.write_text(FAULTY.format(root=str(Path(handler.__file__).parent)))
    environment = {"MODEL": "draft", "LOG_LEVEL": "DEBUG", "METRICS_PORT": "0", "MAX_CONCURRENCY": "32"}
    environment |= {"BUCKET_SECRET_ACCESS_KEY": SECRET, "JOB_TIMEOUT_S": "30"}
    with Platform() as platform, platform.worker(script, cwd, **{**environment, **settings}):
        results = {job_id: platform.result(job_id) for job_id in [platform.submit(**job) for job in jobs]}
        wait_until(lambda: re.search(r"on port \d+", (cwd / "log").read_text()) is not None)
        port = re.search(r"on port (\d+)", (cwd / "log").read_text())
        assert port is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics", timeout=10) as answer:
            exposed = answer.read().decode()
    return (cwd / "log").read_text(), results, exposed


def objects_of(log: str) -> list[dict[str, Any]]:
    """What a real worker wrote, the SDK's too; all but its greeting is JSON.

    The SDK prints a line and its end one after the other, so that those of two threads may stand in one.
    """
    lines = [line for line in log.splitlines() if not line.startswith("--- Starting Serverless Worker")]
    rest, found = "\n".join(lines).lstrip(), []
    while rest:
        each, end = json.JSONDecoder().raw_decode(rest)
        found.append(each)
        rest = rest[end:].lstrip()
    return found


@pytest.mark.parametrize("streaming", ["0", "1"], ids=["results", "streams"])
def test_a_worker_writes_nothing_of_what_clients_send(streaming: str, tmp_path: Path, recording: str) -> None:
    log, results, exposed = run_jobs(tmp_path / "worker.py", marked_jobs(recording), STREAMING=streaming)
    assert MARK not in log
    assert MARK not in exposed and "chatterbox_jobs_total" in exposed
    assert recording[1000:1060] not in log
    written = objects_of(log)
    ends = {line["job_id"]: line for line in written if line.get("logger") == "jobs.worker" and "outcome" in line}
    assert set(ends) == set(results)
    assert {"done", "internal", "invalid_request", "reference_unreadable"} <= {
        line["outcome"] for line in ends.values()
    }
    faults = [line for line in written if "exception" in line]
    assert [line["job_id"] for line in faults] == [job_id for job_id in ends if ends[job_id]["outcome"] == "internal"]
    assert "speak_with_faults" in faults[0]["exception"]
    assert all(len(line) <= MAX_LINE_BYTES for line in log.splitlines())


def test_with_log_content_a_worker_quotes_texts_and_errors_but_no_audio_and_no_secret_of_its_own(
    tmp_path: Path, recording: str
) -> None:
    jobs: list[dict[str, Any]] = [{"text": "Said aloud.", "reference_audio": recording}, {"text": "A fault of mine."}]
    jobs.append({"text": "", MARK: 1})
    log, results, _ = run_jobs(tmp_path / "worker.py", jobs, LOG_CONTENT="1")
    audio = next(result["output"]["audio"] for result in results.values() if "audio" in result.get("output", {}))
    assert audio[1000:1060] not in log and recording[1000:1060] not in log
    assert SECRET not in log and (tmp_path / "key").read_text() not in log
    written = objects_of(log)
    assert {"Said aloud.", "A fault of mine."} <= {line.get("text") for line in written}
    assert any("ValueError: A fault of mine. *** ***" in line.get("exception", "") for line in written)
    assert any(MARK in line.get("error", "") for line in written)
