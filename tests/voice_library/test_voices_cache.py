"""What is kept near at hand: audio in memory, conditionals beside the voice, the most used voices."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.voice_library.conftest import OpenLibrary
from tests.voice_library.sounds import RATE, sound
from voice_library import LibraryError, VoiceLibrary
from voice_library.audio import FloatArray, as_kept, audio_hash
from voice_library.cache import AudioCache, pack, unpack
from voice_library.store import Store


@given(st.lists(st.integers(-(2**23), 2**23 - 1), min_size=1, max_size=50), st.sampled_from([1, 256]))
def test_packing_loses_nothing_and_takes_half_where_sixteen_bits_will_do(integers: list[int], step: int) -> None:
    audio = (np.array(integers) // step * step / 2**23).astype(np.float32)
    packed = pack(audio)
    assert np.array_equal(unpack(packed), audio) and not unpack(packed).flags.writeable
    assert packed.nbytes <= (4 if step == 1 else 2) * audio.size


def test_audio_is_read_once_and_bounded_by_bytes() -> None:
    loads: list[str] = []

    def load(key: str) -> FloatArray:
        loads.append(key)
        return np.full(100, 0.5, np.float32)  # 200 bytes as 16-bit integers

    cache = AudioCache(max_bytes=500)
    for key in "aabbcacz":
        assert cache.get(key, lambda key=key: load(key)).size == 100  # type: ignore[misc]
    assert loads == ["a", "b", "c", "a", "z"]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.num_bytes) == (3, 5, 2, 400)
    cache.drop("z")
    assert cache.stats().entries == 1
    tiny = AudioCache(max_bytes=100)
    assert tiny.get("a", lambda: load("a")).size == 100 and tiny.stats().entries == 0


def test_many_threads_that_want_one_voice_read_it_once(library: VoiceLibrary) -> None:
    voice = library.add("Anna", sound(num_samples=RATE), RATE)
    barrier = threading.Barrier(8)

    def get(_: int) -> FloatArray:
        barrier.wait()
        return library.get_audio(voice.voice_id)[0]

    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(get, range(8)))
    assert all(np.array_equal(array, arrays[0]) for array in arrays)
    cache = library.stats().cache
    assert (cache.hits, cache.misses, cache.entries) == (7, 1, 1)


def test_all_who_wait_for_a_failing_load_learn_of_it_and_the_next_tries_again() -> None:
    cache, is_waiting = AudioCache(1_000), threading.Event()

    def fail() -> FloatArray:
        is_waiting.wait(10)
        raise ValueError("damaged")

    def get(_: int) -> str:
        with pytest.raises(ValueError, match="damaged") as raised:
            cache.get("a", fail)
        return str(raised.value)

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(get, number) for number in range(4)]
        is_waiting.set()
        assert {each.result() for each in waiting} == {"damaged"}
    assert cache.get("a", lambda: np.zeros(3, np.float32)).size == 3


def test_conditionals_are_found_by_others_under_their_key_only(open_library: OpenLibrary) -> None:
    here, there = open_library(), open_library()
    voice, other = here.add("Anna", sound(1), RATE), here.add("Berta", sound(2), RATE)
    key = "turbo/checkpoint 1/../é\n"
    assert there.get_conditionals(voice.voice_id, key) is None
    here.put_conditionals(voice.voice_id, key, b"one")
    assert there.get_conditionals(voice.voice_id, key) == b"one"
    here.put_conditionals(voice.voice_id, key, b"one")
    assert there.get_conditionals(voice.voice_id, key.replace("1", "2")) is None
    assert there.get_conditionals(other.voice_id, key) is None
    stats = here.stats()
    assert (stats.num_conditionals, stats.conditionals_bytes) == (1, 3)
    assert stats.audio_bytes > 2 * 2_400


def test_conditionals_need_a_voice_a_key_and_some_bytes(library: VoiceLibrary) -> None:
    voice = library.add("Anna", sound(), RATE)
    for arguments, code, field in (
        (("nobody", "key", b"x"), "voice_not_found", "voice_id"),
        (("../x", "key", b"x"), "invalid_request", "voice_id"),
        ((voice.voice_id, "", b"x"), "invalid_request", "key"),
        ((voice.voice_id, "key", b""), "invalid_request", "data"),
        ((voice.voice_id, "key", "text"), "invalid_request", "data"),
    ):
        with pytest.raises(LibraryError) as refused:
            library.put_conditionals(*arguments)
        assert (refused.value.code, refused.value.field) == (code, field)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"!" + data[1:]])
def test_damaged_conditionals_are_never_returned_and_are_replaced(
    library: VoiceLibrary, store: Store, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    voice = library.add("Anna", sound(), RATE)
    library.put_conditionals(voice.voice_id, "key", b"data")
    (entry,) = (entry for entry in store.list("voices/") if "conditionals" in entry.key)
    store.write(entry.key, damage(b"data"))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert library.get_conditionals(voice.voice_id, "key") is None
    assert entry.key in caplog.text
    assert [problem.voice_id for problem in library.check()] == [voice.voice_id]
    assert library.check() == []
    library.put_conditionals(voice.voice_id, "key", b"data")
    assert library.get_conditionals(voice.voice_id, "key") == b"data"


def test_named_voices_are_made_ready_and_failures_are_counted(library: VoiceLibrary) -> None:
    library.add("Anna", sound(), RATE)
    assert library.preload(["anna", "nobody", "../x"]).result(timeout=30) == 1
    stats = library.stats()
    assert (stats.num_preloaded, stats.num_preload_failures, stats.cache.entries) == (1, 2, 1)


def test_the_most_used_voices_of_all_workers_are_made_ready_after_a_restart(open_library: OpenLibrary) -> None:
    first, second = open_library(), open_library()
    ids = [first.add(f"voice {number}", sound(number), RATE).voice_id for number in range(4)]
    for worker, number, times in ((first, 0, 1), (first, 1, 2), (second, 2, 5), (second, 1, 2)):
        for _ in range(times):
            worker.get_audio(ids[number])
    first.close()
    second.close()
    restarted = open_library()
    assert restarted.preload(2).result(timeout=30) == 2
    before = restarted.stats().cache.misses
    for voice_id in (ids[1], ids[2]):
        restarted.get_audio(voice_id)
    assert restarted.stats().cache.misses == before == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": "x", "b": -1, "c": 1e9}', b"[" * 100_000])
def test_damaged_counts_of_use_are_no_counts(library: VoiceLibrary, store: Store, content: bytes) -> None:
    library.add("Anna", sound(), RATE)
    for number in range(8):
        store.write(f"usage/{number}.json", content)
    assert library.preload(3).result(timeout=30) == 0
    library.get_audio(library.find("Anna").voice_id)
    library.close()


def test_what_a_voice_will_sound_like_is_known_before_it_is_stored(library: VoiceLibrary) -> None:
    audio = sound(7, RATE) * 12  # beyond full scale here and there
    voice = library.add("Anna", audio, RATE)
    assert np.array_equal(as_kept(audio), library.get_audio(voice.voice_id)[0])
    assert audio_hash(as_kept(audio), RATE) == voice.audio_hash


def test_uses_of_what_callers_keep_are_counted_and_looks_that_are_no_use_are_not(library: VoiceLibrary) -> None:
    rare, common, looked_at = (library.add(name, sound(seed), RATE) for seed, name in enumerate(("a", "b", "c")))
    for _ in range(3):
        library.note_use(common.voice_id)
        library.get_audio(looked_at.voice_id, is_use=False)
        library.get_conditionals(looked_at.voice_id, "key", is_use=False)
    library.get_audio(rare.voice_id)
    assert library.most_used(10) == (common, rare)
    library.delete(common.voice_id)
    assert library.most_used(10) == (rare,)


@pytest.mark.parametrize("metadata", [{"tags": "word"}, {"language": "x"}, {"description": "\x00"}, {"gender": 3}])
def test_what_would_not_be_added_is_refused_before(library: VoiceLibrary, metadata: dict[str, object]) -> None:
    library.add("Anna", sound(), RATE, voice_id="anna")
    assert library.check_new("Berta", "berta", tags=["one", "one"])["tags"] == ("one",)
    for name, voice_id, more, code in (
        ("Anna", None, {}, "voice_exists"),
        ("Berta", "anna", {}, "voice_exists"),
        ("../x", None, {}, "invalid_request"),
        ("Berta", "../x", {}, "invalid_request"),
        ("Berta", None, metadata, "invalid_request"),
    ):
        with pytest.raises(LibraryError) as raised:
            library.check_new(name, voice_id, **more)
        assert raised.value.code == code


def test_conditionals_of_a_voice_that_another_worker_deleted_or_renamed_leave_nothing_or_stay(
    open_library: OpenLibrary, store: Store
) -> None:
    here, there = open_library(refresh_s=3_600.0), open_library()
    deleted, renamed = here.add("Anna", sound(0), RATE), here.add("Berta", sound(1), RATE)
    there.delete(deleted.voice_id)
    there.update(renamed.voice_id, name="Carla")
    here.put_conditionals(renamed.voice_id, "key", b"data")
    assert there.get_conditionals(renamed.voice_id, "key") == b"data"
    with pytest.raises(LibraryError) as raised:
        here.put_conditionals(deleted.voice_id, "key", b"data")
    assert raised.value.code == "voice_not_found"
    assert list(store.list(f"voices/{deleted.voice_id}/")) == []
