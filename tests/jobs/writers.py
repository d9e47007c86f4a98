"""Writers that are killed: what the other processes of the tests of `jobs.work` do."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

from jobs.work import Work
from voice_library.folder_store import FolderStore

LONGEST_LIFE_S = 0.04


def content_of(name: str) -> bytes:
    """What lies under `audio/name`: long enough to be cut off in the middle."""
    return name.encode() * 20_000


def kill_writers(folder: str, num_kills: str) -> None:
    """Let processes put entries, one after another, and kill each of them at some moment."""
    chance = random.Random(5)
    for number in range(int(num_kills)):
        writer = os.fork()
        if not writer:
            _write_for_ever(Path(folder), number)
        time.sleep(chance.uniform(LONGEST_LIFE_S / 4, LONGEST_LIFE_S))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def _write_for_ever(folder: Path, writer: int) -> None:
    work = Work(FolderStore(folder), max_age_s=3_600.0, max_bytes=1 << 30)
    for number in itertools.count():
        name = f"{writer}-{number}"
        assert work.put(f"audio/{name}", content_of(name))
