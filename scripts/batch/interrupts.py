"""Ctrl-C and SIGTERM: heard once, asked about at a terminal, and obeyed at once where they come again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from enum import StrEnum
from typing import Any

import typer

EXIT_CODE = 130
"""Of a shell, for what ended by SIGINT."""

_STDIN, _STDERR = 0, 2
_IF_LEFT = "(Left, the next run collects them.)"


class OnInterrupt(StrEnum):
    """What becomes of the jobs that the platform has when a run is stopped."""

    ASK = "ask"
    CANCEL = "cancel"
    LEAVE = "leave"


async def asked_about_jobs(interrupts: Interrupts) -> OnInterrupt:
    """What to do with the jobs that the platform has. Where nobody answers they are left, to be collected."""
    if not (interrupts.are_of_a_person and _can_ask()):
        return OnInterrupt.LEAVE
    asking = asyncio.create_task(_ask_about_jobs())
    if await interrupts.ended_before(asking, again=True):
        return asking.result()
    asking.cancel()
    typer.echo(err=True)
    return OnInterrupt.LEAVE


def _can_ask() -> bool:
    """Whether somebody sees a question and can answer it. What reads in the background of a terminal is stopped."""
    if not (os.isatty(_STDIN) and os.isatty(_STDERR)):
        return False
    try:
        return sys.platform == "win32" or os.tcgetpgrp(_STDIN) == os.getpgrp()
    except OSError:  # a terminal, but not that of this session
        return False


async def _ask_about_jobs() -> OnInterrupt:
    lines: asyncio.Queue[str] = asyncio.Queue()
    while True:
        typer.echo(f"Cancel the jobs that the platform has? {_IF_LEFT} [y/N]: ", nl=False, err=True)
        threading.Thread(target=_read_line, args=(asyncio.get_running_loop(), lines), daemon=True).start()
        line = await lines.get()
        if not line:
            typer.echo(err=True)  # Ctrl-D moves to no new line
        if line.strip().lower() in ("y", "yes"):
            return OnInterrupt.CANCEL
        if line.strip().lower() in ("", "n", "no"):
            return OnInterrupt.LEAVE


def _read_line(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str]) -> None:
    """A line from a terminal, "" at its end. Not by sys.stdin, whose lock a thread that waits would hold at exit."""
    try:
        line = os.read(_STDIN, 1024).decode(errors="replace")
    except OSError:  # the terminal is gone
        line = ""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(lines.put_nowait, line)


class Interrupts:
    """Ctrl-C and SIGTERM while it is entered: the first is awaited, and one at a question; any other ends the process.

    Attributes:
        are_of_a_person: whether all that came were Ctrl-C.
    """

    def __enter__(self) -> Interrupts:
        loop = asyncio.get_running_loop()
        self.are_of_a_person = True
        self._come = asyncio.Event()
        self._is_awaited = True
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def hear(number: int, _frame: object) -> None:
            if not self._is_awaited:
                os._exit(EXIT_CODE)  # the manifest is true at any moment
            self._is_awaited = False
            self.are_of_a_person &= number == signal.SIGINT
            loop.call_soon_threadsafe(self._come.set)

        for number in self._before:
            signal.signal(number, hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def ended_before(self, task: asyncio.Task[Any], *, again: bool = False) -> bool:
        """Wait for a task; False when an interrupt came first.

        Args:
            task: goes on after an interrupt.
            again: whether another interrupt than those that came is awaited, while the task lasts.

        Raises:
            What the task raises.
        """
        if again:
            self._come, self._is_awaited = asyncio.Event(), True
        waiting = asyncio.create_task(self._come.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if again:
            self._is_awaited = False
        if task.done():
            task.result()
            return True
        return False
