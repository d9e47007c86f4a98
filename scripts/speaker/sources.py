"""A job's audio as it is spoken, bytes that make one file: by this machine, or by a deployed worker of either kind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jobs.streaming import join
from jobs.worker import Worker
from scripts.batch.client import Client, DownloadError, Refused
from scripts.batch.files import temporary

_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_PAUSE_S = 0.2
_CANCEL_S = 10.0  # who wants to end does not wait for an endpoint that is away
_MAX_DOWNLOAD_BYTES = 4 << 30
_BLOCK_BYTES = 1 << 20


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


class There:
    """A deployed worker speaks: one that streams is heard while it does, of one that does not the whole is fetched.

    Args:
        client: of its endpoint.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def speak(self, job_input: Mapping[str, Any], result: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            # A key of its own, so that a job whose answer is lost is not spoken twice.
            keyed = {"idempotency_key": f"speak-{uuid.uuid4().hex}", **job_input}
            job_id = await self._client.run({"input": keyed})
            try:
                async for data in self._answer(job_id, result):
                    yield data
            except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._client.cancel(job_id), _CANCEL_S)
                raise
        except Refused as error:
            raise SpeakingError(str(error)) from error

    async def _answer(self, job_id: str, result: dict[str, Any]) -> AsyncIterator[bytes]:
        num_taken, is_whole = 0, False
        while True:
            answer = await self._client.stream(job_id)
            pieces = [item.get("output") or {} for item in answer.get("stream") or ()]
            for piece in pieces:
                if piece.get("seq", num_taken) != num_taken:
                    raise SpeakingError(f"piece {num_taken} of the stream was lost on its way")
                num_taken += 1
                is_whole = bool(piece.get("final"))
                yield _taken(piece, result)
            if not pieces and answer.get("status") in _OVER:
                break
            if not pieces:
                await asyncio.sleep(_PAUSE_S)
        if answer["status"] == "COMPLETED" and num_taken:
            if not is_whole:
                raise SpeakingError("the end of the stream was lost on its way")
            return
        async for data in self._whole(job_id, result):
            yield data

    async def _whole(self, job_id: str, result: dict[str, Any]) -> AsyncIterator[bytes]:
        """Of a worker that does not stream, or the error of one that does."""
        answer = await self._client.status(job_id)
        output = answer.get("output")
        if answer.get("status") != "COMPLETED" or not isinstance(output, dict):
            raise _failure(answer)
        audio = output.pop("audio", None)
        result.update(output)
        if audio is not None:
            yield base64.b64decode(audio)
        elif "audio_url" in output:
            async for data in self._downloaded(output["audio_url"]):
                yield data

    async def _downloaded(self, url: str) -> AsyncIterator[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "audio"
            try:
                await self._client.download(url, path, _MAX_DOWNLOAD_BYTES)
            except DownloadError as error:
                raise SpeakingError(str(error)) from error
            with temporary(path).open("rb") as file:
                while data := file.read(_BLOCK_BYTES):
                    yield data


def _taken(piece: Mapping[str, Any], result: dict[str, Any]) -> bytes:
    if "error" in piece:
        raise _error_of(piece["error"])
    join(result, piece)
    return base64.b64decode(piece.get("audio") or "")


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
