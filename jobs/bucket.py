"""Where audio goes that its job wants delivered, or that no result can hold: into a bucket, for a client to fetch.

An object's name holds 128 bits of chance: nobody finds another job's audio by guessing, and nothing is ever
overwritten. What is returned is an address that is signed for some time (BUCKET_URL_LIFETIME_S); the bucket itself can
stay closed to the public.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, ParamSpec, Protocol, TypeVar
from urllib.parse import quote

import httpx
import tenacity

from jobs.audio_file import AudioFile
from jobs.errors import JobError
from jobs.guarded import AddressRefused, Deadline, guarded_client
from jobs.logs import in_context
from jobs.s3_config import FIELD, S3Config
from jobs.settings import Settings
from jobs.voices import s3_options
from voice_library import LibraryError, S3Options
from voice_library.s3_store import s3_client

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

CONTENT_TYPES: Mapping[str, str] = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}

PATIENCE_S = 300.0
"""For so long an upload that fails is tried anew, or up to the job's end if that is sooner."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.3, 15.0

MAX_PUT_BYTES = 5 * 10**9
"""Of an object that is put at once: S3 takes no more."""

PUT_PART_BYTES = 8 << 20
"""Larger files are uploaded in parts of this size, some of them at the same time."""

_NUM_PARTS_AT_ONCE = 4
_NUM_CALLS_AT_ONCE = 8
_FOR_ANSWER_S = 3.0
"""Of a job's time, what is kept for telling the client that nothing came of it."""

_CLEANING_S = 2.0  # less than that
_LOOKING_S = 10.0
_GIVEN_ATTEMPT_S = 3600  # of a job without an end
_MAX_ANSWER_BYTES = 4_096
_BLOCK_BYTES = 1 << 18
_MAX_REASON_CHARS = 300
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,60})</Code>")
_PASSING_STATUS = frozenset({408, 425, 429})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "NoSuchUpload", "OperationAborted", "InternalError"})

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class BucketError(Exception):
    """What a bucket answered instead of doing what it was asked to.

    Args:
        reason: for a person, without secrets and without signed addresses.
        may_pass: whether it may be another answer when it is asked again.
    """

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.reason, self.may_pass = reason[:_MAX_REASON_CHARS], may_pass


class Bucket(Protocol):
    """Where audio can be put. Whatever fails is a BucketError."""

    @property
    def prefix(self) -> str:
        """Of all names."""

    @property
    def max_bytes(self) -> int | None:
        """Of one object; None for no limit that audio could reach."""

    @property
    def named_by(self) -> str:
        """The setting or the field that names it, for the log."""

    def describe(self) -> str:
        """The place, for messages to the client; without secrets."""

    async def put(self, name: str, audio: AudioFile, headers: Mapping[str, str], within_s: float | None) -> None:
        """Upload a file whole or not at all; cancelled, nothing of it stays.

        Args:
            name: of the object.
            audio: the file.
            headers: `ContentType` and `ContentDisposition`, as boto3 names them.
            within_s: seconds that it may take; None for no end.
        """

    async def clean(self, name: str) -> None:
        """Remove what attempts that failed may have left."""

    async def has(self, name: str) -> bool:
        """Whether there is an object of this name."""

    async def url(self, name: str) -> str:
        """A signed address to fetch the object from."""

    def close(self) -> None:
        """Let go of connections."""


# ---------------------------------------------------------------------------------- delivering


@dataclass(frozen=True)
class Label:
    """What a file is called.

    Args:
        job_id: the platform's.
        title: what people call it; None for the job's id.
        audio_format: wav, flac, mp3 or opus.
    """

    job_id: str | None
    title: str | None
    audio_format: str

    def new_name(self, prefix: str) -> str:
        """A name for an object, as none was before."""
        job = re.sub(r"[^A-Za-z0-9_]+", "-", self.job_id or "").strip("-")[:60] or "job"
        return f"{prefix}{job}/{secrets.token_hex(16)}.{self.audio_format}"

    @property
    def headers(self) -> dict[str, str]:
        """What a browser is told: play it, and save it under its title."""
        called = self._plain(self.title or "") or self._plain(self.job_id or "") or "speech"
        plain = unicodedata.normalize("NFKD", called).encode("ascii", "ignore").decode("ascii").strip() or "speech"
        file_name = f"{plain}.{self.audio_format}"
        disposition = f'inline; filename="{file_name}"'
        if plain != called:
            disposition += f"; filename*=UTF-8''{quote(f'{called}.{self.audio_format}', safe='')}"
        return {"ContentType": CONTENT_TYPES[self.audio_format], "ContentDisposition": disposition}

    @staticmethod
    def _plain(text: str) -> str:
        """Without what no file's name has."""
        kept = "".join(character for character in text if character.isprintable() and character not in '/\\"%;:*?<>|')
        return " ".join(kept.split())[:100]


