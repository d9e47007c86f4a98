"""Work that nobody waits for: making voices ready, and saving the counts of use.

In threads that do not keep the process alive, and that are given a moment to end when the library closes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from voice_library.errors import LibraryError
from voice_library.usage import Usage

_log = logging.getLogger(__name__)

_CLOSE_WITHIN_S = 5.0


class Background:
    """Threads of one library."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self.closing = threading.Event()

    def run(self, work: Callable[[], object]) -> None:
        """Run something that never raises."""

        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="voice-library", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def close(self) -> None:
        """Ask what runs to end, and wait a little for it."""
        self.closing.set()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(_CLOSE_WITHIN_S)


class Preloader:
    """Makes voices ready before somebody asks for them.

    Args:
        load: makes one ready, by id or name; raises LibraryError.
        usage: knows which are used most.
        background: where it is done.
    """

    def __init__(self, load: Callable[[str], object], usage: Usage, background: Background) -> None:
        self._load = load
        self._usage = usage
        self._background = background
        self._lock = threading.Lock()
        self.num_ready = self.num_failed = 0

    def start(self, voices: Sequence[str] | int) -> Future[int]:
        """Make these voices (ids or names), or so many of the most used, ready; the result is how many are."""
        done: Future[int] = Future()
        wanted = voices if isinstance(voices, int) else tuple(voices)
        self._background.run(lambda: done.set_result(self._load_all(wanted)))
        return done

    def _load_all(self, voices: Sequence[str] | int) -> int:
        return sum(self._is_ready(voice) for voice in self._wanted(voices))

    def _wanted(self, voices: Sequence[str] | int) -> Sequence[str]:
        try:
            return self._usage.most_used(voices) if isinstance(voices, int) else voices
        except LibraryError as error:
            self._fail("the most used voices", error)
            return ()

    def _is_ready(self, voice: str) -> bool:
        if self._background.closing.is_set():
            return False
        try:
            self._load(voice)
        except LibraryError as error:
            self._fail(f"voice {voice!r}", error)
            return False
        with self._lock:
            self.num_ready += 1
        return True

    def _fail(self, what: str, error: LibraryError) -> None:
        _log.warning("%s could not be made ready: %s", what, error.message)
        with self._lock:
            self.num_failed += 1
