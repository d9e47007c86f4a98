"""Standard input, read so that an interrupt need not wait for more of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import threading
from collections.abc import AsyncIterator, Callable


async def read_all() -> bytes:
    """All of standard input, to its end.

    Raises:
        OSError: it cannot be read.
    """
    return await _unattended(_raw().readall)


async def read_lines() -> AsyncIterator[bytes]:
    """Each line of standard input as it comes: none is taken before it is asked for.

    Raises:
        OSError: it cannot be read.
    """
    while line := await _unattended(_raw().readline):
        yield line


def _raw() -> io.RawIOBase:
    """Without a buffer: a program cannot end while a thread waits in that, for its lock."""
    assert isinstance(sys.stdin.buffer, io.BufferedReader), sys.stdin.buffer
    return sys.stdin.buffer.raw


async def _unattended(read: Callable[[], bytes]) -> bytes:
    """What `read` gives, in a thread that nobody waits for: what it waits for may never come."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()

    def settle(data: bytes, error: OSError | None) -> None:
        if answer.done():  # cancelled
            return
        if error is None:
            answer.set_result(data)
        else:
            answer.set_exception(error)

    def run() -> None:
        data, error = b"", None
        try:
            data = read()
        except OSError as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, data, error)

    threading.Thread(target=run, name="stdin", daemon=True).start()
    return await answer
