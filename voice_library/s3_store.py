"""A library in a bucket of S3 or of any endpoint that speaks its protocol.

A put is seen whole or not at all, by S3's own promise; winners are found by conditional puts. An endpoint
that ignores the condition would let two workers overwrite each other's voices, so the first conditional
put of a process is preceded by a probe.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from voice_library.errors import LibraryError
from voice_library.store import Entry, check_key, is_key

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

_PROBE = "tmp/conditional-put"
_PROBE_CONTENT = b"Written to learn whether this endpoint refuses to overwrite an object when asked to.\n"
_ATTEMPTS_AT_CONFLICT = 5
"""S3 answers 409 when another conditional put of the key is under way, and asks to try again."""
_CONNECTIONS = 32


@dataclass(frozen=True)
class S3Options:
    """How to reach a bucket. None: what boto3 finds by itself (environment, profile, instance role).

    Args:
        endpoint_url: of an S3-compatible service.
        region: its region.
        access_key_id, secret_access_key: credentials.
        connect_timeout_s, read_timeout_s: per attempt, seconds.
        attempts: how often a request is made before it counts as failed.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    attempts: int = 3

    def __repr__(self) -> str:
        return f"S3Options(endpoint_url={self.endpoint_url!r}, region={self.region!r})"


class S3Store:
    """Blobs as objects under a prefix of a bucket.

    Args:
        bucket: its name.
        prefix: of all keys, without a slash at either end; may be empty.
        options: how to reach it.
    """

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = options or S3Options()
        self._client = s3_client(self._options)
        self._probe_lock = threading.Lock()
        self._probed = False

    num_serial_reads = 4

    def describe(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def read(self, key: str, max_bytes: int) -> bytes | None:
        with self._reported("read", key):
            try:
                body = self._client.get_object(**self._object(key))["Body"]
            except self._client.exceptions.NoSuchKey:
                return None
            with contextlib.closing(body):
                data: bytes = body.read(max_bytes + 1)
            return data

    def write(self, key: str, data: bytes) -> None:
        with self._reported("write", key):
            self._client.put_object(**self._object(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        self._probe()
        # A put whose answer got lost is sent again, and then finds itself: what is there is ours if it is equal.
        return self._put_if(key, data, IfNoneMatch="*") or self.read(key, len(data)) == data

    def replace(self, key: str, data: bytes, version: str) -> bool:
        self._probe()
        return self._put_if(key, data, IfMatch=version) or self.read(key, len(data)) == data

    def remove(self, key: str, version: str) -> bool:
        from botocore.exceptions import ClientError

        # Services that know no conditional deletion ignore or refuse the condition: hence the look before, which
        # leaves them a moment between the two.
        with self._reported("delete", key):
            try:
                if self._client.head_object(**self._object(key))["ETag"] != version:
                    return False
                self._client.delete_object(**self._object(key), IfMatch=version)
            except ClientError as error:
                if _status(error) in (404, 412):
                    return False
                if _status(error) not in (400, 501):
                    raise
                self._client.delete_object(**self._object(key))
        return True

    def delete(self, key: str) -> None:
        with self._reported("delete", key):
            self._client.delete_object(**self._object(key))

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._reported("list", prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", ()):
                    key = item["Key"][len(self._prefix) :]
                    if is_key(key):
                        yield Entry(key, item["Size"], item["LastModified"].timestamp(), item["ETag"])

    def sweep(self, older_than_s: float) -> int:
        """A bucket has no half-written objects (parts of uploads are not objects, and are not made here)."""
        del older_than_s
        return 0

    def close(self) -> None:
        self._client.close()

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        from botocore.exceptions import ClientError

        for attempt in range(_ATTEMPTS_AT_CONFLICT):
            with self._reported("write", key):
                try:
                    self._client.put_object(**self._object(key), Body=data, **condition)
                    return True
                except ClientError as error:
                    status = _status(error)
                    is_missing = status == 404 and "IfMatch" in condition and _code(error) == "NoSuchKey"
                    if status == 412 or is_missing:
                        return False
                    if status != 409 or attempt == _ATTEMPTS_AT_CONFLICT - 1:
                        raise
        raise AssertionError(key)

    def _probe(self) -> None:
        """Make sure, once, that the endpoint honours conditions."""
        with self._probe_lock:
            if self._probed:
                return
            self.write(_PROBE, _PROBE_CONTENT)
            if self._put_if(_PROBE, _PROBE_CONTENT, IfNoneMatch="*"):
                raise LibraryError(
                    "storage_failed",
                    f"the endpoint of {self.describe()} ignores conditional puts (If-None-Match), without which two "
                    "workers could overwrite each other's voices; use one that honours them, or a folder",
                )
            self._probed = True

    @contextlib.contextmanager
    def _reported(self, verb: str, key: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            self._fail(verb, key, self._reason(error), error)
        except (BotoCoreError, OSError) as error:
            self._fail(verb, key, str(error) or type(error).__name__, error)

    def _reason(self, error: ClientError) -> str:
        code = _code(error)
        if _status(error) == 403:
            return f"access denied ({code}); check the credentials and their rights on the bucket"
        if code == "NoSuchBucket":
            return "the bucket does not exist"
        return str(error)

    def _fail(self, verb: str, key: str, reason: str, error: Exception) -> NoReturn:
        raise LibraryError("storage_failed", f"could not {verb} {key} in {self.describe()}: {reason}") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def s3_client(options: S3Options) -> Any:
    """A client of its own session: boto3's default one is shared by the process and not safe to make in threads.

    Raises:
        LibraryError: invalid_request (s3), for options that cannot be used.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        max_pool_connections=_CONNECTIONS,
        # Services other than Amazon's often have neither a host name per bucket nor the newer checksums.
        s3={"addressing_style": "path" if options.endpoint_url else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version="s3v4",  # of addresses too, for which boto3 would take the older one that few services know
    )
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=options.region,
            aws_access_key_id=options.access_key_id,
            aws_secret_access_key=options.secret_access_key,
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise LibraryError("invalid_request", f"the S3 options cannot be used: {error}", "s3") from error
