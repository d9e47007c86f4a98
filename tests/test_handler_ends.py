"""How a worker's process ends: what runs is finished, nothing more is taken, and the platform is told to replace it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.platform import Platform, wait_until, without_ours

ROOT = Path(__file__).resolve().parent.parent

FRAGILE = f"""
import os, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from concurrent.futures import Future
from engine.draft import DraftEngine
from engine.errors import SpeechError
from jobs import logs, loop, worker
from jobs.settings import read_settings

class Fragile(DraftEngine):
    '''Loses its device at a word, and is slow at another.'''

    def submit(self, request):
        if "poison" in request.text:
            self.is_lost = True
            raise SpeechError("generation_failed", "the device failed")
        if "slow" not in request.text:
            return super().submit(request)
        slow = Future()
        threading.Timer(2.0, lambda: slow.set_result(super(Fragile, self).submit(request).result())).start()
        return slow

    def free_bytes(self):
        return {{"host": int(os.environ.get("FREE_BYTES", 1 << 40))}}

worker._load_draft = Fragile.load
settings = read_settings()
logs.configure(settings)
loop.serve(settings)
"""


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


def fragile(folder: Path) -> Path:
    script = folder / "fragile.py"
    script.write_text(FRAGILE)
    return script


def test_a_worker_whose_device_failed_finishes_what_runs_takes_no_more_and_has_itself_replaced(
    platform: Platform, tmp_path: Path
) -> None:
    with platform.worker(fragile(tmp_path), tmp_path, MODEL="draft", MAX_CONCURRENCY="3") as process:
        slow = platform.submit(text="This is slow.")
        bad = platform.submit(text="This is poison.")
        told = platform.result(bad)
        assert told["output"]["error_code"] == "generation_failed" and "stopPod" not in told
        done = platform.result(slow)
        assert done["output"]["duration_s"] > 0 and done["stopPod"] is True
        assert process.wait(60) == 0
        left = platform.submit(text="Nobody takes this.")
        assert left not in platform.results


def test_a_streaming_worker_whose_device_failed_has_itself_replaced_too(platform: Platform, tmp_path: Path) -> None:
    script = fragile(tmp_path)
    script.write_text(FRAGILE.replace("def submit(self, request):", "def stream(self, request, **_):", 1))
    with platform.worker(script, tmp_path, MODEL="draft", STREAMING="1") as process:
        told = platform.result(platform.submit(text="This is poison."))
        assert json.loads(told["error"])["error_code"] == "generation_failed"
        assert told["stopPod"] is True
        assert process.wait(60) == 0


def test_a_worker_that_is_told_to_end_delivers_what_runs(platform: Platform, tmp_path: Path) -> None:
    with platform.worker(fragile(tmp_path), tmp_path, MODEL="draft") as process:
        slow = platform.submit(text="This is slow.")
        wait_until(lambda: platform.status(slow)["status"] == "IN_PROGRESS")
        process.send_signal(signal.SIGTERM)
        assert platform.result(slow)["output"]["duration_s"] > 0
        assert process.wait(60) == 0


def test_a_machine_that_is_unfit_takes_no_job_and_says_why(platform: Platform, tmp_path: Path) -> None:
    job = platform.submit(text="Hello.")
    with platform.worker(fragile(tmp_path), tmp_path, MODEL="draft", FREE_BYTES="1000") as process:
        assert process.wait(60) == 1
    log = (tmp_path / "log").read_text()
    assert "Fitness check failed: free_memory" in log and "MiB are free on host" in log
    assert job not in platform.results


def test_streaming_is_refused_where_the_sdk_cannot_stream(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "handler.py")],
        cwd=tmp_path,
        env=without_ours(os.environ) | {"MODEL": "draft", "STREAMING": "1", "RUNPOD_REALTIME_PORT": "8765"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert "STREAMING" in ended.stderr and "Traceback" not in ended.stderr
