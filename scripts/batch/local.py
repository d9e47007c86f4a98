"""Workers on this machine, behind the same HTTP as a deployed endpoint's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from scripts.local_platform import Limits, LocalPlatform

DEFAULT_MODEL = "draft"
_RESULT_BYTES = 500_000_000
_TIMEOUT_S = 86_400.0


def kept_in(folder: Path) -> Path:
    """Where workers keep what they did, for a run that goes on: all audio once more."""
    return folder / ".batch-work"


@contextlib.contextmanager
def local_endpoint(num_workers: int, folder: Path) -> Iterator[LocalPlatform]:
    """An endpoint with so many workers, until the end of the block.

    What they keep of jobs (`WORK_DIR`) and their logs are in the folder. What a platform limits is not limited here:
    sizes of results and times of jobs.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    defaults = {
        "MODEL": DEFAULT_MODEL,
        "WORK_DIR": str(kept_in(folder).resolve()),
        "MAX_RESULT_BYTES": str(_RESULT_BYTES),
        "JOB_TIMEOUT_S": "0",
        "LOG_FORMAT": "text",
    }
    given = {name: value for name, value in os.environ.items() if value}
    limits = Limits(run_bytes=2 * _RESULT_BYTES, execution_timeout_s=_TIMEOUT_S, ttl_s=_TIMEOUT_S)
    platform = LocalPlatform(limits=limits)
    platform.start()
    try:
        for number in range(num_workers):
            platform.start_worker(log=logs / f"worker-{number + 1}.log", environment=defaults | given)
        yield platform
    finally:
        platform.close(within_s=5.0)
