"""A job's audio as it is spoken, bytes that make one file: by this machine, or by a deployed worker of either kind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jobs.streaming import join
from jobs.worker import Worker
from scripts.batch.client import Client, DownloadError, Refused
from scripts.batch.errors import EndpointError
from scripts.batch.files import temporary

_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_PAUSE_S = 0.2
_PATIENCE_S = 10.0  # with a job that nobody takes, before that is told
_CANCEL_S = 10.0  # who wants to end does not wait for an endpoint that is away
_MAX_DOWNLOAD_BYTES = 4 << 30
_BLOCK_BYTES = 1 << 20
_NO_STREAM = "the endpoint's answer is no stream of audio"


class SpeakingError(Exception):
    """A job that failed, or whose audio did not come whole.

    Args:
        message: what was wrong.
        code: the job API's, where there is one.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(f"{message} ({code})" if code else message)


class Source(Protocol):
    """Speaks jobs."""

    def speak(self, job_input: Mapping[str, Any], result: dict[str, Any]) -> AsyncIterator[bytes]:
        """The audio of a job; cancelling it ends the job.

        Args:
            job_input: of the job API.
            result: is filled with the result's other fields.

        Raises:
            SpeakingError: it failed.
        """


class Here:
    """This machine speaks.

    Args:
        worker: loaded.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def speak(self, job_input: Mapping[str, Any], result: dict[str, Any]) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(self._worker.stream({"input": dict(job_input)})) as pieces:
            async for piece in pieces:
                yield _taken(piece, result)


@dataclass
class _Job:
    """One that the platform has.

    Attributes:
        is_over: whether the platform says that it has ended.
    """

    id: str
    is_over: bool = False


class There:
    """A deployed worker speaks: one that streams is heard while it does, of one that does not the whole is fetched.

    Args:
        client: of its endpoint.
        tell: told, once, that a job waits in the queue.
        patience_s: after so long.
    """

    def __init__(
        self, client: Client, tell: Callable[[str], None] = lambda _: None, *, patience_s: float = _PATIENCE_S
    ) -> None:
        self._client, self._tell, self._patience_s = client, tell, patience_s

    async def speak(self, job_input: Mapping[str, Any], result: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            # A key of its own, so that a job whose answer is lost is not spoken twice.
            keyed = {"idempotency_key": f"speak-{uuid.uuid4().hex}", **job_input}
            job = _Job(await self._client.run({"input": keyed}))
            try:
                async for data in self._answer(job, result):
                    yield data
            except BaseException:  # an interrupt, or nobody can hear the rest: it is not to be paid for
                if not job.is_over:
                    await self._cancel(job)
                raise
        except Refused as error:
            raise SpeakingError(str(error)) from error

    async def _cancel(self, job: _Job) -> None:
        """Whatever that gives: the job may just have ended, and why it is cancelled is what counts."""
        with contextlib.suppress(TimeoutError, Refused, EndpointError):
            await asyncio.wait_for(self._client.cancel(job.id), _CANCEL_S)

    async def _answer(self, job: _Job, result: dict[str, Any]) -> AsyncIterator[bytes]:
        num_taken, is_whole = 0, False
        queue = _Queue(self._tell, self._patience_s)
        while True:
            answer = await self._client.stream(job.id)
            job.is_over = answer.get("status") in _OVER
            queue.note(answer.get("status"))
            pieces = _pieces(answer)
            for piece in pieces:
                if piece.get("seq", num_taken) != num_taken:
                    raise SpeakingError(f"piece {num_taken} of the stream was lost on its way")
                num_taken += 1
                is_whole = bool(piece.get("final"))
                yield _taken(piece, result)
            if not pieces and job.is_over:
                break
            if not pieces:
                await asyncio.sleep(_PAUSE_S)
        if answer["status"] == "COMPLETED" and num_taken:
            if not is_whole:
                raise SpeakingError("the end of the stream was lost on its way")
            return
        async for data in self._whole(job, result):
            yield data

    async def _whole(self, job: _Job, result: dict[str, Any]) -> AsyncIterator[bytes]:
        """Of a worker that does not stream, or the error of one that does."""
        answer = await self._client.status(job.id)
        output = answer.get("output")
        if answer.get("status") != "COMPLETED":
            raise _failure(answer)
        if not isinstance(output, dict):
            raise SpeakingError("the endpoint's answer is no result with audio")
        audio = output.pop("audio", None)
        result.update(output)
        if audio is not None:
            yield _decoded(audio)
        elif output.get("audio_url") is not None:
            async for data in self._downloaded(output["audio_url"]):
                yield data

    async def _downloaded(self, url: Any) -> AsyncIterator[bytes]:
        if not (isinstance(url, str) and url.lower().startswith(("http://", "https://"))):
            raise SpeakingError("the audio's address is none")  # which is not shown: it may be a secret
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "audio"
            try:
                await self._client.download(url, path, _MAX_DOWNLOAD_BYTES)
            except DownloadError as error:
                raise SpeakingError(str(error)) from error
            with temporary(path).open("rb") as file:
                while data := file.read(_BLOCK_BYTES):
                    yield data


class _Queue:
    """Tells once that a job is taken by nobody.

    Args:
        tell: told.
        patience_s: after so long.
    """

    def __init__(self, tell: Callable[[str], None], patience_s: float) -> None:
        self._tell = tell
        self._until_s: float | None = time.monotonic() + patience_s

    def note(self, status: object) -> None:
        if status == "IN_QUEUE" and self._until_s is not None and time.monotonic() >= self._until_s:
            self._until_s = None
            self._tell("The job waits in the endpoint's queue: no worker has taken it yet.")


def _pieces(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    stream = answer.get("stream") or []
    if not (isinstance(stream, list) and all(isinstance(item, dict) for item in stream)):
        raise SpeakingError(_NO_STREAM)
    pieces = [item.get("output") or {} for item in stream]
    if not all(isinstance(piece, dict) for piece in pieces):
        raise SpeakingError(_NO_STREAM)
    return pieces


def _taken(piece: Mapping[str, Any], result: dict[str, Any]) -> bytes:
    if "error" in piece:
        raise _error_of(piece["error"])
    try:
        join(result, piece)
    except TypeError as error:  # parts of a field that are of two kinds
        raise SpeakingError(_NO_STREAM) from error
    return _decoded(piece.get("audio") or "")


def _decoded(audio: Any) -> bytes:
    try:
        return base64.b64decode(audio, validate=True)
    except (ValueError, TypeError) as error:
        raise SpeakingError("the audio came damaged: it is no base64") from error


def _failure(answer: Mapping[str, Any]) -> SpeakingError:
    output = answer.get("output")
    code = output.get("error_code", "") if isinstance(output, dict) else ""
    if answer.get("error"):
        error = _error_of(answer["error"])
        return SpeakingError(str(error), code) if code else error
    return SpeakingError(f"the job ended as {answer.get('status')}")


def _error_of(told: Any) -> SpeakingError:
    """An error as a stream's last piece or a FAILED job has it: JSON of an error result, or text."""
    with contextlib.suppress(ValueError, TypeError):
        error = json.loads(told)
        if isinstance(error, dict) and "error" in error:
            return SpeakingError(str(error["error"]), str(error.get("error_code") or ""))
    return SpeakingError(str(told))