async def deliver(audio: AudioFile, label: Label, bucket: Bucket, *, time_left_s: float | None) -> str:
    """Put a file into a bucket, again and again until it is there or there is no more time.

    Args:
        audio: the file.
        label: what to call it.
        bucket: where to.
        time_left_s: of the job; None for no end.

    Returns:
        The object's name.

    Raises:
        JobError: storage_failed; result_too_large for what the bucket takes in no way; invalid_request for a job's
            own bucket at an address that may not be reached.
    """
    if bucket.max_bytes is not None and audio.num_bytes > bucket.max_bytes:
        message = f"the audio has {audio.num_bytes / 1e9:.1f} GB and at most {bucket.max_bytes / 1e9:g} GB can be put "
        raise JobError("result_too_large", f"{message}into {bucket.describe()} at once", "output_format")
    within_s = None if time_left_s is None else max(time_left_s - _FOR_ANSWER_S, time_left_s / 2, 0.0)
    name = label.new_name(bucket.prefix)
    trouble = "there was no time left for it"
    try:
        async with asyncio.timeout(within_s) as deadline:
            async for attempt in _attempts(within_s):
                with attempt:
                    try:
                        await bucket.put(name, audio, label.headers, within_s)
                    except BucketError as error:
                        trouble = error.reason
                        _log.warning("an upload to the bucket of %s failed: %s", bucket.named_by, trouble)
                        raise
        if attempt.retry_state.attempt_number > 1:
            await _cleaned(bucket, name)
        return name
    except (BucketError, TimeoutError) as error:
        if isinstance(error, TimeoutError) and not deadline.expired():
            raise
        await _cleaned(bucket, name)
        message = f"the audio could not be put into {bucket.describe()}: {trouble}"
        raise JobError("storage_failed", message) from None


def _attempts(within_s: float | None) -> tenacity.AsyncRetrying:
    patience_s = PATIENCE_S if within_s is None else min(PATIENCE_S, within_s)
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, BucketError) and error.may_pass),
        wait=tenacity.wait_exponential(FIRST_WAIT_S, LONGEST_WAIT_S) + tenacity.wait_random(0.0, FIRST_WAIT_S),
        stop=tenacity.stop_before_delay(patience_s),
        reraise=True,
    )


async def _cleaned(bucket: Bucket, name: str) -> None:
    """Leave no parts behind, as far as that can be had soon."""
    with contextlib.suppress(BucketError, TimeoutError):
        async with asyncio.timeout(_CLEANING_S):
            await bucket.clean(name)


# ---------------------------------------------------------------------------------- the deployment's


def open_bucket(settings: Settings) -> OwnBucket | None:
    """The bucket that BUCKET_NAME names; None where it names none. One that cannot be reached is no error.

    Raises:
        LibraryError: invalid_request, for options that cannot be used.
    """
    if settings.bucket_name is None:
        return None
    return OwnBucket(
        settings.bucket_name,
        settings.bucket_prefix,
        s3_options(settings),
        url_lifetime_s=settings.bucket_url_lifetime_s,
    )


