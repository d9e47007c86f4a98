"""A bucket that a job brings along: `s3Config`, as the platform's own documentation has it, checked strictly.

    {"input": {…}, "s3Config": {"accessId": "…", "accessSecret": "…", "bucketName": "…", "endpointUrl": "https://…"}}

It may stand beside `input` or in it. No message shows what was sent: any of its values may be a secret in the wrong
place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from jobs.errors import JobError
from jobs.guarded import AddressRefused, check_url

FIELD = "s3Config"

DEFAULT_REGION = "us-east-1"
"""Of services that have none, and of Amazon's where the address names none."""

_REGIONS = (
    re.compile(r"(?:.+\.)?s3[.-](?:dualstack\.)?([a-z]{2,}-[a-z0-9-]+)\."),  # Amazon, Backblaze, Scaleway, Wasabi, …
    re.compile(r"s3api-([a-z0-9-]+)\.runpod\.io$"),
    re.compile(r"(?:.+\.)?([a-z]{3}\d)\.digitaloceanspaces\.com$"),
)
_BUCKET = r"^[A-Za-z0-9][A-Za-z0-9._-]{1,254}$"
_SPECIAL_BUCKETS = ("--x-s3", "--op-s3")  # for which boto3 would ask a server before it signs anything
_KEY_ID = re.compile(r"[\x21-\x7e]{1,256}")


def _printable_ascii(value: SecretStr) -> SecretStr:
    if not _KEY_ID.fullmatch(value.get_secret_value()):
        raise ValueError("expected printable ASCII")
    return value


def _public_address(value: str) -> str:
    try:
        url = check_url(value)
    except AddressRefused as error:
        raise ValueError(str(error)) from None
    if url.query or url.fragment or "?" in value or "#" in value:
        raise ValueError("expected no query")
    return value.rstrip("/")


def _plain_bucket(value: str) -> str:
    if value.endswith(_SPECIAL_BUCKETS):
        raise ValueError("expected a general purpose bucket")
    return value


_Secret = Annotated[SecretStr, AfterValidator(_printable_ascii)]


def _field(alias: str, expected: str, **rules: Any) -> Any:
    return Field(alias=alias, json_schema_extra={"expected": expected}, **rules)


class S3Config(BaseModel):
    """Where and as whom to put a job's audio.

    Args:
        access_id, access_secret: credentials.
        bucket_name: the bucket.
        endpoint_url: of the service; None for Amazon's.
        region: of the bucket; None for what the address says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    access_id: _Secret = _field("accessId", "an access key, 1 to 256 printable characters")
    access_secret: _Secret = _field("accessSecret", "a secret key, 1 to 256 printable characters")
    bucket_name: Annotated[str, AfterValidator(_plain_bucket)] = _field(
        "bucketName", "the name of a general purpose bucket: letters, digits, '.', '_', '-'", pattern=_BUCKET
    )
    endpoint_url: Annotated[str, AfterValidator(_public_address)] | None = _field(
        "endpointUrl", "an address https://host of a public server, without port, user or query", default=None
    )
    region: str | None = _field("region", "a region such as eu-west-1", default=None, pattern=r"^[A-Za-z0-9-]{1,64}$")

    @property
    def known_region(self) -> str:
        """The region that requests are signed for."""
        host = (self.endpoint_url or "").partition("://")[2].partition("/")[0].lower()
        found = (match[1] for pattern in _REGIONS if (match := pattern.match(host)))
        return self.region or next(found, DEFAULT_REGION)

    @property
    def place(self) -> str:
        """The bucket, without secrets."""
        return f"{self.endpoint_url or 's3:/'}/{self.bucket_name}"


def parse_s3_config(given: object) -> S3Config:
    """Check what a job says of its bucket; a null counts as not given.

    Raises:
        JobError: invalid_request, naming the field, as in `s3Config.endpointUrl`.
    """
    if not isinstance(given, Mapping):
        raise JobError("invalid_request", f"{FIELD}: expected an object with {', '.join(_names())}", FIELD)
    fields = {name: value for name, value in given.items() if value is not None}
    for name in fields:
        if name not in _names():
            raise _unknown(str(name))
    try:
        return S3Config.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None


def _names() -> dict[str, str]:
    """What each of its fields is to be, by the client's names."""
    found = {}
    for field in S3Config.model_fields.values():
        assert field.alias is not None and isinstance(field.json_schema_extra, dict), field
        found[field.alias] = str(field.json_schema_extra["expected"])
    return found


def _unknown(name: str) -> JobError:
    nearest = difflib.get_close_matches(name, _names(), n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known fields: {', '.join(_names())}"
    return JobError("invalid_request", f"{FIELD}: holds a field that is not known; {hint}", FIELD)


def _first_problem(error: ValidationError) -> JobError:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(problem["loc"][0])
    found = ", it is missing" if problem["type"] == "missing" else ", got something else"
    return JobError("invalid_request", f"{FIELD}.{name}: expected {_names()[name]}{found}", f"{FIELD}.{name}")
