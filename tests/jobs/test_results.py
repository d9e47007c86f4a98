"""A job that is sent twice is done once, on any number of workers, and a store that fails costs no job."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from engine.types import Speech, SpeechRequest
from jobs import results as results_module
from jobs.bucket import OwnBucket
from jobs.claims import CLOCKS_DIFFER_S, Claims
from jobs.results import Record, Results, open_results
from jobs.settings import Settings
from jobs.worker import Worker
from tests.jobs.conftest import ToneEngine, tone_speech
from tests.jobs.racers import results_in
from tests.jobs.voice_support import Draft, MakeWorker, run, save
from tests.voice_library.conftest import store as store
from voice_library import LibraryError, S3Options
from voice_library.folder_store import FolderStore
from voice_library.s3_store import s3_client
from voice_library.store import Entry, Store

ROOT = Path(__file__).parents[2]
KEY = {"idempotency_key": "order 7"}
HOUR_S = 3_600.0


class Clock:
    """Seconds that pass when told to."""

    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Broken(FolderStore):
    """Fails, or not, as it is told to."""

    fails = True

    def describe(self) -> str:
        return "broken"

    @contextlib.contextmanager
    def _reported(self, verb: str, key: str) -> Iterator[None]:
        if self.fails:
            raise LibraryError("storage_failed", f"could not {verb} {key}")
        yield


def on(store: Store, **options: Any) -> Results:
    return Results(store, **{"max_age_s": HOUR_S, "max_bytes": 1 << 30, **options})


MakeKeeping = Callable[..., Worker]


@pytest.fixture
def keeping(settings: Settings, tmp_path: Path) -> Iterator[MakeKeeping]:
    """Makes workers that keep results in one folder, or in the store that is given."""
    opened: list[Worker] = []

    def make(engine: ToneEngine | None = None, store: Store | None = None, **changes: Any) -> Worker:
        results = on(store or FolderStore(tmp_path / "results"))
        changed = settings.model_copy(update=changes)
        opened.append(Worker(engine or ToneEngine(), changed, results=results))
        return opened[-1]

    yield make
    for worker in opened:
        worker.close()


def kept_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "results" / "kept").rglob("*") if path.is_file()]


def claims_in(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "results" / "claims").glob("*"))


def no_claims(tmp_path: Path) -> None:
    """Waits until all are released, which happens behind a job's end."""
    while claims_in(tmp_path):
        time.sleep(0.005)


# ---------------------------------------------------------------------------------- the same again


def test_a_job_sent_again_gets_the_same_result_and_is_not_done_again(keeping: MakeKeeping, store: Store) -> None:
    first, second = keeping(store=store), keeping(store=store)
    made = run(first, text="Hello there", **KEY)
    again = run(second, text="Hello there", **KEY)
    assert again == {**made, "repeated": True} and "repeated" not in made
    assert second._engine.requests == []  # type: ignore[attr-defined]
    other = run(second, text="Hello there", idempotency_key="order 8")
    assert "repeated" not in other and other["seed"] != made["seed"]


def test_the_same_job_may_be_said_in_other_words(keeping: MakeKeeping, reference: str) -> None:
    worker = keeping()
    run(worker, operation="voice_cloning", text="Hello", reference_audio=reference, cfg=0.5, **KEY)
    same = {"text": "Hello", "cfg_weight": 0.5, "reference_audio": reference, "seed": None, "speed": 2}
    again = run(worker, operation="voice_clone", **same, **KEY)
    assert again["repeated"] and again["warnings"][-1].startswith("speed was ignored")


@pytest.mark.parametrize(
    "other",
    [{"text": "Bye"}, {"seed": 4}, {"output_format": "mp3"}, {"operation": "long_form"}, {"delivery": "inline"}],
)
def test_a_key_stands_for_one_input(keeping: MakeKeeping, engine: ToneEngine, other: dict[str, Any]) -> None:
    worker = keeping(engine)
    run(worker, text="Hello", **KEY)
    refused = run(worker, **{"text": "Hello", **other}, **KEY)
    assert (refused["error_code"], refused["field"]) == ("invalid_request", "idempotency_key")
    assert len(engine.requests) == 1


