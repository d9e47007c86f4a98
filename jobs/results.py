"""A job that is sent twice is done once: its result is kept under its `idempotency_key`, for all workers.

A platform sends a job again when it loses sight of a worker, and clients do when an answer is late. With a key the
second job gets what the first one made, or waits until it is made, on whatever worker.

- Keeping is a favour and never a condition: a store that fails costs a warning, not a job.
- Whoever works under a key holds a claim (`jobs.claims`). Even where a claim is lost, the result that is kept first is
  the one that everybody gets: it is created, never overwritten.
- Kept are results, never errors; of audio in a bucket its name, which is signed anew each time.
- All lies under `results/` of WORK_DIR, else of the bucket (BUCKET_NAME); nothing else there is looked at or removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from cachetools import LRUCache

from jobs import delivery
from jobs.bucket import BucketError
from jobs.claims import Claims
from jobs.context import JobContext
from jobs.errors import JobError
from jobs.logs import in_context
from jobs.s3_config import FIELD as S3_CONFIG
from jobs.schema import AudioInput, JobInput
from jobs.settings import Settings
from jobs.sweeping import Sweeper
from jobs.work import impatient, open_below
from voice_library.s3_store import S3Store
from voice_library.store import Store

FOLDER = "results"
FIELD = "idempotency_key"

MAX_RECORD_BYTES = 256 << 20
"""What is larger is not kept."""

REST_S = 60.0
"""For so long a store that failed is left alone: one that hangs would hold up every job with a key."""

_FIRST_POLL_S, _LONGEST_POLL_S = 0.25, 3.0
_MAX_UNKEPT_BYTES = 64 << 20  # of results that a store would not take, in memory
_NUM_THREADS = 8
_VERSION = 1
_OURS = re.compile(r"kept/([0-9a-f])/([0-9a-f])/\1\2[0-9a-f]{38}|claims/[0-9a-f]{40}")

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)

Make = Callable[[], Awaitable[dict[str, Any]]]


async def once(request: JobInput, context: JobContext, results: Results | None, make: Make) -> dict[str, Any]:
    """The result of a job; under a key one that is kept, if there is one.

    Args:
        request: the job.
        context: its surroundings.
        results: what is kept; None where that is nowhere.
        make: does the job.

    Raises:
        JobError: invalid_request, where the key was used for something else; what `make` raises.
    """
    key = getattr(request, FIELD, None)
    if key is None:
        return await make()
    if context.feed is not None and isinstance(request, AudioInput):
        return _warned(await make(), "was ignored but for the seed: what this worker gives in pieces it does not keep")
    if results is None:
        return _warned(await make(), "has no effect: this worker keeps no results (neither WORK_DIR nor BUCKET_NAME)")
    return await results.once(str(key), request, context, make)


def open_results(settings: Settings) -> Results | None:
    """What is kept in WORK_DIR, else in the bucket, swept from now on; None where there is neither.

    Raises:
        LibraryError: invalid_request, storage_failed, for what cannot be a store. One that cannot be reached is no
            error.
    """
    store = open_below(settings, FOLDER)
    if store is None and settings.bucket_name is not None:
        store = S3Store(settings.bucket_name, f"{settings.bucket_prefix}{FOLDER}", impatient(settings))
    if store is None:
        return None
    results = Results(store, max_age_s=settings.results_max_age_h * 3600.0, max_bytes=settings.work_max_bytes)
    results.start_sweeping()
    return results


@dataclass(frozen=True)
class Record:
    """What is kept of a job.

    Args:
        asked: digest of what was asked for.
        made_s: when, seconds since 1970.
        result: without addresses.
        bucket: where its audio lies; None for in the result.
        name: of the object there.
        fields: of the result that would have held the audio.
    """

    asked: str
    made_s: float
    result: dict[str, Any]
    bucket: str | None = None
    name: str | None = None
    fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: Mapping[str, Any], asked: str, context: JobContext) -> Record:
        """The record of a result that was just made."""
        delivered = context.delivered
        addresses = {f"{field}_url" for field in delivered.fields} | {"audio_url_expires_s"}
        kept = {name: value for name, value in result.items() if name not in addresses}
        bucket = context.bucket.describe() if delivered.name is not None and context.bucket is not None else None
        return cls(asked, time.time(), kept, bucket, delivered.name, delivered.fields)

    def to_bytes(self) -> bytes:
        """Its digest, and itself as JSON."""
        body = json.dumps({"version": _VERSION, **vars(self)}, ensure_ascii=False, allow_nan=False).encode()
        return f"{_digest(body)}\n".encode() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """
        Raises:
            ValueError: for one that is damaged, or of another version.
        """
        digest, _, body = data.partition(b"\n")
        if digest.decode("ascii", "replace") != _digest(body):
            raise ValueError("its digest is another")
        fields = json.loads(body)
        if fields.pop("version") != _VERSION:
            raise ValueError("it is of another version")
        return cls(**fields | {"fields": tuple(fields["fields"])})


class Results:
    """The results of all jobs with a key, in one store. For one event loop after another; closed with `close`.

    Args:
        store: where they lie; closed by `close`.
        max_age_s: older ones count as none, and are removed.
        max_bytes: of all; the oldest are removed first.
        claims: who is at work under which key; by default in the same store.
        clock: gives seconds, for how long a store that failed is left alone.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_age_s: float,
        max_bytes: int,
        claims: Claims | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._max_age_s = max_age_s
        self._claims = claims or Claims(store)
        self._clock = clock
        self._failed_at_s: float | None = None
        self._turns: dict[str, _Turn] = {}
        self._lock = threading.Lock()  # of the next one
        self._unkept: LRUCache[str, bytes] = LRUCache(_MAX_UNKEPT_BYTES, getsizeof=len)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "results")
        self._sweeper = Sweeper(store, _is_ours, max_age_s=max_age_s, max_bytes=max_bytes)

    def start_sweeping(self) -> None:
        """Remove what is too old now and then, beginning now, in the background."""
        self._sweeper.start()

    def close(self) -> None:
        """Finish what is being written, and let go of the store."""
        self._sweeper.close()
        self._threads.shutdown()
        self._claims.close()
        self._store.close()

    async def once(self, key: str, request: JobInput, context: JobContext, make: Make) -> dict[str, Any]:
        """The kept result of a job; else its result as `make` gives it, which is then kept.

        Raises:
            JobError: invalid_request, where the key was used for something else; what `make` raises.
        """
        name = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        asked = await asyncio.to_thread(_asked, request, context)
        describe, context.progress.describe = context.progress.describe, _waiting
        async with self._turn(name):
            found = await self._found_or_claimed(name, asked, context)
            context.progress.describe = describe
            return await self._made(name, asked, context, make) if found is None else found

    # ------------------------------------------------------------------------------ looking

    async def _found_or_claimed(self, name: str, asked: str, context: JobContext) -> dict[str, Any] | None:
        """What is kept, for which others that are at work on it are waited for; None where it is this job's to do."""
        poll_s = _FIRST_POLL_S
        while True:
            found = await self._found(name, asked, context)
            if found is not None or self._is_resting():
                return found
            if await self._claimed(name):
                break
            await asyncio.sleep(poll_s)
            poll_s = min(poll_s * 1.5, _LONGEST_POLL_S)
        try:  # whoever had the claim may have ended between the two looks
            found = await self._found(name, asked, context)
        except BaseException:
            self._release(name)
            raise
        if found is not None:
            self._release(name)
        return found

    async def _claimed(self, name: str) -> bool:
        """Whether the work is this job's; where claims cannot be had, it is, too."""
        taking = self._threads.submit(in_context(self._claims.take, _claim(name)))
        try:
            return await asyncio.shield(asyncio.wrap_future(taking))
        except asyncio.CancelledError:
            taking.add_done_callback(lambda taken: self._release_if_taken(name, taken))
            raise
        except Exception as error:
            self._note_failure(error)
            return True

    async def _found(self, name: str, asked: str, context: JobContext) -> dict[str, Any] | None:
        record = await self._call(self._read, name)
        if record is None:
            return None
        if record.asked != asked:
            message = f"{FIELD}: was used for another input; a key stands for one input, and another one needs another"
            raise JobError("invalid_request", message, FIELD)
        result = await _given_again(record, context)
        if result is None:
            await self._call(self._remove, name)
        return result

    def _read(self, name: str) -> Record | None:
        """What is kept; None for nothing that is of use. Blocks."""
        data = self._tried(lambda: self._store.read(_kept(name), MAX_RECORD_BYTES))
        if data is None:
            with self._lock:
                data = self._unkept.get(name)
        if data is None:
            return None
        try:
            record = Record.from_bytes(data)
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("a kept result is damaged and counts as none: %s", type(error).__name__)
            return None
        return record if time.time() - record.made_s <= self._max_age_s else None

    def _remove(self, name: str) -> None:
        with self._lock:
            self._unkept.pop(name, None)
        self._tried(lambda: self._store.delete(_kept(name)))

    # ------------------------------------------------------------------------------ making

    async def _made(self, name: str, asked: str, context: JobContext, make: Make) -> dict[str, Any]:
        try:
            result = await make()
            record = Record.of(result, asked, context)
            other = await self._call(self._keep, name, record)
        finally:
            self._release(name)
        if isinstance(other, str):
            return _warned(result, other)
        return result if other is None else await _given_again(other, context) or result

    def _keep(self, name: str, record: Record) -> Record | str | None:
        """Keep a result; gives another that was kept first, or what to say where none could be. Blocks."""
        data = record.to_bytes()
        if len(data) > MAX_RECORD_BYTES:
            return f"could not be honoured: a result of {len(data) / 1e6:.0f} MB is not kept"
        is_new = self._tried(lambda: self._store.create(_kept(name), data))
        if is_new:
            return None
        if is_new is None:
            if len(data) <= _MAX_UNKEPT_BYTES:
                with self._lock:
                    self._unkept[name] = data
            return "could not be honoured: the result is kept by this worker only, since the store fails"
        other = self._read(name)
        if other is not None:
            return other if other.asked == record.asked else None
        self._tried(lambda: self._store.write(_kept(name), data))  # over one that is damaged or too old
        return None

    def _release(self, name: str) -> None:
        """Let others have the key; not waited for."""
        with contextlib.suppress(RuntimeError):  # closed
            self._threads.submit(self._claims.release, _claim(name))

    def _release_if_taken(self, name: str, taken: Future[bool]) -> None:
        if not taken.cancelled() and taken.exception() is None and taken.result():
            self._release(name)

    # ------------------------------------------------------------------------------ one at a time on this worker

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(name, _Turn(asyncio.Lock()))
        turn.num_jobs += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.num_jobs -= 1
            if not turn.num_jobs:
                del self._turns[name]

    # ------------------------------------------------------------------------------ a store that fails

    async def _call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, in_context(function, *args, **kwargs))

    def _tried(self, call: Callable[[], _T]) -> _T | None:
        """What a call of the store gives; None where it fails, or failed lately."""
        if self._is_resting():
            return None
        try:
            return call()
        except Exception as error:
            self._note_failure(error)
            return None

    def _is_resting(self) -> bool:
        return self._failed_at_s is not None and self._clock() < self._failed_at_s + REST_S

    def _note_failure(self, error: Exception) -> None:
        if not self._is_resting():
            _log.warning("no results are kept while their store fails: %s", error)
        self._failed_at_s = self._clock()


