"""Workers' processes: started, replaced when they end, and gone when this process is.

A worker is a process group: the SDK's heartbeat is a process of its own, which outlives a worker that is killed.
Beside the workers runs a keeper, a few lines of shell. It reads from a pipe which groups there are, and at the pipe's
end, which comes with the end of this process in whatever way it ends, it kills them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_KEEPER = """
groups=
while read -r sign group; do
    kept=
    for each in $groups; do [ "$each" = "$group" ] || kept="$kept $each"; done
    groups=$kept
    [ "$sign" = "+" ] && groups="$groups $group"
done
for each in $groups; do kill -9 "-$each"; done
"""
_ANNOUNCED = 'echo "+ $$" >&0; exec "$@" </dev/null'
"""Tells the keeper, over the pipe on standard input, before it becomes the worker: no worker is ever unknown to it."""

_STEADY_S = 10.0
"""A worker that ended sooner may well end as soon again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Keeper:
    """Starts process groups, and kills those that are left when this process is gone or `close` is called."""

    def __init__(self) -> None:
        ours, self._pipe = os.pipe()
        with open(ours, "rb") as end:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER],
                stdin=end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )

    def start(
        self, command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command as leader of a process group; its output is added to a file."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["/bin/sh", "-c", _ANNOUNCED, "sh", *command],
                cwd=cwd,
                env=dict(environment),
                stdin=self._pipe,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what is left of a group whose leader has ended."""
        kill_group(process)
        os.write(self._pipe, b"- %d\n" % process.pid)

    def close(self) -> None:
        """Kill all groups that have not ended."""
        os.close(self._pipe)
        self._process.wait()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children at once."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter is macOS's word for a dead leader
        os.killpg(process.pid, signal.SIGKILL)


class LocalWorker:
    """A place for a worker, with a fresh process in it whenever one ends.

    Made by `LocalPlatform.start_worker`.

    Args:
        name: of the place; its processes are name-1, name-2, ...
        start: starts the process of that name.
        on_end: is told that the process of that name has ended.
        replaces: whether a fresh process follows.

    Attributes:
        process: the one that runs, or the last that ran.
        pod_id: its name.
        num_started: how many there were.
    """

    def __init__(
        self,
        name: str,
        *,
        start: Callable[[str], subprocess.Popen[bytes]],
        on_end: Callable[[str, subprocess.Popen[bytes]], None],
        replaces: bool,
    ) -> None:
        self.name = name
        self.num_started = 0
        self._start_process, self._on_end, self._replaces = start, on_end, replaces
        self._num_quick = 0
        self._is_stopping = threading.Event()
        self._lock = threading.Lock()  # of what is started, against what is stopped
        self._start()
        self._thread = threading.Thread(target=self._look_after, name=name, daemon=True)
        self._thread.start()

    def terminate(self) -> None:
        """Ask the process to finish its jobs and end."""
        self.process.terminate()

    def kill(self) -> None:
        """End the process and its heartbeat at once, as if its machine had failed; it is replaced."""
        kill_group(self.process)

    def kill_if(self, pod_id: str) -> None:
        """The same, unless another process has taken its place."""
        if pod_id == self.pod_id:
            self.kill()

    def begin_stop(self) -> None:
        """Ask the process to end, and let none follow."""
        with self._lock:
            self._is_stopping.set()
            self.process.terminate()

    def stop(self, within_s: float) -> bool:
        """End for good, with force after some seconds; whether it went without."""
        self.begin_stop()
        self._thread.join(within_s)
        by_itself = not self._thread.is_alive()
        self.kill()
        self._thread.join()
        return by_itself

    def _start(self) -> None:
        self.num_started += 1
        self.pod_id = f"{self.name}-{self.num_started}"
        self.process = self._start_process(self.pod_id)
        self._started_s = time.monotonic()

    def _look_after(self) -> None:
        while True:
            self.process.wait()
            self._on_end(self.pod_id, self.process)
            is_quick = time.monotonic() - self._started_s < _STEADY_S
            self._num_quick = self._num_quick + 1 if is_quick else 0
            if not self._replaces or self._is_stopping.wait(pause_s(self._num_quick)):
                return
            with self._lock:
                if self._is_stopping.is_set():
                    return
                self._start()


def pause_s(num_quick: int) -> float:
    """Before the next process, when so many in a row ended soon: none after the first, then more and more."""
    return 0.0 if num_quick < 2 else min(_FIRST_PAUSE_S * 2.0 ** min(num_quick - 2, 20), _LONGEST_PAUSE_S)
