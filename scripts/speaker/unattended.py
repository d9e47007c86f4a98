"""Calls that may wait for ever, in threads that nobody waits for: neither who is cancelled nor the program's end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def unattended(call: Callable[[], T]) -> T:
    """What `call` gives. Who is cancelled leaves it alone: it may go on.

    Raises:
        What it raises.
    """
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()  # from now on nobody can cancel it

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="unattended", daemon=True).start()
    return await asyncio.wrap_future(answer)