def test_a_voice_is_deleted_once_and_saved_once_however_often_that_is_asked(
    make_worker: MakeWorker, tmp_path: Path
) -> None:
    worker = make_worker(Draft.make())
    worker._results = on(FolderStore(tmp_path / "results"))
    saved = save(worker, "Anna", idempotency_key="save")
    assert save(worker, "Anna", idempotency_key="save") == {**saved, "repeated": True}
    assert save(worker, "Anna", idempotency_key="other")["error_code"] == "voice_exists"
    gone = run(worker, operation="delete_voice", voice_name="Anna", idempotency_key="delete")
    assert run(worker, operation="delete_voice", voice_name="Anna", idempotency_key="delete") == gone | {
        "repeated": True
    }
    assert run(worker, operation="delete_voice", voice_name="Anna")["error_code"] == "voice_not_found"


def test_a_failure_is_not_kept(keeping: MakeKeeping, tmp_path: Path) -> None:
    def fail(_request: SpeechRequest, future: Future[Speech]) -> None:
        future.set_exception(MemoryError())

    assert run(keeping(ToneEngine(fail)), text="Hello", **KEY)["error_code"] == "out_of_memory"
    too_large = run(keeping(max_result_bytes=1_000), text="Hello", **KEY)
    assert too_large["error_code"] == "result_too_large"
    assert kept_files(tmp_path) == []
    assert "repeated" not in run(keeping(), text="Hello", **KEY)
    assert run(keeping(), text="Hello", **KEY)["repeated"]


def test_a_worker_with_nowhere_to_keep_says_so_and_works(worker: Worker, engine: ToneEngine) -> None:
    for _ in range(2):
        (warning,) = run(worker, text="Hello", **KEY)["warnings"]
        assert warning.startswith("idempotency_key has no effect")
    assert len(engine.requests) == 2


def test_a_stream_says_that_it_is_not_kept(keeping: MakeKeeping, tmp_path: Path) -> None:
    worker = keeping()

    async def last(**fields: Any) -> dict[str, Any]:
        return [piece async for piece in worker.stream({"id": "1", "input": fields})][-1]

    for _ in range(2):
        (warning,) = asyncio.run(last(text="Hello", **KEY))["warnings"]
        assert warning.startswith("idempotency_key was ignored")
    assert kept_files(tmp_path) == []


# ---------------------------------------------------------------------------------- audio in a bucket


@pytest.fixture
def place(bucket: str, s3_options: S3Options) -> Iterator[OwnBucket]:
    place = OwnBucket(bucket, "", s3_options, url_lifetime_s=600)
    yield place
    place.close()


def test_audio_in_a_bucket_is_kept_by_its_name_and_signed_anew(
    settings: Settings, tmp_path: Path, place: OwnBucket, bucket: str, s3_options: S3Options, reference: str
) -> None:
    engine = ToneEngine()
    keeps = Worker(engine, settings, results=on(FolderStore(tmp_path / "results")), bucket=place)
    job = {"operation": "voice_clone", "reference_audio": reference, "delivery": "s3", **KEY}
    made = run(keeps, **job)
    (record,) = kept_files(tmp_path)
    assert b"X-Amz" not in record.read_bytes()
    again = run(keeps, **job)
    assert again["repeated"] and again["sample_audio_url"] == again["audio_url"]
    assert again["audio_url"].split("?")[0] == made["audio_url"].split("?")[0]
    assert {name: again[name] for name in made if not name.endswith("_url")} == {
        name: made[name] for name in made if not name.endswith("_url")
    }

    with contextlib.closing(s3_client(s3_options)) as client:
        name = made["audio_url"].split("?")[0].partition(f"/{bucket}/")[2]
        client.delete_object(Bucket=bucket, Key=name)
    anew = run(keeps, **job)
    assert "repeated" not in anew and len(engine.requests) == 2
    assert run(keeps, **job)["audio_url"].split("?")[0] == anew["audio_url"].split("?")[0]

    elsewhere = Worker(engine, settings, results=on(FolderStore(tmp_path / "results")))
    assert run(elsewhere, **job)["error_code"] == "invalid_request"  # and neither does a key bring a bucket back
    assert len(engine.requests) == 2


