"""What long jobs keep: on a folder and in a bucket, swept, and never in the way of a job."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs import work as work_module
from jobs.settings import Settings
from jobs.work import REST_S, Work, open_work, stored_as
from jobs.worker import Worker
from tests.jobs.writers import content_of
from tests.voice_library.conftest import store as store
from voice_library import LibraryError, S3Options
from voice_library.folder_store import FolderStore
from voice_library.store import Store

HOUR_S = 3600.0
NUM_KILLS = 12
ROOT = Path(__file__).parents[2]


class Clock:
    """Seconds that pass when told to."""

    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def work_on(store: Store, max_age_s: float = HOUR_S, max_bytes: int = 1 << 30, clock: Clock | None = None) -> Work:
    return Work(store, max_age_s=max_age_s, max_bytes=max_bytes, clock=clock or Clock())


def key(number: int) -> str:
    return f"audio/{hashlib.blake2b(str(number).encode(), digest_size=20).hexdigest()}"


def keys_of(store: Store) -> set[str]:
    return {entry.key for entry in store.list("")}


def made_older(folder: Path, seconds: float) -> None:
    """As if everything in a folder had been written so long ago."""
    for path in folder.rglob("*"):
        then_s = path.stat().st_mtime - seconds
        os.utime(path, (then_s, then_s))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def broken(tmp_path: Path) -> FolderStore:
    """A store in a folder that cannot be, until the file in its place goes."""
    (tmp_path / "place").write_text("in the way")
    return FolderStore(tmp_path / "place" / "checkpoints")


def test_what_is_put_is_there_for_any_worker_and_what_is_not_is_none(store: Store) -> None:
    first, second = work_on(store), work_on(store)
    assert first.get(key(1)) is None
    assert first.put(key(1), b"spoken") and first.put("tokens/0f3a", b"")
    assert (second.get(key(1)), second.get("tokens/0f3a"), second.get(key(2))) == (b"spoken", b"", None)
    first.put(key(1), b"spoken again")
    assert second.get(key(1)) == b"spoken again"


def test_no_folder_fills_up(folder: Path) -> None:
    work = work_on(FolderStore(folder))
    for number in range(200):
        assert work.put(key(number), b"x")
    assert all((folder / stored_as(key(number))).is_file() for number in range(200))
    assert {len(Path(stored_as(key(number))).parts) for number in range(200)} == {4}
    assert max(len(list(leaf.iterdir())) for leaf in folder.glob("audio/*/*")) < 10


def test_an_entry_too_large_to_be_one_is_neither_kept_nor_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_on(FolderStore(folder))
    work.put(key(1), b"123456789")
    monkeypatch.setattr(work_module, "MAX_ENTRY_BYTES", 8)
    assert work.get(key(1)) is None
    assert not work.put(key(2), b"123456789") and work.put(key(2), b"12345678")


# ---------------------------------------------------------------------------------- stores that fail


def test_a_store_that_fails_never_raises_and_is_logged_once_until_it_works_again(
    broken: FolderStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    work = work_on(broken, clock=clock)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert not work.put(key(1), b"spoken")
            assert work.get(key(1)) is None
            clock.now_s += REST_S
        (tmp_path / "place").unlink()
        assert work.put(key(1), b"spoken") and work.get(key(1)) == b"spoken"
    told = [record.levelname for record in caplog.records if record.name == "jobs.work"]
    assert told == ["WARNING", "INFO"]


def test_a_store_that_failed_is_left_alone_for_a_while_and_then_tried_again(
    broken: FolderStore, tmp_path: Path
) -> None:
    clock = Clock()
    work = work_on(broken, clock=clock)
    assert not work.put(key(1), b"spoken")
    (tmp_path / "place").unlink()
    clock.now_s += REST_S - 1
    assert not work.put(key(1), b"spoken")
    assert not (tmp_path / "place").exists()
    clock.now_s += 1
    assert work.put(key(1), b"spoken")


def test_a_bucket_that_cannot_be_reached_is_a_store_that_fails(settings: Settings) -> None:
    nowhere = {"work_dir": "s3://bucket/work", "bucket_endpoint_url": "http://127.0.0.1:9"}
    keys = {"bucket_access_key_id": "id", "bucket_secret_access_key": "secret"}
    work = open_work(Settings(**nowhere, **keys))  # type: ignore[arg-type]
    assert work is not None
    assert work.get(key(1)) is None and not work.put(key(1), b"spoken")
    work.close()


def test_a_job_is_told_of_what_could_not_be_kept_and_of_nothing_else(broken: FolderStore, tmp_path: Path) -> None:
    clock = Clock()
    work = work_on(broken, clock=clock)
    job, other = work.for_job(), work.for_job()
    for number in range(3):  # the later two are not even tried
        job.put(key(number), b"spoken")
    assert not job.holds_any
    (warning,) = job.warnings
    assert warning.startswith("3 checkpoints could not be kept in WORK_DIR")
    (tmp_path / "place").unlink()
    clock.now_s += REST_S
    other.put(key(1), b"spoken")
    assert (other.warnings, other.holds_any) == ((), True)


def test_a_job_that_finds_what_another_did_has_something_to_go_on_from(folder: Path) -> None:
    work = work_on(FolderStore(folder))
    work.for_job().put(key(1), b"spoken")
    fresh, resumed = work.for_job(), work.for_job()
    assert (fresh.get(key(2)), fresh.holds_any) == (None, False)
    assert (resumed.get(key(1)), resumed.holds_any, resumed.warnings) == (b"spoken", True, ())


def test_any_error_of_a_store_is_its_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(FolderStore, "read", fail)
    assert work_on(FolderStore(folder)).get(key(1)) is None


# ---------------------------------------------------------------------------------- sweeping


def test_entries_past_their_age_are_removed_and_no_others(folder: Path) -> None:
    work = work_on(FolderStore(folder), max_age_s=HOUR_S)
    for number in range(5):
        work.put(key(number), b"old")
    made_older(folder, HOUR_S + 60)
    work.put(key(5), b"new")
    assert work.sweep() == 5
    assert keys_of(FolderStore(folder)) == {stored_as(key(5))}


def test_of_too_much_the_oldest_is_removed(folder: Path) -> None:
    work = work_on(FolderStore(folder), max_bytes=250)
    for number in (3, 1, 4, 0, 2):
        work.put(key(number), bytes(100))
        made_older(folder, 60)
    assert work.sweep() == 3
    assert keys_of(FolderStore(folder)) == {stored_as(key(0)), stored_as(key(2))}
    assert work.sweep() == 0


def test_a_bucket_is_swept_as_a_folder_is(store: Store) -> None:
    work = work_on(store, max_bytes=250)
    for number in range(5):
        work.put(key(number), bytes(100))
    assert work.sweep() == 3 and len(keys_of(store)) == 2
    assert work_on(store, max_age_s=-60.0).sweep() == 2 and keys_of(store) == set()


def test_what_is_not_an_entry_is_never_removed(tmp_path: Path, settings: Settings) -> None:
    others = [tmp_path / "audio/3/a/0f3a", tmp_path / "checkpoints/notes.txt", tmp_path / "checkpoints/audio/x/y/0f3a"]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("not ours")
    made_older(tmp_path, 10_000 * HOUR_S)
    work = open_work(settings.model_copy(update={"work_dir": str(tmp_path), "work_max_bytes": 0}))
    assert work is not None
    work.put(key(1), b"spoken")
    work.sweep()
    work.close()
    assert all(other.is_file() for other in others)
    assert work.get(key(1)) is None


def test_workers_sweep_the_same_folder_at_once_while_another_puts(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filler = work_on(FolderStore(folder))
    for number in range(150):
        filler.put(key(number), bytes(100))
    sweepers = [work_on(FolderStore(folder), max_bytes=2_000) for _ in range(3)]
    threads = [threading.Thread(target=sweeper.sweep) for sweeper in sweepers]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        kept = [filler.put(key(number), bytes(100)) for number in range(150, 200)]
        for thread in threads:
            thread.join()
    assert all(kept) and caplog.records == []


def test_sweeping_begins_by_itself_and_ends_with_the_worker(folder: Path, settings: Settings) -> None:
    before = work_on(FolderStore(folder))
    before.put(key(1), b"old")
    made_older(folder, 80 * HOUR_S)
    work = open_work(settings.model_copy(update={"work_dir": str(folder.parent)}))
    assert work is not None
    while keys_of(FolderStore(folder)):
        time.sleep(0.005)
    work.close()
    assert not work._sweeper.is_alive()


def test_a_store_that_cannot_be_swept_is_logged_and_tried_again(
    broken: FolderStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise LibraryError("storage_failed", "gone")

    work = work_on(broken)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(FolderStore, "sweep", fail)
        assert work.sweep() == 0
    assert "could not be swept: gone" in caplog.text
    (tmp_path / "place").unlink()
    work.put(key(1), b"spoken")
    assert work_on(broken, max_age_s=-60.0).sweep() == 1


# ---------------------------------------------------------------------------------- crashes


def test_a_writer_killed_at_any_moment_leaves_nothing_half_written(folder: Path) -> None:
    program = "import sys; from tests.jobs.writers import kill_writers; kill_writers(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", program, str(folder), str(NUM_KILLS)], cwd=ROOT, check=True, timeout=60)
    work = work_on(FolderStore(folder))
    entries = [name.rpartition("/")[2] for name in keys_of(FolderStore(folder)) if not name.startswith("tmp/")]
    assert len(entries) > NUM_KILLS
    assert all(work.get(f"audio/{name}") == content_of(name) for name in entries)
    made_older(folder, 25 * HOUR_S)
    work_on(FolderStore(folder), max_age_s=1_000 * HOUR_S).sweep()
    assert len(keys_of(FolderStore(folder))) == len(entries)  # and what else they left is gone


# ---------------------------------------------------------------------------------- opening


def test_no_work_dir_is_no_store(settings: Settings) -> None:
    assert open_work(settings) is None


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_folder_is_taken_in_all_its_spellings_and_holds_the_jobs_own_files_too(
    tmp_path: Path, settings: Settings, form: str
) -> None:
    work = open_work(settings.model_copy(update={"work_dir": form.format(tmp_path)}))
    assert work is not None
    assert work.put(key(1), b"spoken") and (tmp_path / "checkpoints" / stored_as(key(1))).is_file()
    assert work.folder == tmp_path / "checkpoints" / "tmp"
    work.close()


def test_a_bucket_is_taken_with_the_credentials_of_the_settings(
    settings: Settings, bucket: str, s3_options: S3Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORK_DIR", f"s3://{bucket}/some/prefix")
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3_options.endpoint_url or "")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "secret")
    read = Settings()
    assert read.unused == []
    work = open_work(read)
    assert work is not None and work.folder is None
    assert work.put(key(1), b"spoken") and work.get(key(1)) == b"spoken"
    work.close()


def test_a_worker_opens_it_and_closes_it(tmp_path: Path, settings: Settings) -> None:
    worker = Worker.load(settings.model_copy(update={"model": "draft", "work_dir": str(tmp_path)}))
    work = worker._work
    assert work is not None and work.folder is not None and work.folder.is_relative_to(tmp_path)
    worker.close()
    assert not work._sweeper.is_alive()
    with pytest.raises(LibraryError, match="WORK_DIR"):
        Worker.load(settings.model_copy(update={"model": "draft", "work_dir": "ftp://host/x"}))


@pytest.mark.parametrize("place", ["s3://", "ftp://host/x", "s3://bucket/a b", "a-file"])
def test_what_can_be_no_store_is_told_at_the_start_by_the_settings_name(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("x")
    with pytest.raises(LibraryError, match="^WORK_DIR: ") as caught:
        open_work(settings.model_copy(update={"work_dir": place}))
    assert caught.value.code in ("invalid_request", "storage_failed")
