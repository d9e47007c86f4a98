"""Jobs in flight: so many at once are sent, waited for, and their audio put on disk, until there are none left."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.batch import files, names
from scripts.batch.board import Board
from scripts.batch.checking import Part, Row
from scripts.batch.client import Client, DownloadError, Refused
from scripts.batch.errors import EndpointError
from scripts.batch.joining import LIST_SUFFIX, M4B, SUBTITLES, AudioPart, JoinError, Stopped, join_book, joined_suffix
from scripts.batch.manifest import DONE, SENT, WAITING, WRITTEN, Manifest, Task, digest_of
from scripts.batch.outcomes import FILE_EXISTS, NO_RESULT, OF_THE_ENDPOINT, Failure, Outcome
from scripts.batch.polling import Ended, ended
from scripts.wav import finish_sizes

_AUDIO = ("audio", "sample_audio")
_LEFT_OUT = (*_AUDIO, *(f"{name}_url" for name in _AUDIO), "audio_url_expires_s", "chunks", "subtitles", "error")
_FORMAT = re.compile(r"[a-z0-9]{1,8}")
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 60.0
_GRACE_S = 5.0
"""For so long what is being sent when a run is stopped may take to be answered."""

_MAX_USELESS = 3


@dataclass(frozen=True)
class Policy:
    """How a batch is run.

    Args:
        in_flight: jobs at once.
        max_failures: after so many, of a kind that may pass, a job has failed.
        max_audio_bytes: of a file that is fetched from an address.
        webhook: handed on to the platform.
    """

    in_flight: int = 50
    max_failures: int = 4
    max_audio_bytes: int = 4_000_000_000
    webhook: str | None = None


class Runner:
    """A run.

    Args:
        client: of the endpoint.
        manifest: which holds the state of every job.
        folder: where the files go.
        rows: of the run.
        policy: how.
        board: told of all that happens.
    """

    def __init__(
        self, client: Client, manifest: Manifest, folder: Path, rows: Sequence[Row], policy: Policy, board: Board
    ) -> None:
        self._client, self._manifest, self._folder = client, manifest, folder
        self._policy, self._board = policy, board
        self._rows: Mapping[str, Row] = {row.key: row for row in rows}
        self._stopping = asyncio.Event()
        self._joining = asyncio.Lock()
        self._num_useless = self._num_done = 0

    # ------------------------------------------------------------------------------ all of them

    async def run(self) -> None:
        """Do all that is not done.

        Raises:
            EndpointError: no more can be done now.
        """
        tasks = [task for key in self._rows for task in self._manifest.tasks(key)]
        for task in tasks:
            self._recover(task)
        under_way = [task for task in tasks if task.state == SENT]  # first: their results expire
        self._queue = collections.deque([*under_way, *(task for task in tasks if task.state == WAITING)])
        self._board.begin(tasks, self._rows)
        books = [row for row in self._rows.values() if row.is_book]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._join_all(books))
                for _ in range(min(self._policy.in_flight, len(self._queue))):
                    group.create_task(self._work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def stop(self, running: asyncio.Task[None]) -> None:
        """Send nothing more, note what is being sent, and wait for no job's end."""
        self._stopping.set()
        await asyncio.wait([running], timeout=_GRACE_S)
        running.cancel()
        await asyncio.wait([running])

    async def cancel_all(self) -> int:
        """Cancel what the platform still has; how many those were. What has ended meanwhile is left to be collected."""
        sent = [task for key in self._rows for task in self._manifest.tasks(key) if task.state == SENT]
        num_cancelled = 0
        for task in sent:
            assert task.job_id is not None, task
            with contextlib.suppress(Refused):
                await self._client.cancel(task.job_id)
                if (await self._client.status(task.job_id)).get("status") == "CANCELLED":
                    self._manifest.note_waiting(task)
                    num_cancelled += 1
        return num_cancelled

    async def _work(self) -> None:
        while self._queue and not self._stopping.is_set():
            task = self._queue.popleft()
            try:
                await self._attend(task)
                await self._join(self._rows[task.key])
            except Stopped:
                return

    def _recover(self, task: Task) -> None:
        """Compare what a killed run left on disk with what it noted."""
        if task.file is None or task.state not in (WRITTEN, DONE):
            return
        path = self._folder / task.file
        if task.state == WRITTEN and files.is_whole(files.temporary(path), task.num_bytes):
            files.finish(path)
        if files.is_whole(path, task.num_bytes):
            if task.state == WRITTEN:
                self._manifest.note_done(task)
        else:
            self._manifest.note_waiting(task)

    # ------------------------------------------------------------------------------ one

    async def _attend(self, task: Task) -> None:
        """See a job through."""
        num_failures = 0
        while True:
            is_of_this_run = task.job_id is None
            failure = await self._attempt(task)
            if failure is None:
                return
            num_failures += 1
            if is_of_this_run:
                self._look_at(failure, task)
            if not failure.may_pass or num_failures >= self._policy.max_failures:
                self._manifest.note_failed(task, failure.code, failure.message)
                self._board.failed(task)
                return
            task.error_code, task.error = failure.code, failure.message
            self._manifest.note_waiting(task)
            self._board.again(task, failure)
            backoff_s = min(_FIRST_BACKOFF_S * 2 ** (num_failures - 1), _LONGEST_BACKOFF_S)
            await self._nap(backoff_s * random.uniform(0.5, 1.5))

    async def _attempt(self, task: Task) -> Failure | None:
        try:
            if task.job_id is None:
                self._manifest.note_sent(task, await self._client.run(self._body(task)))
                self._board.sent(task)
                await self._nap(0.0)
        except Refused as error:
            return Failure("refused", str(error), False)
        assert task.job_id is not None
        end = await ended(self._client, task.job_id, self._nap, lambda told: self._board.progress(task, told))
        task.worker_s += end.outcome.worker_s
        if end.outcome.result is None:
            return end.outcome.failure
        return await self._keep(task, end, end.outcome.result)

    def _body(self, task: Task) -> dict[str, Any]:
        fields = self._part(task).fields
        key = fields.get("idempotency_key") or self._manifest.idempotency_key(task)
        everywhere = {} if self._policy.webhook is None else {"webhook": self._policy.webhook}
        return {**everywhere, **self._part(task).beside, "input": {**fields, "idempotency_key": key}}

    def _look_at(self, failure: Failure, task: Task) -> None:
        """Give up where every job would fail.

        Raises:
            EndpointError: for an endpoint that cannot speak.
        """
        if failure.code not in OF_THE_ENDPOINT or self._num_done:
            return
        self._num_useless += 1
        if self._num_useless >= _MAX_USELESS:
            self._manifest.note_waiting(task)
            raise EndpointError(f"the endpoint answers every job with {failure.code}: {failure.message}")

    async def _nap(self, seconds: float) -> None:
        """Wait, but not beyond the end of the run.

        Raises:
            Stopped: it is to end.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass
        if self._stopping.is_set():
            raise Stopped

    def _part(self, task: Task) -> Part:
        return self._rows[task.key].parts[task.part]

    # ------------------------------------------------------------------------------ its audio

    async def _keep(self, task: Task, end: Ended, result: dict[str, Any]) -> Failure | None:
        """Put a result's audio on disk, then note it; a failure where that is not to be had."""
        file = self._file_of(task, result)
        path = self._folder / file
        if file != task.file and path.exists() and not self._rows[task.key].is_book:  # its folder is the batch's
            return Failure(FILE_EXISTS, f"{file} is there and is not of this batch; move it away", False)
        try:
            num_bytes = await self._write(path, end, result)
        except DownloadError as error:
            return Failure("download_failed", str(error), error.may_pass)
        except ValueError as error:
            return Failure("download_failed", str(error), True)
        if not num_bytes:
            return Failure(NO_RESULT, "the result holds no audio", True)
        await self._keep_subtitles(task, path, result.get("subtitles"))
        before = task.file
        self._manifest.note_written(task, file, num_bytes, _told(result, end.outcome))
        files.finish(path)
        self._manifest.note_done(task)
        if before is not None and before != file:
            (self._folder / before).unlink(missing_ok=True)
            if (self._folder / before).with_suffix("") != path.with_suffix(""):
                self._remove_subtitles(self._folder / before)
        if not self._rows[task.key].is_book:
            self._remove_joined(task.key)
        self._num_done += 1
        self._board.done(task)
        return None

    async def _keep_subtitles(self, task: Task, path: Path, subtitles: object) -> None:
        """Those of this result, and no others: what is joined of parts would take what an earlier one left."""
        kind = f".{self._part(task).fields.get('subtitles')}" if isinstance(subtitles, str) else None
        if isinstance(subtitles, str) and kind is not None:
            await asyncio.to_thread(files.write_text, path.with_suffix(kind), subtitles)
        if task.file is not None:
            self._remove_subtitles(path, but=kind)

    @staticmethod
    def _remove_subtitles(path: Path, but: str | None = None) -> None:
        for suffix in SUBTITLES:
            if suffix != but:
                path.with_suffix(suffix).unlink(missing_ok=True)

    def _remove_joined(self, key: str) -> None:
        """What the row's text was while it went in parts. Those stay."""
        if self._manifest.joined(key).of is None:
            return
        stem = self._folder / self._manifest.stem(key)
        for suffix in (M4B, LIST_SUFFIX):
            stem.with_name(stem.name + suffix).unlink(missing_ok=True)
        self._manifest.forget_joined(key)

    async def _write(self, path: Path, end: Ended, result: Mapping[str, Any]) -> int:
        """The audio's number of bytes; 0 for none. It lies under its temporary name."""
        if end.audio is not None:
            return await asyncio.to_thread(_write_parts, path, end.audio)
        for name in _AUDIO:
            if isinstance(result.get(name), str) and result[name]:
                return await asyncio.to_thread(files.write_base64, path, result[name])
            if isinstance(result.get(f"{name}_url"), str):
                return await self._client.download(result[f"{name}_url"], path, self._policy.max_audio_bytes)
        return 0

    def _file_of(self, task: Task, result: Mapping[str, Any]) -> str:
        suffix = result.get("format") or self._part(task).fields.get("output_format") or "wav"
        suffix = suffix if isinstance(suffix, str) and _FORMAT.fullmatch(suffix) else "bin"
        stem = self._manifest.stem(task.key)
        if not self._rows[task.key].is_book:
            return f"{stem}.{suffix}"
        title = self._part(task).title
        return f"{stem}{names.PARTS}/{task.part + 1:03d}{f'-{names.stem_of(title)}' if title else ''}.{suffix}"

    # ------------------------------------------------------------------------------ books

    async def _join_all(self, books: Sequence[Row]) -> None:
        try:
            for row in books:
                await self._join(row)
        except Stopped:
            pass

    async def _join(self, row: Row) -> None:
        """Join a book whose parts are all there, unless that is done."""
        if not row.is_book:
            return
        async with self._joining:
            if not self._manifest.is_done(row.key):
                return
            tasks = list(self._manifest.tasks(row.key))
            joined, digest = self._manifest.joined(row.key), digest_of(tasks)
            if joined.of == digest and joined.file is not None and _is_best(self._folder / joined.file):
                return
            self._board.joining(row)
            target = self._folder / self._manifest.stem(row.key)
            parts = [*self._audio_parts(row, tasks)]
            try:
                path = await asyncio.to_thread(
                    join_book, parts, target, row.book, self._stopping.is_set, replaces=joined.of is not None
                )
            except JoinError as error:
                self._manifest.note_not_joined(row.key, digest, str(error))
                self._board.not_joined(row, str(error))
                return
            self._manifest.note_joined(row.key, path.name, digest)
            self._board.joined(row, path)

    def _audio_parts(self, row: Row, tasks: Sequence[Task]) -> Iterator[AudioPart]:
        for task, part in zip(tasks, row.parts, strict=True):
            assert task.file is not None, task
            duration_s, rate = task.result.get("duration_s", 0.0), task.result.get("sample_rate", 24_000)
            yield AudioPart(self._folder / task.file, part.title, duration_s, rate)


def _told(result: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """What is kept of a result in the manifest, of the types that it should have: a worker may be of any version."""
    kept = {name: value for name, value in result.items() if name not in _LEFT_OUT}
    warnings, timings, duration_s = (result.get(name) for name in ("warnings", "timings", "duration_s"))
    kept["warnings"] = [each for each in warnings if isinstance(each, str)] if isinstance(warnings, list) else []
    kept["timings"] = timings if isinstance(timings, dict) else {}
    kept["duration_s"] = float(duration_s) if isinstance(duration_s, int | float) and 0 <= duration_s < 1e9 else 0.0
    return {**kept, "platform": {"wait_s": outcome.wait_s, "worker_s": outcome.worker_s}}


def _is_best(path: Path) -> bool:
    """Whether a joined file is there, of the kind that can be made here."""
    return path.name.endswith(joined_suffix()) and path.is_file() and path.stat().st_size > 0


def _write_parts(path: Path, parts: Sequence[bytes]) -> int:
    with files.writing(path) as file:
        file.writelines(parts)
        finish_sizes(file)  # a wav that was streamed was begun before its length was known
        return file.seek(0, os.SEEK_END)
