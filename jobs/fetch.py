"""Recordings that jobs name by their address: https://… and s3://bucket/key.

What a client names is fetched by rules (`jobs.guarded`), within a time and a size that are counted, not believed, and
in threads that serve nothing else: a slow server holds up only those who wait for it. What a client is told of a
failure repeats no address, which may be a signed one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import logging
import re
import ssl
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import tenacity

from jobs.errors import JobError
from jobs.guarded import AddressRefused, Deadline, Rules, check_url, guarded_client
from jobs.logs import in_context
from jobs.settings import Settings
from jobs.voices import s3_options
from voice_library import LibraryError
from voice_library.s3_store import s3_client

SCHEMES = ("https", "s3")

MAX_REDIRECTS = 5
MAX_AT_ONCE = 8
"""Downloads of a worker at a time, each with up to MAX_REFERENCE_BYTES in memory; more wait their turn."""

_MAX_ATTEMPTS = 4
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 4.0  # half of that on average
_MAY_PASS = frozenset({408, 425, 429})  # of the refusals, those that mean another time
_PLAIN = frozenset({"", "identity", "aws-chunked"})  # the last is how it came to S3, and stays on it as a label
_S3_CONNECT_S, _S3_READ_S = 5.0, 10.0
_S3_PLACE = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^\x00-\x1f\x7f]{1,1024})", re.IGNORECASE)
_CHUNK_BYTES = 1 << 16

_log = logging.getLogger(__name__)


class Fetcher:
    """A worker's downloads. Called from the event loop of any thread.

    Args:
        settings: FETCH_TIMEOUT_S, MAX_REFERENCE_BYTES, the buckets and how they are reached.
        rules: which servers may be reached; by default public ones.
    """

    def __init__(self, settings: Settings, rules: Rules | None = None) -> None:
        self._settings = settings
        self._given_rules = rules
        self._threads = ThreadPoolExecutor(MAX_AT_ONCE, "fetch")
        self._running: set[Deadline] = set()

    async def __call__(self, address: str, field: str) -> bytes:
        """Fetch what lies at an address. Cancelling ends the download.

        Args:
            address: https://… or s3://bucket/key.
            field: of the job's input, for errors.

        Raises:
            JobError: download_refused for what may not be fetched, download_failed for what cannot be had,
                reference_too_long for more than MAX_REFERENCE_BYTES.
        """
        deadline = Deadline(self._settings.fetch_timeout_s)
        download = _Download(address, field, self._settings.max_reference_bytes, deadline)
        try:
            fetched = self._threads.submit(in_context(self._fetch, download))
        except RuntimeError as error:  # closed
            raise JobError("cancelled", "the worker is closing") from error
        self._running.add(deadline)
        try:
            return await asyncio.wrap_future(fetched)
        finally:
            self._running.discard(deadline)
            deadline.cancel()

    def close(self) -> None:
        """End every download."""
        for deadline in list(self._running):
            deadline.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, download: _Download) -> bytes:
        download.deadline.begin()  # to wait for a thread is not the server's fault
        if download.address[:3].lower() == "s3:":
            return self._from_bucket(download)
        return self._from_server(download)

    def _from_server(self, download: _Download) -> bytes:
        try:
            url = check_url(download.address, self._rules.ports)
            with guarded_client(download.deadline, self._rules) as client:
                return _tried(lambda: _get(client, url, download), download)
        except AddressRefused as error:
            raise JobError("download_refused", f"{download.field}: {error}", download.field) from error

    def _from_bucket(self, download: _Download) -> bytes:
        place = _S3_PLACE.fullmatch(download.address)
        is_allowed = place is not None and place[1] in self._settings.allowed_reference_buckets
        if place is None or not is_allowed or not {".", ".."}.isdisjoint(place[2].split("/")):
            message = "expected s3://bucket/key in a bucket that this worker may read (REFERENCE_BUCKETS)"
            raise JobError("download_refused", f"{download.field}: {message}", download.field)
        bucket, key = place.groups()
        return _tried(lambda: self._object(bucket, key, download), download)

    def _object(self, bucket: str, key: str, download: _Download) -> bytes:
        """What a bucket gives, once."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
        )

        try:
            with contextlib.closing(self._s3.get_object(Bucket=bucket, Key=key)["Body"]) as body:
                return download.taken(body.iter_chunks(_CHUNK_BYTES))
        except ClientError as error:
            _check_status(int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), download)
            raise download.failed("the bucket refused") from error
        except (ConnectionError, HTTPClientError, IncompleteReadError) as error:
            raise _PassingError("the connection to the bucket failed") from error
        except (BotoCoreError, LibraryError) as error:
            _log.warning(
                "a recording could not be read from a bucket: %s", type(error).__name__
            )  # its text names the key
            raise download.failed("this worker cannot read the bucket, see its log") from error

    @functools.cached_property
    def _rules(self) -> Rules:
        return self._given_rules or Rules()  # not before it is needed: reading all authorities takes time

    @functools.cached_property
    def _s3(self) -> Any:
        options = s3_options(self._settings)
        hurried = replace(options, connect_timeout_s=_S3_CONNECT_S, read_timeout_s=_S3_READ_S, attempts=1)
        return s3_client(hurried)


