"""Prompt audio in memory: bounded by bytes, loaded once however many ask at the same time.

Where the recording had 16 bits, what is kept is those: half of the bytes of the floats that are handed out,
and so twice as many voices, for a fraction of a millisecond to turn ten seconds back. Other audio is kept as
the floats themselves: three bytes a sample would save a quarter and cost milliseconds at every hit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from voice_library.audio import FloatArray

_FULL_SCALE_16 = 1 << 15


@dataclass(frozen=True)
class CacheStats:
    """Counters of the cache of prompt audio."""

    hits: int
    misses: int
    entries: int
    num_bytes: int
    max_bytes: int


class AudioCache:
    """Audio by the key of its file, least recently used ones leaving first.

    Args:
        max_bytes: of all audio kept; what is larger alone is handed out and not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[str, NDArray] = LRUCache(max_bytes, getsizeof=lambda packed: packed.nbytes)
        self._loading: dict[str, Future[FloatArray]] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, key: str, load: Callable[[], FloatArray]) -> FloatArray:
        """The audio float32 (T,), read-only; loads it, or waits for the thread that is loading it.

        Raises:
            whatever `load` raises, to all who wait.
        """
        with self._lock:
            packed = self._kept.get(key)
            loading = self._loading.get(key)
            if packed is None and loading is None:
                self._misses += 1
                mine = self._loading[key] = Future()
            else:
                self._hits += 1
        if packed is not None:
            return unpack(packed)
        return loading.result() if loading is not None else self._load(key, load, mine)

    def _load(self, key: str, load: Callable[[], FloatArray], future: Future[FloatArray]) -> FloatArray:
        try:
            audio = load()
            packed = pack(audio)
        except BaseException as error:
            with self._lock:
                self._loading.pop(key, None)
            future.set_exception(error)
            raise
        with self._lock:
            # `drop` takes a running load away: its audio still serves those who wait, and is not kept.
            is_wanted = self._loading.get(key) is future
            if is_wanted:
                del self._loading[key]
            if is_wanted and packed.nbytes <= self._kept.maxsize:
                self._kept[key] = packed
        future.set_result(audio)
        return audio

    def drop(self, key: str) -> None:
        """Forget the audio of a voice that is gone."""
        with self._lock:
            self._kept.pop(key, None)
            self._loading.pop(key, None)

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(
                self._hits, self._misses, len(self._kept), int(self._kept.currsize), int(self._kept.maxsize)
            )


def pack(audio: FloatArray) -> NDArray:
    """Audio float32 (T,) as int16 (T,) if that holds it exactly, else as it is, read-only."""
    integers = np.clip(np.rint(audio * np.float32(_FULL_SCALE_16)), -_FULL_SCALE_16, _FULL_SCALE_16 - 1)
    packed = integers.astype(np.int16)
    return packed if np.array_equal(unpack(packed), audio) else _read_only(audio)


def unpack(packed: NDArray) -> FloatArray:
    """The audio float32 (T,) that `pack` was given, read-only."""
    if packed.dtype != np.int16:
        return packed
    return _read_only(packed.astype(np.float32) / np.float32(_FULL_SCALE_16))


def _read_only(audio: FloatArray) -> FloatArray:
    """A view that cannot be written through."""
    view = audio.view()
    view.setflags(write=False)
    return view
