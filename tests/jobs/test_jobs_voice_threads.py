"""Storage that is slow, as the jobs beside it see it: what waits for it, what does not, and what is given up."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobs import voices as voices_module
from tests.jobs.voice_support import MakeWorker, counts, recorded, run, save

PATIENCE_S = 30.0
"""After which what should have come is taken for stuck."""

HANGING_JOBS = ({"text": "Hi", "voice_name": "Anna"}, {"operation": "get_voice", "voice_name": "Anna"})


def test_a_store_that_hangs_holds_up_no_job_that_needs_no_voice(
    make_worker: MakeWorker, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    save(worker, "Anna")
    release, begun = threading.Event(), []
    assert worker._voices is not None
    library = worker._voices.library
    find = library.find

    def hang(wanted: str) -> Any:
        begun.append(wanted)
        assert release.wait(PATIENCE_S)
        return find(wanted)

    monkeypatch.setattr(library, "find", hang)

    async def scenario() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        hanging = [asyncio.create_task(worker.run({"input": dict(job)})) for job in HANGING_JOBS]
        while len(begun) < len(hanging):
            await asyncio.sleep(0.001)
        try:
            free = {"text": "Hello", "reference_audio": reference}
            result = await asyncio.wait_for(worker.run({"input": free}), PATIENCE_S / 3)
        finally:
            release.set()
            hung = await asyncio.gather(*hanging)
        return result, hung

    result, hung = asyncio.run(scenario())
    assert "error" not in result
    assert all("error" not in each for each in hung)


def test_what_waits_to_be_stored_is_bounded_counted_and_given_up_at_the_end(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    voice_id = save(worker, "Anna")["voice_info"]["voice_id"]
    voices = worker._voices
    assert voices is not None
    voice = voices.find(voice_id, "voice_id")
    conditionals = voices.conditionals(voice)
    for _ in range(voices_module._MAX_TO_STORE):  # until what saving her stored has given its room back
        assert voices._room_to_store.acquire(timeout=PATIENCE_S)
    monkeypatch.setattr(voices, "_room_to_store", threading.BoundedSemaphore(voices_module._MAX_TO_STORE))
    release, begun, puts = threading.Event(), threading.Event(), []

    def hang(*_: Any) -> None:
        puts.append(1)
        begun.set()
        assert release.wait(PATIENCE_S)

    monkeypatch.setattr(voices, "_put", hang)
    for _ in range(voices_module._MAX_TO_STORE + 3):
        voices.store(voice, conditionals)
    assert counts(worker)["dropped"] == 3
    assert begun.wait(PATIENCE_S)
    closing = threading.Thread(target=voices.close)
    closing.start()
    assert voices._room_to_store.acquire(timeout=PATIENCE_S)  # what waited was given up, before what has begun ended
    release.set()
    closing.join(PATIENCE_S)
    assert len(puts) == 1
    voices.store(voice, conditionals)  # of a job that ends after the close: no error
    assert voices._counts["dropped"] == 4


def test_a_save_that_has_begun_is_told_as_it_ended_though_the_job_was_cancelled_meanwhile(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    release, begun = threading.Event(), threading.Event()
    assert worker._voices is not None
    library = worker._voices.library
    add = library.add

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert release.wait(PATIENCE_S)
        return add(*args, **kwargs)

    monkeypatch.setattr(library, "add", slow)
    clone = {"operation": "voice_clone", "reference_audio": recorded(), "voice_name": "Anna", "save_to_library": True}

    async def scenario() -> dict[str, Any]:
        job = asyncio.create_task(worker.run({"input": clone}))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        job.cancel()
        await asyncio.sleep(0)
        release.set()
        return await job

    assert asyncio.run(scenario())["voice_info"]["saved"]
    assert run(worker, operation="list_voices")["total"] == 1
