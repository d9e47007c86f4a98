"""What both stores promise, and everything else is built on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from voice_library.folder_store import FolderStore
from voice_library.store import Store


def test_what_was_written_reads_back_and_lists(store: Store) -> None:
    assert store.read("a/b.json", 10) is None
    store.write("a/b.json", b"one")
    store.write("a/b.json", b"other")
    store.write("a/c/d.json", b"")
    assert store.read("a/b.json", 10) == b"other"
    assert {entry.key: entry.num_bytes for entry in store.list("a/")} == {"a/b.json": 5, "a/c/d.json": 0}
    assert [entry.key for entry in store.list("a/b")] == ["a/b.json"]
    assert list(store.list("z/")) == []


def test_a_blob_larger_than_asked_for_is_cut_one_byte_after(store: Store) -> None:
    store.write("big", bytes(1_000))
    assert len(store.read("big", 10) or b"") == 11


def test_creating_succeeds_once(store: Store) -> None:
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read("a/b", 10) == b"first"


def test_of_many_creators_at_once_one_wins_and_its_content_is_there(store: Store) -> None:
    barrier = threading.Barrier(8)

    def create(number: int) -> bool:
        barrier.wait()
        return store.create("name", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert store.read("name", 10) == b"%d" % won.index(True)


def test_replacing_needs_the_version_that_was_seen(store: Store) -> None:
    store.write("a", b"one")
    (seen,) = store.list("a")
    assert store.replace("a", b"two", seen.version)
    assert not store.replace("a", b"three", seen.version)
    assert store.read("a", 10) == b"two"
    (now,) = store.list("a")
    store.delete("a")
    assert not store.replace("a", b"four", now.version)
    assert store.read("a", 10) is None


def test_removing_needs_the_version_that_was_seen(store: Store) -> None:
    store.write("a", b"one")
    (seen,) = store.list("a")
    store.write("a", b"two")
    assert not store.remove("a", seen.version)
    assert store.read("a", 10) == b"two"
    (now,) = store.list("")
    assert now.key == "a" and store.remove("a", now.version)
    assert not store.remove("a", now.version)
    assert list(store.list("")) == []


def test_a_version_changes_with_the_content(store: Store) -> None:
    store.write("a", b"one")
    (before,) = store.list("a")
    store.write("a", b"two")
    (after,) = store.list("a")
    assert before.version != after.version


def test_deleting_twice_is_deleting_once(store: Store) -> None:
    store.write("a/b/c", b"x")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert list(store.list("a/")) == []
    store.write("a/b/d", b"y")
    assert store.read("a/b/d", 10) == b"y"


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", "a//b", ".a", "a/", "a\\b", "a b", "ä"])
def test_no_key_leads_out_of_the_store(store: Store, key: str) -> None:
    with pytest.raises(AssertionError):
        store.write(key, b"x")


def test_a_reader_never_sees_a_part_of_a_blob(store: Store) -> None:
    blobs = {bytes([number]) * 200_000 for number in range(2)}
    store.write("a", min(blobs))
    is_done = threading.Event()

    def read() -> set[bytes | None]:
        seen = set()
        while not is_done.is_set():
            seen.add(store.read("a", 1 << 20))
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for _ in range(20):
            for blob in blobs:
                store.write("a", blob)
        is_done.set()
        assert set[bytes | None]().union(*(reader.result() for reader in readers)) <= blobs


def test_removing_works_in_a_folder_copied_without_its_empty_folders(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("a/b", b"one")
    (tmp_path / "tmp").rmdir()
    (seen,) = store.list("a/")
    assert store.remove("a/b", seen.version)
    assert store.read("a/b", 10) is None
