"""The voice library and the engine, joined: a named voice becomes conditionals that are computed once by anyone.

In memory, else as some worker stored them beside the voice, else computed from its recording and then stored
for the others. Everything here blocks on storage or the model: call it with `Voices.run`, whose threads serve
nothing else, so that a store that hangs holds up no job but those that need it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from cachetools import LRUCache

from engine.errors import SpeechError
from engine.types import COMPACT_MARK, Conditionals, VoicePrompt
from jobs.context import SpeechEngine
from jobs.errors import JobError
from jobs.logs import in_context
from jobs.settings import Settings
from voice_library import LibraryError, S3Options, Voice, VoiceLibrary

COUNTED = (
    "from_memory",
    "from_store",
    "computed",
    "stored",
    "dropped",
    "damaged",
    "store_failures",
    "preloaded",
    "preload_failures",
)

_MAX_CALLS = 16
"""Calls of jobs at a time; those of more jobs wait their turn."""

_MAX_TO_STORE = 64
"""Conditionals that wait to be stored, of which each holds memory; what comes beyond is not stored."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def open_library(settings: Settings) -> VoiceLibrary | None:
    """The library that the settings name, or None where they name none.

    Raises:
        LibraryError: invalid_request, storage_failed where it cannot be reached.
    """
    if settings.voices_location is None:
        return None
    return VoiceLibrary.open(
        settings.voices_location,
        max_cache_bytes=settings.voices_cache_bytes // 2,
        max_voices=settings.max_voices,
        s3=s3_options(settings),
    )


def s3_options(settings: Settings) -> S3Options:
    """How the settings say that a bucket is reached."""
    secret = settings.bucket_secret_access_key
    key = settings.bucket_access_key_id
    return S3Options(
        endpoint_url=settings.bucket_endpoint_url,
        region=settings.bucket_region,
        access_key_id=key.get_secret_value() if key else None,
        secret_access_key=secret.get_secret_value() if secret else None,
    )


@contextmanager
def told_as(fields: Mapping[str, str | None]) -> Iterator[None]:
    """What the library or the engine refuses, told with the job's own name of the field."""
    try:
        yield
    except (LibraryError, SpeechError) as error:
        field = fields.get(error.field, error.field) if error.field else None
        raise JobError(error.code, error.message, field) from error