def test_audio_that_cannot_be_looked_for_is_given_with_a_warning(
    settings: Settings, tmp_path: Path, place: OwnBucket, bucket: str
) -> None:
    keeps = Worker(ToneEngine(), settings, results=on(FolderStore(tmp_path / "results")), bucket=place)
    job = {"text": "Hello", "delivery": "s3", **KEY}
    run(keeps, **job)
    away = S3Options("http://127.0.0.1:9", "us-east-1", "id", "secret", connect_timeout_s=0.5, attempts=1)
    keeps._bucket = OwnBucket(bucket, "", away, url_lifetime_s=600)
    again = run(keeps, **job)
    assert again["repeated"] and "could not be looked for" in again["warnings"][-1] and "audio_url" in again


# ---------------------------------------------------------------------------------- records


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other version"])
def test_a_damaged_record_counts_as_none_and_is_replaced(keeping: MakeKeeping, tmp_path: Path, damage: str) -> None:
    worker = keeping()
    run(worker, text="Hello", **KEY)
    (record,) = kept_files(tmp_path)
    data = record.read_bytes()
    digest = results_module._digest
    other = data.partition(b"\n")[2].replace(b'"version": 1', b'"version": 9')
    changed = {
        "cut": data[:-1],
        "flipped": data.replace(b"RIFF", b"RIFG").replace(b"UklG", b"UklH"),
        "empty": b"",
        "other version": digest(other).encode() + b"\n" + other,
    }[damage]
    assert changed != data
    record.write_bytes(changed)
    assert "repeated" not in run(worker, text="Hello", **KEY)
    assert run(worker, text="Hello", **KEY)["repeated"]


def test_a_record_is_what_it_was_made_of() -> None:
    record = Record("asked", 5.5, {"audio": "Zoë", "chunks": [{"end_s": 0.1}]}, "bucket", "a/b.wav", ("audio",))
    assert Record.from_bytes(record.to_bytes()) == record


def test_a_result_past_its_age_counts_as_none(settings: Settings, tmp_path: Path) -> None:
    worker = Worker(ToneEngine(), settings, results=on(FolderStore(tmp_path / "results"), max_age_s=0.0))
    run(worker, text="Hello", **KEY)
    assert "repeated" not in run(worker, text="Hello", **KEY)
    worker.close()


def test_results_past_their_age_are_swept_and_nothing_else(settings: Settings, tmp_path: Path) -> None:
    local = settings.model_copy(update={"work_dir": str(tmp_path)})
    first = open_results(local)
    assert first is not None
    worker = Worker(ToneEngine(), settings, results=first)
    run(worker, text="Hello", **KEY)
    worker.close()
    others = [tmp_path / "results/notes.txt", tmp_path / "results/kept/0/1/ab", tmp_path / "checkpoints/kept/0/0/00"]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("not ours")
    old, young = kept_files(tmp_path), tmp_path / "results/claims" / ("0" * 40)
    young.parent.mkdir(exist_ok=True)
    young.write_text("{}")
    for path in [*old, *others]:
        os.utime(path, (time.time() - 30 * HOUR_S,) * 2)
    again = open_results(local)
    assert again is not None
    while any(path.exists() for path in old if path not in others):
        time.sleep(0.005)
    again.close()
    assert all(other.is_file() for other in others) and young.is_file()


