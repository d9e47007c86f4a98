"""Keeps what a long request's work gives, and finds it again: the engine's side of a `WorkStore`.

Tokens are kept by chunk, audio by pass. A key is a hash of all that decides the outcome: the checkpoint, how it is
computed, the voice, the text or tokens, the settings, the seed. Audio is kept in 24 bits and used in 24 bits at once,
so a run that goes on where another broke off gives the samples of one that was never disturbed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile
import torch
from torch import Tensor

from engine import serialization
from engine.t3.sampling import SamplingSettings
from engine.types import SAMPLE_RATE, FloatArray, IntArray
from engine.utterance import ChunkWork
from engine.work import WorkStore

FORMAT = "1"
"""Of the keys and of what lies under them; a change of the guard that keeps other attempts counts as one."""
MOST_WAITING_TO_BE_KEPT = 256
"""Chunks and passes, of up to 2 MB."""
CLOSE_WITHIN_S = 20.0
_STEPS = 2**23
"""Of full scale, in 24 bits."""
_DIGEST_BYTES = 16

_log = logging.getLogger(__name__)


class KeepPool:
    """Threads that wait for a store. What is to be kept is dropped where too much waits already: a store that hangs
    must neither fill the memory nor hold up the end of the process."""

    def __init__(self) -> None:
        self._readers, self._writers = ThreadPoolExecutor(8, "look-up"), ThreadPoolExecutor(4, "keep")
        self._places = threading.Semaphore(MOST_WAITING_TO_BE_KEPT)

    def read(self, work: Callable[[], None]) -> None:
        """Do something that waits for the store."""
        self._readers.submit(work)

    def read_all(self, read: Callable[[str], bytes | None], keys: Sequence[str]) -> Iterator[bytes | None]:
        """Read many, in their order."""
        return self._readers.map(read, keys)

    def write(self, work: Callable[[], None]) -> None:
        """Keep something, if there is room for it; returns at once."""
        if not self._places.acquire(blocking=False):
            _log.warning("the work store is too slow: something was not kept")
            return
        self._writers.submit(work).add_done_callback(lambda _: self._places.release())

    def close(self) -> None:
        """Let what is being kept come to its end, within bounds."""
        until_s = time.monotonic() + CLOSE_WITHIN_S
        for _ in range(MOST_WAITING_TO_BE_KEPT):  # all places are free when nothing is being kept
            if not self._places.acquire(timeout=max(0.0, until_s - time.monotonic())):
                break
        for pool in (self._readers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)


class Keeper:
    """Thread-safe. What the store holds and cannot be read counts as not there.

    Args:
        store: where.
        pool: waits for it.
        made_by: checkpoint, preprocessing and number formats: what gives the same result from the same input.
    """

    def __init__(self, store: WorkStore, pool: KeepPool, made_by: str) -> None:
        self._store, self._pool, self._made_by = store, pool, made_by

    def load_tokens(self, chunks: Sequence[ChunkWork], settings: SamplingSettings, exaggeration: float | None) -> None:
        """Fill in the chunks that were spoken before, and give all of them their keys."""
        for chunk in chunks:
            chunk.kept_as = self._tokens_key(chunk, settings, exaggeration)
        for chunk, data in zip(chunks, self._pool.read_all(self._get, [c.kept_as for c in chunks]), strict=True):
            if data is not None:
                _restore(chunk, data)

    def save_tokens(self, chunk: ChunkWork) -> None:
        """Keep a chunk that is done; returns at once."""
        about = {"attempts": chunk.attempts, "flags": list(chunk.flags)}
        data = serialization.to_bytes({"tokens": chunk.spoken_tokens}, about)
        self._pool.write(lambda: self._put(chunk.kept_as, lambda: data))

    def look_for_audio(self, key: str, found: Callable[[Tensor | None], None]) -> None:
        """Fetch a pass's audio, float32 (samples,) on the host, for `found`, in a thread of the pool."""
        self._pool.read(lambda: found(self._load_audio(key)))

    def _load_audio(self, key: str) -> Tensor | None:
        try:
            data = self._get(key)
            return None if data is None else torch.from_numpy(_from_flac(data))
        except Exception:  # whoever waits for an answer must get one
            _log.exception("%s could not be read: its work is done again", key)
            return None

    def save_audio(self, key: str, waveform: Tensor) -> None:
        """Keep a pass's audio, which is on the grid of `to_24_bits`; returns at once."""
        self._pool.write(lambda: self._put(key, lambda: _to_flac(waveform.cpu().numpy())))

    def audio_key(self, voice_key: str, tokens: IntArray, seed: int) -> str:
        """Of a pass."""
        return self._key("audio", voice_key, tokens.tobytes().hex(), seed)

    def _tokens_key(self, chunk: ChunkWork, settings: SamplingSettings, exaggeration: float | None) -> str:
        return self._key(
            "tokens",
            chunk.conditionals.key,
            chunk.text_tokens.tobytes().hex(),
            dataclasses.asdict(settings),
            exaggeration,
            dataclasses.asdict(chunk.expectation),
            chunk.max_new_tokens,
            chunk.seed,
        )

    def _key(self, kind: str, *parts: object) -> str:
        content = json.dumps([FORMAT, self._made_by, *parts], sort_keys=True).encode()
        return f"{kind}/{hashlib.blake2b(content, digest_size=20).hexdigest()}"

    def _put(self, key: str, make: Callable[[], bytes]) -> None:
        try:
            data = make()
            self._store.put(key, _digest(data) + data)
        except Exception:  # a favour and never a condition
            _log.exception("%s could not be kept", key)

    def _get(self, key: str) -> bytes | None:
        try:
            data = self._store.get(key)
        except Exception:
            _log.exception("%s could not be read: its work is done again", key)
            return None
        if data is None or data[:_DIGEST_BYTES] == _digest(data[_DIGEST_BYTES:]):
            return data and data[_DIGEST_BYTES:]
        _log.warning("%s is damaged: its work is done again", key)
        return None


def to_24_bits(waveform: Tensor) -> Tensor:
    """The nearest values that 24-bit samples have."""
    return torch.round(waveform.clamp(-1.0, 1.0 - 1.0 / _STEPS) * _STEPS) / _STEPS


def _restore(chunk: ChunkWork, data: bytes) -> None:
    arrays, about = serialization.from_bytes(data)
    chunk.tokens, chunk.flags = arrays["tokens"], tuple(about["flags"])
    chunk.attempts, chunk.is_done = about["attempts"], True


def _to_flac(waveform: FloatArray) -> bytes:
    target = io.BytesIO()
    whole_numbers = (waveform.astype(np.float64) * _STEPS).astype(np.int32) << 8
    soundfile.write(target, whole_numbers, SAMPLE_RATE, "PCM_24", format="FLAC")
    return target.getvalue()


def _from_flac(data: bytes) -> FloatArray:
    whole_numbers, _ = soundfile.read(io.BytesIO(data), dtype="int32")
    return np.asarray((whole_numbers >> 8) / _STEPS, np.float32)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