class OwnBucket:
    """The deployment's bucket, large files in parts.

    Args:
        bucket: its name.
        prefix: of all names; used as it is.
        options: how to reach it.
        url_lifetime_s: for how long an address can be used.
        part_bytes: size of a part, and of the smallest file that is cut into parts.
    """

    max_bytes = None
    named_by = "BUCKET_NAME"

    def __init__(
        self, bucket: str, prefix: str, options: S3Options, *, url_lifetime_s: int, part_bytes: int = PUT_PART_BYTES
    ) -> None:
        from s3transfer.manager import TransferConfig, TransferManager

        self._bucket = bucket
        self.prefix = prefix
        self._url_lifetime_s = url_lifetime_s
        self._client = s3_client(options)
        self._threads = ThreadPoolExecutor(_NUM_CALLS_AT_ONCE, "bucket")
        config = TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_request_concurrency=_NUM_PARTS_AT_ONCE,
            max_submission_concurrency=_NUM_PARTS_AT_ONCE,
            max_in_memory_upload_chunks=_NUM_PARTS_AT_ONCE,
        )
        self._transfers = TransferManager(self._client, config)

    def describe(self) -> str:
        return f"the bucket {self._bucket} ({self.named_by})"

    async def put(self, name: str, audio: AudioFile, headers: Mapping[str, str], within_s: float | None) -> None:
        is_over = asyncio.Event()
        loop = asyncio.get_running_loop()
        # Closed by whoever refers to it last: threads may still read when a transfer was cancelled.
        file = audio.open()
        told = _when_done(lambda: loop.call_soon_threadsafe(is_over.set))
        with _reported():
            transfer = self._transfers.upload(file, self._bucket, name, dict(headers), [told])
        try:
            await is_over.wait()
        except asyncio.CancelledError:
            transfer.cancel()  # which aborts what was uploaded in parts
            raise
        with _reported():
            transfer.result()

    async def clean(self, name: str) -> None:
        await self._call(self._abort_parts, name)

    async def has(self, name: str) -> bool:
        return await self._call(self._has, name)

    async def url(self, name: str) -> str:
        return await self._call(self._signed, name)

    def close(self) -> None:
        self._transfers.shutdown(cancel=True)
        self._threads.shutdown()
        self._client.close()

    def _abort_parts(self, name: str) -> None:
        with _reported():
            found = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=name)
            for upload in found.get("Uploads", ()):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload["UploadId"])

    def _has(self, name: str) -> bool:
        from botocore.exceptions import ClientError

        with _reported():
            try:
                self._client.head_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if _status(error) == 404:
                    return False
                raise
        return True

    def _signed(self, name: str) -> str:
        with _reported():
            return _signed(self._client, "get_object", self._bucket, name, self._url_lifetime_s)

    async def _call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await _in_thread(self._threads, function, *args, **kwargs)


