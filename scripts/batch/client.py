"""The platform's HTTP, with patience: what may pass is waited out, and nobody is asked too often.

The platform's own client is not used: it repeats nothing over https and gives None for a job that failed.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from scripts.addresses import checked_key, checked_url, is_this_machine
from scripts.batch import files
from scripts.batch.errors import EndpointError
from scripts.batch.rates import Bucket

PATIENCE_S = 900.0
"""For so long an endpoint that cannot be reached is asked again."""

FIRST_PATIENCE_S = 45.0
"""For so long one that has never answered: it may not be there at all."""

DOWNLOAD_PATIENCE_S = 60.0
"""For so long an address of audio."""

_LONGEST_WAIT_S = 30.0
_LONGEST_PAUSE_S = 300.0  # that we let a Retry-After ask for
_MAX_CONNECTIONS = 16
_TIMEOUT = httpx.Timeout(120.0, connect=15.0, pool=None)
_MAX_REDIRECTS = 3
_TOO_LARGE = 413


class Refused(Exception):  # noqa: N818 - an answer, more than an error
    """A request that was answered with an HTTP error which will not pass.

    Args:
        status: of HTTP.
        message: the platform's.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}" if message else f"HTTP {status}")
        self.status = status


class DownloadError(Exception):
    """Audio that cannot be had from its address, or not now.

    Args:
        message: why.
        may_pass: whether it may be had from a new address.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class _Passing(Exception):  # noqa: N818 - is waited out
    """What may be better in a while.

    Args:
        message: what it was.
        wait_s: when, if it was said.
    """

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Client:
    """One endpoint. `async with Client(…)`.

    Args:
        url: of the endpoint: what stands before /run.
        api_key: None for none.
        rates: requests within ten seconds, by operation.
        patience_s: for how long what may pass is waited out.
        on_trouble: told of what is waited out, with the operation.

    Raises:
        EndpointError: for an address that would show the key on its way, and a key that is none.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        rates: Mapping[str, int],
        *,
        patience_s: float = PATIENCE_S,
        on_trouble: Callable[[str, str], None] = lambda _operation, _message: None,
    ) -> None:
        try:
            self._url = checked_url(url).rstrip("/")
            key = None if api_key is None else checked_key(api_key)
        except ValueError as error:
            raise EndpointError(str(error)) from None
        self._buckets = {name: Bucket(most) for name, most in rates.items()}
        self._patience_s, self._on_trouble = patience_s, on_trouble
        limits = httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        options: dict[str, Any] = {"timeout": _TIMEOUT, "limits": limits, "trust_env": not is_this_machine(url)}
        self._http = httpx.AsyncClient(headers=headers, **options)
        # Of addresses that results name: without our key.
        self._downloads = httpx.AsyncClient(follow_redirects=True, max_redirects=_MAX_REDIRECTS, **options)
        self._has_answered = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._downloads.aclose()

    async def run(self, body: Mapping[str, Any]) -> str:
        """Queue a job; its id. A job whose answer is lost is sent again: it has to carry an idempotency_key.

        Raises:
            Refused: for a job that the platform does not take.
            EndpointError: it cannot be reached, or is not ours.
        """
        answer = await self._ask("run", "POST", "run", dict(body))
        return str(answer["id"])

    async def status(self, job_id: str) -> dict[str, Any]:
        """What the platform says of a job.

        Raises:
            Refused: 404 for one that it does not know (any more).
            EndpointError: as of `run`.
        """
        return await self._ask("status", "GET", f"status/{job_id}")

    async def stream(self, job_id: str) -> dict[str, Any]:
        """A job's status, and the pieces of its stream that were not given before: each is given once.

        Raises:
            As of `status`.
        """
        return await self._ask("stream", "GET", f"stream/{job_id}")

    async def cancel(self, job_id: str) -> None:
        """End a job.

        Raises:
            As of `status`.
        """
        await self._ask("cancel", "POST", f"cancel/{job_id}")

    async def download(self, url: str, path: Path, max_bytes: int) -> int:
        """Get a file from its address, to `path`'s temporary name; its number of bytes.

        Raises:
            DownloadError: it cannot be had. The message does not hold the address, which may be a secret.
        """
        try:
            async for attempt in self._attempts("download", lambda: min(self._patience_s, DOWNLOAD_PATIENCE_S)):
                with attempt:
                    return await self._download(url, path, max_bytes)
        except (_Passing, Refused) as error:
            is_too_large = isinstance(error, Refused) and error.status == _TOO_LARGE
            raise DownloadError(f"the audio could not be fetched: {error}", may_pass=not is_too_large) from error
        raise AssertionError("unreachable")

    # ------------------------------------------------------------------------------

    async def _ask(self, operation: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            async for attempt in self._attempts(operation, self._patience_now_s):
                with attempt:
                    await self._buckets[operation].take()
                    return await self._answer(operation, method, path, body)
        except _Passing as error:
            patience_s = self._patience_now_s()
            raise EndpointError(f"{self._url}: {operation}: gave up after {patience_s:g} s: {error}") from error
        raise AssertionError("unreachable")

    def _patience_now_s(self) -> float:
        return self._patience_s if self._has_answered else min(self._patience_s, FIRST_PATIENCE_S)

    def _attempts(self, operation: str, patience_s: Callable[[], float]) -> AsyncRetrying:
        backoff = wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT_S)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            return max(backoff(state), getattr(error, "wait_s", 0.0))

        def tell(state: RetryCallState) -> None:
            self._on_trouble(operation, str(state.outcome.exception() if state.outcome is not None else ""))

        return AsyncRetrying(
            retry=retry_if_exception_type(_Passing),
            wait=wait,
            stop=lambda state: (state.seconds_since_start or 0.0) >= patience_s(),
            before_sleep=tell,
            reraise=True,
        )

    async def _answer(self, operation: str, method: str, path: str, body: Any) -> dict[str, Any]:
        try:
            response = await self._http.request(method, f"{self._url}/{path}", json=body)
        except (httpx.LocalProtocolError, httpx.InvalidURL) as error:  # whose text may hold the key
            raise EndpointError(f"the request cannot be sent: {type(error).__name__}") from None
        except httpx.RequestError as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from error
        self._has_answered = True
        if response.status_code == 429:
            wait_s = _retry_after_s(response)
            self._buckets[operation].pause(wait_s)
            raise _Passing(f"HTTP 429: {_told(response)}", wait_s)
        if response.status_code >= 500 or response.status_code == 408:
            raise _Passing(f"HTTP {response.status_code}: {_told(response)}", _retry_after_s(response))
        if response.status_code in (401, 403):
            raise EndpointError(f"the endpoint does not take the key: HTTP {response.status_code} {_told(response)}")
        if response.status_code == 402:
            raise EndpointError(f"the account cannot pay: HTTP 402 {_told(response)}")
        if response.status_code == 404 and operation == "run":
            raise EndpointError(f"there is no such endpoint: HTTP 404 {_told(response)}")
        if response.is_redirect:
            raise EndpointError(f"the endpoint's address leads elsewhere: HTTP {response.status_code}")
        if response.is_error:
            raise Refused(response.status_code, _told(response))
        try:
            answer = response.json()
        except ValueError as error:
            raise _Passing("the answer is not JSON") from error
        if not isinstance(answer, dict) or (operation == "run" and not answer.get("id")):
            raise _Passing(f"the answer is not what it should be: {_clip(response.text)}")
        return answer

    async def _download(self, url: str, path: Path, max_bytes: int) -> int:
        num_bytes = 0
        try:
            async with self._downloads.stream("GET", url) as response:
                if response.status_code == 429 or response.status_code >= 500:
                    raise _Passing(f"HTTP {response.status_code}", _retry_after_s(response))
                if response.is_error:
                    raise Refused(response.status_code, "")
                with files.writing(path) as file:
                    async for data in response.aiter_bytes():
                        num_bytes += len(data)
                        if num_bytes > max_bytes:
                            raise Refused(_TOO_LARGE, f"it is larger than --max-audio-bytes ({max_bytes:,})")
                        file.write(data)
        except httpx.RequestError as error:
            raise _Passing(type(error).__name__) from error
        except httpx.InvalidURL as error:
            raise Refused(400, "its address is none") from error
        return num_bytes


def _retry_after_s(response: httpx.Response) -> float:
    """What a Retry-After asks for, seconds or a date; 0 for none."""
    text = response.headers.get("Retry-After", "").strip()
    try:
        if text.isdecimal():
            return min(float(text), _LONGEST_PAUSE_S)
        wait_s = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        return min(max(wait_s, 0.0), _LONGEST_PAUSE_S)
    except (ValueError, TypeError):
        return 0.0


def _told(response: httpx.Response) -> str:
    """The error of an answer, for people."""
    try:
        answer = json.loads(response.text)
    except ValueError:
        return _clip(response.text)
    told = answer.get("error", answer) if isinstance(answer, dict) else answer
    return _clip(told if isinstance(told, str) else json.dumps(told))


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:199]}…"