class _PassingError(Exception):
    """What may go better at another attempt."""


@dataclass(frozen=True)
class _Download:
    """What to fetch, and how much of it at most."""

    address: str
    field: str
    max_bytes: int
    deadline: Deadline

    def taken(self, chunks: Iterable[bytes]) -> bytes:
        """Chunks as one, as long as there are not too many."""
        data = io.BytesIO()  # whose value is not copied
        for chunk in chunks:
            if self.deadline.is_over:
                raise httpx.ReadTimeout("the deadline is over")
            self.check_size(data.tell() + len(chunk))
            data.write(chunk)
        return data.getvalue()

    def check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            message = f"{self.field}: at most {self.max_bytes / 1e6:.1f} MB, the recording at this address is larger"
            raise JobError("reference_too_long", message, self.field)

    def failed(self, reason: str) -> JobError:
        return JobError("download_failed", f"{self.field}: the recording could not be fetched: {reason}", self.field)


def _tried(get: Callable[[], bytes], download: _Download) -> bytes:
    """Try a few times, as long as there is time."""
    deadline = download.deadline
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=lambda state: state.attempt_number >= _MAX_ATTEMPTS or deadline.is_over,
        wait=tenacity.wait_random_exponential(_FIRST_WAIT_S, _LONGEST_WAIT_S),
        sleep=deadline.rest,
        reraise=True,
    )
    try:
        return attempts(get)
    except _PassingError as error:
        raise download.failed(str(error)) from error
    except httpx.TransportError as error:
        if deadline.is_over:
            reason = f"it did not come within FETCH_TIMEOUT_S ({deadline.within_s:g} s)"
        elif _is_certificate_error(error):
            reason = "the server's certificate does not vouch for its name"
        else:
            reason = "the connection failed"
        raise download.failed(reason) from error


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.TransportError):
        return not _is_certificate_error(error)
    return isinstance(error, _PassingError)


def _is_certificate_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__  # httpcore cuts its causes off
    return False


def _get(client: httpx.Client, url: httpx.URL, download: _Download) -> bytes:
    """What a server gives, once. Each redirect is a request of its own, under the same rules."""
    request = client.build_request("GET", url)
    for _ in range(MAX_REDIRECTS + 1):
        response = client.send(request, stream=True)
        with contextlib.closing(response):
            if response.next_request is None:
                return _body(response, download)
            request = response.next_request
    raise download.failed(f"the address redirects more than {MAX_REDIRECTS} times")


def _body(response: httpx.Response, download: _Download) -> bytes:
    _check_status(response.status_code, download)
    if response.headers.get("content-encoding", "").strip().lower() not in _PLAIN:
        raise download.failed("the server compressed it, although it was asked not to")
    if (claimed := response.headers.get("content-length", "")).isdecimal():
        download.check_size(int(claimed[:20]))
    return download.taken(response.iter_raw())


def _check_status(status: int, download: _Download) -> None:
    if status in _MAY_PASS or status >= 500:
        raise _PassingError(f"the server answered {status}")
    if not 200 <= status < 300:
        raise download.failed(f"the server answered {status}")
