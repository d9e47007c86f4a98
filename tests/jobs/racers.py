"""Workers that race for a key, as processes of their own: what the tests of `jobs.results` start and kill."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from jobs.claims import Claims
from jobs.context import JobContext
from jobs.results import Results, once
from jobs.schema import Tts
from jobs.settings import Settings
from voice_library.folder_store import FolderStore

RENEW_EVERY_S, STALE_AFTER_S = 0.1, 0.6


def results_in(folder: Path) -> Results:
    """Results whose claims are given up soon."""
    store = FolderStore(folder)
    claims = Claims(store, renew_every_s=RENEW_EVERY_S, stale_after_s=STALE_AFTER_S)
    return Results(store, max_age_s=3_600.0, max_bytes=1 << 30, claims=claims)


def context() -> JobContext:
    """Surroundings in which nothing can be spoken."""
    return JobContext(None, Settings())  # type: ignore[arg-type]


def main(folder: str, takes_s: str) -> None:
    """Do one job under a key: tells when it begins, and in the end what came of it."""
    results = results_in(Path(folder) / "results")

    async def make() -> dict[str, Any]:
        with (Path(folder) / "made").open("a") as made:
            made.write("x")
        print("begun", flush=True)
        time.sleep(float(takes_s))  # as an engine does, while others renew
        return {"audio": secrets.token_hex(8), "warnings": []}

    request = Tts(text="Hello", idempotency_key="the key")
    print("ready", flush=True)
    sys.stdin.readline()
    result = asyncio.run(once(request, context(), results, make))
    print(result["audio"], result.get("repeated", False), *result["warnings"], flush=True)
    results.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