async def _in_thread(
    threads: ThreadPoolExecutor, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    return await asyncio.get_running_loop().run_in_executor(threads, in_context(function, *args, **kwargs))


def _when_done(call: Callable[[], object]) -> Any:
    """What s3transfer calls when a transfer has ended, however that was."""
    from s3transfer.subscribers import BaseSubscriber

    class WhenDone(BaseSubscriber):
        def on_done(self, future: Any, **_: Any) -> None:
            call()

    return WhenDone()


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """What boto3 raises, told as a BucketError."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as NoConnection
    from s3transfer.exceptions import CancelledError

    try:
        yield
    except ClientError as error:
        raise BucketError(_reason(error), may_pass=_may_pass(_status(error), _code(error))) from error
    except BotoCoreError as error:
        passes = isinstance(error, NoConnection | HTTPClientError)
        raise BucketError(_UNREACHABLE if passes else str(error), may_pass=passes) from error
    except (CancelledError, RuntimeError) as error:  # of transfers and of threads
        raise BucketError("the worker is being closed", may_pass=False) from error
    except (OSError, ValueError) as error:
        raise BucketError(str(error) or type(error).__name__, may_pass=isinstance(error, OSError)) from error


_UNREACHABLE = "it cannot be reached"


def _reason(error: ClientError) -> str:
    return _told(_status(error), _code(error))


def _told(status: int, code: str) -> str:
    if code == "NoSuchBucket":
        return "the bucket does not exist"
    if 300 <= status < 400 or code == "AuthorizationHeaderMalformed":
        return f"it answered {status}: the bucket is in another region; name it (BUCKET_REGION, {FIELD}.region)"
    if status in (401, 403):
        return f"access denied ({code or status}); check the credentials and their rights on the bucket"
    return f"it answered {status}{f' ({code})' if code else ''}"


def _may_pass(status: int, code: str) -> bool:
    return status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _signed(client: Any, verb: str, bucket: str, name: str, lifetime_s: int, **headers: str) -> str:
    """A signed address; made here, without asking anyone but, for credentials that a machine has, the machine."""
    fields = {"Bucket": bucket, "Key": name, **headers}
    return str(client.generate_presigned_url(verb, Params=fields, ExpiresIn=lifetime_s))


# ---------------------------------------------------------------------------------- a job's own


def given_bucket(config: S3Config, settings: Settings) -> GivenBucket:
    """The bucket that a job brings along."""
    options = S3Options(
        endpoint_url=config.endpoint_url,
        region=config.known_region,
        access_key_id=config.access_id.get_secret_value(),
        secret_access_key=config.access_secret.get_secret_value(),
    )
    lifetime_s = settings.bucket_url_lifetime_s
    return GivenBucket(config.bucket_name, config.place, options, url_lifetime_s=lifetime_s)


class GivenBucket:
    """A bucket at an address that a client names: boto3 only signs, and a guarded client carries.

    Args:
        bucket: its name.
        place: for messages.
        options: how to reach it.
        url_lifetime_s: for how long an address can be used.
        make_client: makes a client that keeps to a deadline and reaches only what may be reached.
    """

    max_bytes = MAX_PUT_BYTES
    prefix = ""
    named_by = FIELD

    def __init__(
        self,
        bucket: str,
        place: str,
        options: S3Options,
        *,
        url_lifetime_s: int,
        make_client: Callable[[Deadline], httpx.Client] | None = None,
    ) -> None:
        self._bucket, self._place, self._options = bucket, place, options
        self._url_lifetime_s = url_lifetime_s
        self._make_client = make_client or guarded_client
        self._thread = ThreadPoolExecutor(1, "s3-config")  # its own: a service that is slow on purpose holds up no one

    def describe(self) -> str:
        return f"the bucket {self._place} ({self.named_by})"

    async def put(self, name: str, audio: AudioFile, headers: Mapping[str, str], within_s: float | None) -> None:
        deadline = Deadline(_GIVEN_ATTEMPT_S if within_s is None else within_s)
        sent = {"Content-Type": headers["ContentType"], "Content-Disposition": headers["ContentDisposition"]}
        sent["Content-Length"] = str(audio.num_bytes)
        url = await self._signed("put_object", name, _GIVEN_ATTEMPT_S, **headers)
        file = audio.open()
        try:
            await self._call(self._ask, "PUT", url, deadline, sent, _blocks(file, audio.num_bytes))
        finally:
            deadline.cancel()

    async def clean(self, name: str) -> None:
        """What was put at once is there whole or not at all."""

    async def has(self, name: str) -> bool:
        deadline = Deadline(_LOOKING_S)
        url = await self._signed("head_object", name, _GIVEN_ATTEMPT_S)
        try:
            return await self._call(self._ask, "HEAD", url, deadline) != 404
        finally:
            deadline.cancel()

    async def url(self, name: str) -> str:
        return await self._signed("get_object", name, self._url_lifetime_s)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _signed(self, verb: str, name: str, lifetime_s: int, **headers: str) -> str:
        return await self._call(self._signed_now, verb, name, lifetime_s, headers)

    async def _call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await _in_thread(self._thread, function, *args, **kwargs)

    def _signed_now(self, verb: str, name: str, lifetime_s: int, headers: dict[str, str]) -> str:
        with _reported():
            try:
                client = s3_client(self._options)
            except LibraryError as error:
                raise BucketError(error.message, may_pass=False) from None
            with contextlib.closing(client):
                return _signed(client, verb, self._bucket, name, lifetime_s, **headers)

    def _ask(
        self,
        method: str,
        url: str,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
        content: Iterator[bytes] | None = None,
    ) -> int:
        """Ask, and give the status where it is a success, or 404 to HEAD. Blocks."""
        try:
            with (
                self._make_client(deadline) as client,
                client.stream(method, url, headers=headers, content=content) as answer,
            ):
                status = answer.status_code
                said = b"" if answer.is_success else next(answer.iter_raw(_MAX_ANSWER_BYTES), b"")
        except AddressRefused as error:
            raise JobError("invalid_request", f"{FIELD}.endpointUrl: {error}", f"{FIELD}.endpointUrl") from None
        except httpx.HTTPError:  # whose messages may hold the signed address
            raise BucketError(_UNREACHABLE, may_pass=True) from None
        if 200 <= status < 300 or (method == "HEAD" and status == 404):
            return status
        found = _CODE.search(said)
        code = found[1].decode("ascii") if found else ""
        raise BucketError(_told(status, code), may_pass=_may_pass(status, code))


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """A file's content, as much of it as was announced."""
    with file:
        while num_bytes and (block := file.read(min(_BLOCK_BYTES, num_bytes))):
            num_bytes -= len(block)
            yield block
