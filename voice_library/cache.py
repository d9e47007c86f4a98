"""Prompt audio in memory: bounded by bytes, loaded once however many ask at the same time.

What is kept is the integers the audio was stored as: two bytes a sample where the recording had 16 bits,
three otherwise, instead of the four of the floats that are handed out. It loses nothing and holds up to
twice as many voices; turning ten seconds back into floats takes a fraction of a millisecond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from voice_library.audio import FloatArray, to_int24

_LOWEST_8_BITS = 0xFF


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
    """24-bit audio float32 (T,) as int16 (T,) if that holds it exactly, else as uint8 (T, 3), little-endian."""
    integers = to_int24(audio)
    if not np.any(integers & _LOWEST_8_BITS):
        return (integers >> 8).astype(np.int16)
    return integers.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].copy()


def unpack(packed: NDArray) -> FloatArray:
    """The audio float32 (T,) that `pack` was given, read-only."""
    if packed.dtype == np.int16:
        audio = packed.astype(np.float32) * np.float32(2.0**-15)
    else:
        shifted = np.zeros((len(packed), 4), np.uint8)
        shifted[:, 1:] = packed
        audio = shifted.view("<i4")[:, 0].astype(np.float32) * np.float32(2.0**-31)
    audio.setflags(write=False)
    return audio
