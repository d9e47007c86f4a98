"""Waiting on an event loop for the next change of something."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Pulse:
    """Beats when something has changed; any number may wait for it."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def beat(self) -> None:
        """Wake all who wait."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

    async def wait_for(self, condition: Callable[[], bool], within_s: float) -> None:
        """Return as soon as the condition holds, which is looked at with every beat, or when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not condition():
                    beat: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiting.append(beat)
                    await beat
