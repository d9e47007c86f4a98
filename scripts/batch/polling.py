"""Waiting for a job's end: asked about often while it is young, seldom when it is old."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from scripts.batch.client import Client, Refused
from scripts.batch.outcomes import EXPIRED, NO_RESULT, OPEN, Failure, Outcome, Pieces, outcome_of

_SHORTEST_S, _LONGEST_S = 0.1, 10.0
_SHARE = 0.15
"""Of a job's age: how much later than it ended its end may be seen."""

Nap = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Args:
        outcome: its result or why there is none.
        audio: of a stream, the file in parts; None where the result holds or names it.
    """

    outcome: Outcome
    audio: tuple[bytes, ...] | None = None


async def ended(
    client: Client,
    job_id: str,
    nap: Nap,
    on_progress: Callable[[Any], None] = lambda _: None,
) -> Ended:
    """Wait for a job's end.

    Args:
        client: of its endpoint.
        nap: waits some seconds, or raises to stop it all.
        on_progress: told what a job that runs says of itself.

    Raises:
        EndpointError: see `Client`.
    """
    began_s = time.monotonic()
    try:
        while (answer := await client.status(job_id)).get("status") in OPEN:
            if answer.get("output"):
                on_progress(answer["output"])
            interval_s = min(max((time.monotonic() - began_s) * _SHARE, _SHORTEST_S), _LONGEST_S)
            await nap(interval_s * random.uniform(0.8, 1.2))
        outcome = outcome_of(answer)
        if outcome.failure is not None and outcome.failure.code == NO_RESULT:
            return await _streamed(client, job_id, outcome)
        return Ended(outcome)
    except Refused as error:
        if error.status == 404:
            return Ended(Outcome(None, Failure(EXPIRED, "the platform does not know the job any more", True)))
        return Ended(Outcome(None, Failure("internal", f"its status cannot be had: {error}", True)))


async def _streamed(client: Client, job_id: str, outcome: Outcome) -> Ended:
    """What a worker with STREAMING on gave in pieces; the platform keeps them until they are taken."""
    pieces = Pieces()
    while (answer := await client.stream(job_id)).get("stream"):
        for item in answer["stream"]:
            pieces.add(item.get("output") if isinstance(item, dict) else None)
    times = {"worker_s": outcome.worker_s, "wait_s": outcome.wait_s}
    if pieces.failure is not None:
        return Ended(Outcome(None, pieces.failure, **times))
    if not pieces.is_whole:
        return Ended(outcome)
    return Ended(Outcome(pieces.result, None, **times), tuple(pieces.audio))
