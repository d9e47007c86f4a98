"""Standard input, read so that an interrupt need not wait for more of it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import AsyncIterator

from scripts.speaker.unattended import unattended


async def read_all() -> bytes:
    """All of standard input, to its end.

    Raises:
        OSError: it cannot be read.
    """
    return await unattended(_raw().readall)


async def read_lines() -> AsyncIterator[bytes]:
    """Each line of standard input as it comes: none is taken before it is asked for.

    Raises:
        OSError: it cannot be read.
    """
    while line := await unattended(_raw().readline):
        yield line


def _raw() -> io.RawIOBase:
    """Without a buffer: a program cannot end while a thread waits in that, for its lock."""
    assert isinstance(sys.stdin.buffer, io.BufferedReader), sys.stdin.buffer
    raw = sys.stdin.buffer.raw
    if sys.platform != "win32" and not os.get_blocking(raw.fileno()):  # where it has nothing yet, it seems to end
        raise OSError("standard input does not wait for what comes (O_NONBLOCK); --file names a file")
    return raw