class Voices:
    """The voices of one library as one engine speaks them. Safe to use from any thread.

    Conditionals from here are compact ones, whether computed just now or read: a voice sounds the same before
    and after a restart.

    Args:
        library: where the voices lie; closed by `close`.
        engine: makes conditionals.
        max_cache_bytes: of conditionals kept in memory.
    """

    def __init__(self, library: VoiceLibrary, engine: SpeechEngine, *, max_cache_bytes: int = 256 << 20) -> None:
        self.library = library
        self._engine = engine
        self._kept: LRUCache[str, Conditionals] = LRUCache(max_cache_bytes, getsizeof=lambda c: c.num_bytes)
        self._running: dict[str, Future[Conditionals]] = {}
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self._lock = threading.Lock()  # of the three above
        self._is_closing = threading.Event()
        self._calling = ThreadPoolExecutor(_MAX_CALLS, "voices-call")
        self._storing = ThreadPoolExecutor(1, "voices-store")
        self._room_to_store = threading.BoundedSemaphore(_MAX_TO_STORE)
        self._preloading = ThreadPoolExecutor(1, "voices-preload")

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call what blocks on the library or on a voice's conditionals, in a thread kept for that."""
        call = in_context(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._calling, call)

    def find(self, wanted: str, field: str) -> Voice:
        """The voice of this id (`voice_id`), or of this name or id (any other field).

        Raises:
            JobError: voice_not_found, invalid_request, storage_failed; they name `field`.
        """
        with told_as({"voice": field, "voice_id": field}):
            return self.library.get(wanted) if field == "voice_id" else self.library.find(wanted)

    def conditionals(self, voice: Voice, *, is_use: bool = True) -> Conditionals:
        """A voice, ready to speak.

        Args:
            is_use: whether this counts when the most used voices are preloaded.

        Raises:
            LibraryError: voice_not_found (deleted meanwhile), storage_failed, reference_unreadable (damaged).
            SpeechError: reference_too_short, reference_silent: the recording will not do for this model.
        """
        if is_use:
            self.library.note_use(voice.voice_id)
        key = self._engine.voice_key(voice.audio_hash)
        with self._lock:
            kept = self._kept.get(key)
            running = self._running.get(key)
            if kept is None and running is None:
                mine = self._running[key] = Future()
            else:
                self._counts["from_memory"] += 1
        if kept is not None:
            return kept
        return running.result() if running is not None else self._make(voice, key, mine)

    def embed(self, prompt: VoicePrompt) -> Conditionals:
        """A recording as the library's voices are spoken, for one that is about to be saved.

        Raises:
            SpeechError: reference_too_short, reference_silent.
        """
        made = self._engine.embed(prompt).compacted()
        self._count("computed")
        self._keep(self._engine.voice_key(prompt.key), made)
        return made

    def store(self, voice: Voice, conditionals: Conditionals) -> None:
        """Keep a voice's conditionals for all workers, in the background; a failure costs them the computing only.

        Where too many wait for a slow store, or all is being closed, they are dropped and counted.
        """
        if not self._room_to_store.acquire(blocking=False):
            self._count("dropped")
            return
        try:
            put = in_context(self._put, voice, self._engine.voice_key(voice.audio_hash), conditionals)
            stored = self._storing.submit(put)
        except RuntimeError:  # closed
            self._room_to_store.release()
            self._count("dropped")
        else:
            stored.add_done_callback(lambda _: self._room_to_store.release())

    def preload(self, wanted: Sequence[str] | int) -> Future[None]:
        """Make voices (ids or names, or so many of the most used) ready, in the background; failures are logged."""
        return self._preloading.submit(self._preload, wanted)

    def stats(self) -> dict[str, Any]:
        """Figures for `info`. Asks the store.

        Raises:
            LibraryError: storage_failed.
        """
        with self._lock:
            memory = {
                "entries": len(self._kept),
                "num_bytes": int(self._kept.currsize),
                "max_bytes": self._kept.maxsize,
            }
            conditionals = {**self._counts, **memory}
        library = dataclasses.asdict(self.library.stats())
        not_ours = ("num_preloaded", "num_preload_failures")  # preloading here makes conditionals ready, not audio
        return {**{name: library[name] for name in library if name not in not_ours}, "conditionals": conditionals}

    def close(self) -> None:
        """Wait for what is being stored or preloaded, not for what only waits for that, and close the library."""
        self._is_closing.set()
        self._calling.shutdown(wait=False, cancel_futures=True)
        self._preloading.shutdown(wait=True, cancel_futures=True)
        self._storing.shutdown(wait=True, cancel_futures=True)
        self.library.close()

    def _make(self, voice: Voice, key: str, future: Future[Conditionals]) -> Conditionals:
        try:
            made = self._read(voice, key) or self._compute(voice)
        except BaseException as error:
            with self._lock:
                del self._running[key]
            future.set_exception(error)
            raise
        self._keep(key, made)
        with self._lock:
            del self._running[key]
        future.set_result(made)
        return made

    def _read(self, voice: Voice, key: str) -> Conditionals | None:
        """What some worker stored; None where there is nothing of use, which is not an error: it is computed again."""
        try:
            data = self.library.get_conditionals(voice.voice_id, key, is_use=False)
            found = None if data is None else _checked(data, key)
        except (LibraryError, ValueError) as error:
            if isinstance(error, LibraryError) and error.code != "storage_failed":
                raise
            _log.warning("stored conditionals of voice %s are of no use: %s", voice.voice_id, error)
            self._count("damaged" if isinstance(error, ValueError) else "store_failures")
            return None
        if found is not None:
            self._count("from_store")
        return found

    def _compute(self, voice: Voice) -> Conditionals:
        prompt = VoicePrompt(*self.library.get_audio(voice.voice_id, is_use=False))
        if prompt.key != voice.audio_hash:  # deleted and added again under this id, between our two looks
            raise LibraryError("voice_not_found", f"the voice {voice.name!r} was replaced; try again", "voice")
        made = self._engine.embed(prompt).compacted()
        self._count("computed")
        self.store(voice, made)
        return made

    def _put(self, voice: Voice, key: str, conditionals: Conditionals) -> None:
        try:
            self.library.put_conditionals(voice.voice_id, key, conditionals.to_bytes(compact=True))
        except LibraryError as error:
            _log.warning("conditionals of voice %s were not stored: %s", voice.voice_id, error.message)
            self._count("store_failures")
        else:
            self._count("stored")

    def _preload(self, wanted: Sequence[str] | int) -> None:
        for name in self._names(wanted):
            if self._is_closing.is_set():
                return
            try:
                self.conditionals(self.library.find(name), is_use=False)
                self._count("preloaded")
            except (LibraryError, SpeechError) as error:
                _log.warning("voice %r could not be made ready: %s", name, error.message)
                self._count("preload_failures")
            except Exception:  # of which nobody else would learn
                _log.exception("voice %r could not be made ready", name)
                self._count("preload_failures")

    def _names(self, wanted: Sequence[str] | int) -> Sequence[str]:
        if not isinstance(wanted, int):
            return wanted
        try:
            return [voice.voice_id for voice in self.library.most_used(wanted)]
        except LibraryError as error:
            _log.warning("the most used voices could not be made ready: %s", error.message)
            self._count("preload_failures")
            return ()

    def _keep(self, key: str, conditionals: Conditionals) -> None:
        with self._lock:
            if conditionals.num_bytes <= self._kept.maxsize:
                self._kept[key] = conditionals

    def _count(self, what: str) -> None:
        assert what in COUNTED, what
        with self._lock:
            self._counts[what] += 1


def _checked(data: bytes, key: str) -> Conditionals:
    """Stored conditionals, if they are those of this key.

    Raises:
        ValueError: when they are damaged, of another voice or of another checkpoint.
    """
    found = Conditionals.from_bytes(data)
    if found.key != key + COMPACT_MARK:
        raise ValueError(f"expected conditionals {key}, found {found.key}")
    return found
