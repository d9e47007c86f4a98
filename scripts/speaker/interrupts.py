"""Ctrl-C, SIGTERM and a terminal that is closed (SIGHUP): the first of them ends a run in order.

Imports little: it is there before all else, which takes seconds to import.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Coroutine
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal ended the run.

    Args:
        number: of the signal.

    Attributes:
        exit_code: what a shell calls an end by it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = _exit_code(number)


def end_at_once() -> None:
    """End without a word from now on, where there is nothing yet to put in order."""
    for number in _heard():
        signal.signal(number, _end)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, or to the first signal, which cancels it. More are for the impatient: Ctrl-C again ends at once.

    Only that one: of a terminal that is closed the shell tells, and the system too.

    Raises:
        Interrupted: by a signal.
    """
    import asyncio

    heard: list[int] = []

    async def attended() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int, _frame: object) -> None:
            if not heard:
                heard.append(number)
                loop.call_soon_threadsafe(task.cancel)
            elif number == signal.SIGINT:
                _end(number, None)

        before = {number: signal.signal(number, stop) for number in _heard()}
        try:
            await work
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    try:
        asyncio.run(attended())
    except asyncio.CancelledError:
        raise Interrupted(heard[0]) from None


def _heard() -> list[signal.Signals]:
    """Those that this system has, and that whoever started us (nohup, a script's `&`) does not want ignored."""
    numbers = [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _end(number: int, _frame: object) -> None:
    os._exit(_exit_code(number))


def _exit_code(number: int) -> int:
    return 128 + number