@dataclass
class _Turn:
    """The jobs of this worker that have the same key."""

    lock: asyncio.Lock
    num_jobs: int = 0


async def _given_again(record: Record, context: JobContext) -> dict[str, Any] | None:
    """A kept result for another job; None where its audio is gone."""
    result = {**record.result, "repeated": True}
    more = [warning for warning in context.warnings if warning not in result.get("warnings", ())]
    if more:
        result["warnings"] = [*result.get("warnings", ()), *more]
    if record.name is None:
        return result
    bucket = context.bucket
    if bucket is None or bucket.describe() != record.bucket:
        return None
    try:
        if not await bucket.has(record.name):
            return None
    except BucketError as error:
        result = _warned(result, f"gave a result whose audio could not be looked for: {error.reason}")
    context.delivered.name, context.delivered.fields = record.name, record.fields
    return {**await delivery.addressed(context), **result}


def _asked(request: JobInput, context: JobContext) -> str:
    """Digest of all that a job asks for, but not of how it says it. Blocks."""
    fields = request.model_dump(mode="json", exclude={FIELD})
    own = context.bucket is not None and context.bucket.named_by == S3_CONFIG
    place = context.bucket.describe() if own and context.bucket is not None else None
    return _digest(json.dumps([fields, place], sort_keys=True, ensure_ascii=False).encode())


def _warned(result: dict[str, Any], why: str) -> dict[str, Any]:
    return {**result, "warnings": [*result.get("warnings", ()), f"{FIELD} {why}"]}


def _waiting() -> str:
    return f"another job with this {FIELD} was still under way; sent again, this one gets its result"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def _kept(name: str) -> str:
    """Spread, so that no folder fills up."""
    return f"kept/{name[0]}/{name[1]}/{name}"


def _claim(name: str) -> str:
    return f"claims/{name}"


def _is_ours(key: str) -> bool:
    return _OURS.fullmatch(key) is not None
