"""Whether the voices that rows name are in the endpoint's library: it is asked once, before anything is submitted."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from typing import Any

from jobs.schema import MAX_LISTED
from scripts.batch.checking import Row, voices_named
from scripts.batch.client import Client
from scripts.batch.errors import EndpointError
from scripts.batch.outcomes import Failure
from scripts.batch.polling import ended
from scripts.batch.rows import Problem
from voice_library.naming import fold

_ATTEMPTS = 3


async def missing_voices(client: Client, rows: Sequence[Row]) -> list[Problem]:
    """A problem for each row that names a voice which the endpoint does not have.

    Raises:
        EndpointError: it cannot say.
    """
    wanted = {(field, name) for row in rows for field, name in voices_named(row)}
    if not wanted:
        return []
    voices = await _listed(client)
    if isinstance(voices, Failure):
        return [Problem(row.source, f"{field}: {voices.message}") for row in rows for field, _ in voices_named(row)]
    known = {fold(voice[name]) for voice in voices for name in ("voice_id", "name") if voice.get(name)}
    names = {fold(voice["name"]): voice["name"] for voice in voices if voice.get("name")}
    return [
        Problem(row.source, f"{field}: there is no voice {name!r}{_near(name, names)}")
        for row in rows
        for field, name in voices_named(row)
        if fold(name) not in known
    ]


def _near(name: str, names: dict[str, str]) -> str:
    near = difflib.get_close_matches(fold(name), names, 3)
    return f"; did you mean {' or '.join(names[each] for each in near)}?" if near else ""


async def _listed(client: Client) -> list[dict[str, Any]] | Failure:
    """All voices, page by page; a failure where there is no library."""
    voices: list[dict[str, Any]] = []
    while True:
        page = await _ask(client, {"operation": "list_voices", "offset": len(voices), "limit": MAX_LISTED})
        if isinstance(page, Failure):
            return page
        voices += page.get("voices", [])
        if not page.get("voices") or len(voices) >= page.get("total", 0):
            return voices


async def _ask(client: Client, fields: dict[str, Any]) -> dict[str, Any] | Failure:
    failure = None
    for _ in range(_ATTEMPTS):
        outcome = (await ended(client, await client.run({"input": fields}), asyncio.sleep)).outcome
        if outcome.result is not None:
            return outcome.result
        failure = outcome.failure
        assert failure is not None, outcome
        if failure.code == "invalid_request":
            return failure
    assert failure is not None
    raise EndpointError(f"the endpoint cannot list its voices: {failure.message} (--no-check-voices goes on)")