def test_results_lie_in_the_bucket_where_there_is_no_folder(
    settings: Settings, bucket: str, s3_options: S3Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_results(settings) is None
    for name, value in {
        "BUCKET_NAME": bucket,
        "BUCKET_PREFIX": "speech/",
        "BUCKET_ENDPOINT_URL": s3_options.endpoint_url or "",
        "BUCKET_ACCESS_KEY_ID": "id",
        "BUCKET_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    for repeated in (None, True):
        worker = Worker.load(Settings(model="draft"))
        assert run(worker, text="Hello", **KEY).get("repeated") is repeated
        worker.close()
    with contextlib.closing(s3_client(s3_options)) as client:
        names = [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert all(name.startswith("speech/results/") for name in names)
    assert sorted(name.split("/")[2] for name in names) == ["kept", "tmp"]


# ---------------------------------------------------------------------------------- at the same time


class Slow(ToneEngine):
    """Finishes when it may."""

    def __init__(self) -> None:
        super().__init__(lambda _request, _future: self.has_begun.set())
        self.has_begun = threading.Event()

    def finish_all(self) -> None:
        for request, future in zip(self.requests, self.futures, strict=True):
            if not future.done():
                future.set_result(tone_speech(request))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_second_of_two_waits_for_the_first(keeping: MakeKeeping, num_workers: int) -> None:
    engine = Slow()
    workers = [keeping(engine) for _ in range(num_workers)]

    async def both() -> list[dict[str, Any]]:
        job = {"id": "1", "input": {"text": "Hello", **KEY}}
        first = asyncio.create_task(workers[0].run(job))
        await asyncio.to_thread(engine.has_begun.wait, 20)
        second = asyncio.create_task(workers[-1].run(job))
        await asyncio.sleep(0.3)  # long enough to be done, if it did not wait
        assert not second.done()
        engine.finish_all()
        return [await first, await second]

    first, second = asyncio.run(both())
    assert second == {**first, "repeated": True} and len(engine.requests) == 1


def test_whoever_waits_does_it_himself_when_the_first_fails_or_is_given_up(keeping: MakeKeeping) -> None:
    engine = Slow()
    workers = [keeping(engine), keeping(engine)]

    async def both() -> dict[str, Any]:
        job = {"id": "1", "input": {"text": "Hello", **KEY}}
        first = asyncio.create_task(workers[0].run(job))
        await asyncio.to_thread(engine.has_begun.wait, 20)
        engine.has_begun.clear()
        second = asyncio.create_task(workers[1].run(job))
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.to_thread(engine.has_begun.wait, 20)
        engine.finish_all()
        return await second

    result = asyncio.run(both())
    assert "error" not in result and "repeated" not in result and len(engine.requests) == 2


def test_whoever_waits_waits_no_longer_than_the_job_may_take(keeping: MakeKeeping, tmp_path: Path) -> None:
    engine = Slow()
    first, second = keeping(engine), keeping(ToneEngine(), job_timeout_s=0.5)

    async def both() -> dict[str, Any]:
        job = {"id": "1", "input": {"text": "Hello", **KEY}}
        working = asyncio.create_task(first.run(job))
        await asyncio.to_thread(engine.has_begun.wait, 20)
        waited = await second.run(job)
        engine.finish_all()
        assert "error" not in await working
        return waited

    waited = asyncio.run(both())
    assert waited["error_code"] == "timed_out" and "idempotency_key" in waited["error"]
    no_claims(tmp_path)
    assert run(second, text="Hello", **KEY)["repeated"]


def start(folder: Path, takes_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.jobs.racers", str(folder), str(takes_s)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert heard(process) == "ready"
    return process


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_processes_that_race_for_a_key_one_does_the_work_and_all_get_what_it_made(tmp_path: Path) -> None:
    racers = [start(tmp_path, 1.5) for _ in range(3)]  # longer than a claim without renewals would hold
    for racer in racers:
        go(racer)
    answers = [racer.communicate(timeout=60)[0].split() for racer in racers]
    results = [answer[-2:] for answer in answers]
    assert (tmp_path / "made").read_text() == "x"
    assert len({audio for audio, _ in results}) == 1
    assert sorted(repeated for _, repeated in results) == ["False", "True", "True"]
    no_claims(tmp_path)


def test_a_worker_that_is_killed_blocks_its_key_for_a_moment_only(tmp_path: Path) -> None:
    victim = start(tmp_path, 60.0)
    go(victim)
    assert heard(victim) == "begun"
    victim.kill()
    victim.communicate()
    assert len(claims_in(tmp_path)) == 1
    heirs = [start(tmp_path, 0.3) for _ in range(2)]
    for heir in heirs:
        go(heir)
    answers = [heir.communicate(timeout=60)[0].split()[-2:] for heir in heirs]
    assert len({audio for audio, _ in answers}) == 1 and sorted(answer[1] for answer in answers) == ["False", "True"]
    assert (tmp_path / "made").read_text() == "xx"


class Meanwhile(FolderStore):
    """Has something happen just behind the first look for a result."""

    happens: Callable[[], object] | None = None

    def read(self, key: str, max_bytes: int) -> bytes | None:
        data = super().read(key, max_bytes)
        happens, self.happens = (self.happens, None) if key.startswith("kept/") else (None, self.happens)
        if happens is not None:
            happens()
        return data


def test_what_another_worker_finished_between_looking_and_claiming_is_not_done_again(
    keeping: MakeKeeping, tmp_path: Path
) -> None:
    store, engine = Meanwhile(tmp_path / "results"), ToneEngine()
    late, other = keeping(engine, store), keeping()
    made: list[dict[str, Any]] = []

    def finish() -> None:
        made.append(run(other, text="Hello", **KEY))
        no_claims(tmp_path)

    store.happens = finish
    assert run(late, text="Hello", **KEY) == {**made[0], "repeated": True} and engine.requests == []
    no_claims(tmp_path)


# ---------------------------------------------------------------------------------- claims


def claims_on(store: Store, clock: Clock, **options: Any) -> Claims:
    return Claims(store, **{"renew_every_s": 0.02, "stale_after_s": 45.0, "clock": clock, **options})


def test_a_claim_has_one_holder_until_it_is_released(store: Store) -> None:
    clock = Clock()
    first, second = claims_on(store, clock), claims_on(store, clock)
    assert first.take("claims/a") and second.take("claims/b")
    assert not second.take("claims/a") and not first.take("claims/a")
    second.release("claims/a")  # which is not its own
    assert not second.take("claims/a")
    first.release("claims/a")
    assert second.take("claims/a")
    first.close()
    second.close()


def test_a_claim_that_is_renewed_is_never_taken_over(store: Store) -> None:
    clock = Clock()
    holder, other = claims_on(store, clock), claims_on(store, clock)
    assert holder.take("claims/a")
    for _ in range(5):
        assert not other.take("claims/a")
        version = next(iter(store.list("claims/a"))).version
        while next(iter(store.list("claims/a"))).version == version:
            time.sleep(0.005)
        clock.now_s += 44.0
    holder.close()
    other.close()


class Faulty(FolderStore):
    """Errs once with what no store should raise."""

    error: Exception | None = None

    def list(self, prefix: str) -> Iterator[Entry]:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().list(prefix)


def test_whatever_a_store_raises_claims_are_renewed_and_released_the_next_time(tmp_path: Path) -> None:
    store = Faulty(tmp_path)
    claims = claims_on(store, Clock())
    assert claims.take("claims/a") and claims.take("claims/b")
    renewer = claims._renewer
    assert renewer is not None
    versions = {entry.version for entry in store.list("claims/")}
    store.error = RuntimeError("unforeseen")
    while not versions.isdisjoint(entry.version for entry in FolderStore(tmp_path).list("claims/")):
        assert renewer.is_alive()
        time.sleep(0.005)
    claims.close()
    renewer.join(20)
    store.error = RuntimeError("unforeseen")
    claims.release("claims/a")
    claims.release("claims/b")
    assert [entry.key for entry in store.list("claims/")] == ["claims/a"]


def test_a_claim_without_a_life_is_taken_over_when_it_was_seen_unchanged_for_long_enough(store: Store) -> None:
    clock = Clock()
    dead, heir, other = (claims_on(store, clock, renew_every_s=40.0) for _ in range(3))
    assert dead.take("claims/a")
    assert not heir.take("claims/a")
    clock.now_s += 44.0
    assert not heir.take("claims/a") and not other.take("claims/a")
    clock.now_s += 2.0
    assert not other.take("claims/a")  # which has not seen it for so long
    assert heir.take("claims/a") and not other.take("claims/a")
    dead.release("claims/a")  # as one that was only asleep
    assert not other.take("claims/a")
    for each in (dead, heir, other):
        each.close()


def test_a_claim_of_long_ago_is_abandoned_at_first_sight(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    dead, heir = claims_on(store, Clock(), renew_every_s=40.0), claims_on(store, Clock())
    assert dead.take("claims/a")
    then_s = time.time() - 45.0 - CLOCKS_DIFFER_S
    os.utime(tmp_path / "claims/a", (then_s + 20.0,) * 2)
    assert not heir.take("claims/a")
    os.utime(tmp_path / "claims/a", (then_s - 20.0,) * 2)
    assert heir.take("claims/a")
    dead.close()
    heir.close()


def test_even_where_a_claim_was_lost_everybody_gets_what_was_kept_first(keeping: MakeKeeping, tmp_path: Path) -> None:
    engine = Slow()
    sleeper, other = keeping(engine), keeping(ToneEngine())

    async def both() -> list[dict[str, Any]]:
        sleeping = asyncio.create_task(sleeper.run({"id": "1", "input": {"text": "Hello", **KEY}}))
        await asyncio.to_thread(engine.has_begun.wait, 20)
        for claim in claims_in(tmp_path):
            claim.unlink()
        first = await other.run({"id": "1", "input": {"text": "Hello", **KEY}})
        engine.finish_all()
        return [first, await sleeping]

    first, second = asyncio.run(both())
    assert "repeated" not in first and second == {**first, "repeated": True}


# ---------------------------------------------------------------------------------- stores that fail


def test_a_store_that_fails_costs_a_warning_and_this_worker_still_keeps(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, engine = Clock(), ToneEngine()
    broken = Broken(tmp_path / "results")
    worker = Worker(engine, settings, results=on(broken, clock=clock))
    with caplog.at_level(logging.WARNING):
        made = run(worker, text="Hello", **KEY)
        again = run(worker, text="Hello", **KEY)
    assert "kept by this worker only" in made["warnings"][-1] and again["audio"] == made["audio"]
    assert len(engine.requests) == 1
    assert [record.name for record in caplog.records] == ["jobs.results"]
    broken.fails = False
    assert "warnings" in run(worker, text="Bye", idempotency_key="other") and not (tmp_path / "results").exists()
    clock.now_s += results_module.REST_S
    run(worker, text="Bye", idempotency_key="third")
    assert kept_files(tmp_path)
    worker.close()


def test_the_second_of_two_on_a_worker_waits_for_the_first_though_nothing_can_be_claimed(
    keeping: MakeKeeping, tmp_path: Path
) -> None:
    engine = Slow()
    worker = keeping(engine, Broken(tmp_path / "results"))

    async def both() -> list[dict[str, Any]]:
        job = {"id": "1", "input": {"text": "Hello", **KEY}}
        first = asyncio.create_task(worker.run(job))
        await asyncio.to_thread(engine.has_begun.wait, 20)
        second = asyncio.create_task(worker.run(job))
        await asyncio.sleep(0.2)
        engine.finish_all()
        return [await first, await second]

    first, second = asyncio.run(both())
    assert second["repeated"] and second["audio"] == first["audio"] and len(engine.requests) == 1


def test_a_store_that_fails_in_between_costs_no_job(settings: Settings, tmp_path: Path) -> None:
    broken = Broken(tmp_path / "results")
    broken.fails = False

    def break_it(request: SpeechRequest, future: Future[Speech]) -> None:
        broken.fails = True
        future.set_result(tone_speech(request))

    worker = Worker(ToneEngine(break_it), settings, results=on(broken))
    result = run(worker, text="Hello", **KEY)
    assert "error" not in result and "kept by this worker only" in result["warnings"][-1]
    worker.close()


def test_a_bucket_that_cannot_be_reached_is_a_store_that_fails(settings: Settings) -> None:
    nowhere = settings.model_copy(
        update={"bucket_name": "nowhere", "bucket_endpoint_url": "http://127.0.0.1:9", "bucket_region": "us-east-1"}
    )
    results = open_results(nowhere)
    worker = Worker(ToneEngine(), settings, results=results)
    assert "kept by this worker only" in run(worker, text="Hello", **KEY)["warnings"][-1]
    worker.close()


def test_what_is_too_large_to_be_kept_says_so(
    keeping: MakeKeeping, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(results_module, "MAX_RECORD_BYTES", 1_000)
    assert "is not kept" in run(keeping(), text="Hello", **KEY)["warnings"][-1]
    assert kept_files(tmp_path) == []


def test_a_worker_opens_its_results_and_closes_them(settings: Settings, tmp_path: Path) -> None:
    for repeated in (None, True):
        worker = Worker.load(settings.model_copy(update={"model": "draft", "work_dir": str(tmp_path)}))
        assert run(worker, text="Hello", **KEY).get("repeated") is repeated
        worker.close()
        assert worker._results is not None and not worker._results._sweeper.is_alive()
    (kept,) = kept_files(tmp_path)
    assert json.loads(kept.read_bytes().partition(b"\n")[2])["result"]["model"] == "draft"
    assert not results_in(tmp_path)._sweeper.is_alive()
