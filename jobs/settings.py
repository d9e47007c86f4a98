"""What a deployment can set, read from the environment once, at start.

Each setting is a field below, its environment variable the field's name in capitals, and its
description a row of the README's table (`settings_table`). An empty variable counts as not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.models import DRAFT, MODELS

LOCAL_DEFAULTS: Mapping[str, Any] = {
    "model": DRAFT,
    "max_result_bytes": 0,
    "job_timeout_s": 0.0,
    "log_format": "text",
}
"""What differs in local test mode, where there is no platform to set limits. An explicit setting wins."""

_USED_WITH_A_BUCKET = ("bucket_endpoint_url", "bucket_region", "bucket_access_key_id", "bucket_secret_access_key")
_USED_WITH_BUCKET_NAME = ("bucket_prefix",)

_UpperCase = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)


class SettingsError(ValueError):
    """The environment holds values that the worker cannot run with; the message lists them."""


class Settings(BaseSettings):
    """The worker's settings. Frozen: nothing changes them after the start."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    model: str = Field(default="turbo", description=f"Model to serve: {', '.join([*MODELS, DRAFT])}")
    model_dir: Path | None = Field(
        default=None, description="Folder with the model's weights, such as a fine-tune; MODEL then names its family"
    )
    model_revision: str | None = Field(
        default=None, description="Hugging Face revision (commit, tag or branch) of the weights"
    )
    verify_weights: bool = Field(
        default=False,
        description="Compare the weights with the hashes recorded when they were fetched, at each start (some seconds "
        "per GB); off: their sizes only",
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of the models: auto, float32, bfloat16, float16 (T3 on x86 CPUs)",
    )
    max_concurrency: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="Jobs one worker takes at a time and decodes together; the rest wait in the endpoint's queue",
    )
    streaming: bool = Field(
        default=False,
        description="Answer every job with pieces on /stream, heard while the rest is made; off: with one result",
    )
    voices_dir: Path | None = Field(
        default=None, description="Folder of the voice library, such as one on a network volume that all workers share"
    )
    voices_uri: str | None = Field(
        default=None,
        description="Where the voice library is, instead of VOICES_DIR: a folder, file:///folder or s3://bucket/prefix",
    )
    default_voice: str | None = Field(
        default=None,
        description="Id or name of the voice of jobs that name none; not set means the model's built-in voice",
    )
    preload_voices: str | None = Field(
        default=None,
        description="Voices made ready in the background at start: ids or names with commas between them, or a number "
        "for so many of the most used",
    )
    voices_cache_bytes: int = Field(
        default=512 << 20,
        ge=0,
        description="Most memory for the library's voices, bytes: half of it for recordings, half for what the model "
        "made of them",
    )
    max_voices: int | None = Field(
        default=None, ge=1, description="At how many voices saving another is refused; not set for no limit"
    )
    work_dir: str | None = Field(
        default=None,
        description="Where `long_form` jobs keep what is spoken, so that the same job sent again, to any worker, goes "
        "on from there, and where results are kept (RESULTS_MAX_AGE_H): a folder, such as one on a network volume, or "
        "s3://bucket/prefix",
    )
    work_max_age_h: float = Field(
        default=72.0, ge=1.0, le=87_600.0, description="After how many hours what a long job keeps is removed"
    )
    work_max_bytes: int = Field(
        default=20_000_000_000,
        ge=1_000_000,
        description="Most that long jobs keep, bytes, and as much again of results; the oldest is removed first",
    )
    results_max_age_h: float = Field(
        default=24.0,
        ge=1.0,
        le=87_600.0,
        description="For how many hours the result of a job with an `idempotency_key` is kept: in WORK_DIR, else in "
        "the bucket",
    )
    bucket_endpoint_url: str | None = Field(
        default=None, description="S3 endpoint of BUCKET_NAME, VOICES_URI and WORK_DIR, where it is not Amazon's"
    )
    bucket_region: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9-]+$", description="Its region; not set means what boto3 finds by itself"
    )
    bucket_name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{1,254}$",
        description="S3 bucket for audio that is larger than MAX_RESULT_BYTES, or of jobs with `delivery` s3; the "
        "result then holds an address",
    )
    bucket_prefix: str = Field(
        default="",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*/?)*$",
        max_length=200,
        description="Beginning of the names of all objects in BUCKET_NAME, such as `speech/`",
    )
    bucket_url_lifetime_s: int = Field(
        default=86_400, ge=60, le=604_800, description="For how long an address can be used, seconds; a week at most"
    )
    bucket_access_key_id: SecretStr | None = Field(
        default=None, description="S3 access key; not set means what boto3 finds by itself"
    )
    bucket_secret_access_key: SecretStr | None = Field(default=None, description="S3 secret key")
    reference_buckets: str | None = Field(
        default=None,
        description="S3 buckets that jobs may name recordings in, with commas between them; not set means BUCKET_NAME, "
        "a comma alone none",
    )
    fetch_timeout_s: float = Field(
        default=30.0, ge=1.0, le=3_600.0, description="How long fetching a recording from its address may take, seconds"
    )
    max_text_chars: int = Field(
        default=5_000, ge=1, le=500_000, description="Longest text of a `tts` or `voice_clone` job, characters"
    )
    max_long_form_chars: int = Field(
        default=500_000, ge=1, le=10_000_000, description="Longest text of a `long_form` job, all segments together"
    )
    max_reference_bytes: int = Field(
        default=64_000_000, ge=1_000, le=2**31, description="Largest recording, bytes after base64 decoding"
    )
    max_reference_s: float = Field(
        default=600.0, ge=1.0, le=36_000.0, description="Longest reference recording, seconds"
    )
    max_input_s: float = Field(
        default=600.0, ge=1.0, le=36_000.0, description="Longest recording of a `voice_conversion` job, seconds"
    )
    max_result_bytes: int = Field(
        default=10_000_000,
        ge=0,
        description="Largest result, bytes of JSON; 0 for no limit. The platform loses results over 10 MB from /run "
        "and over 20 MB from /runsync (no limit in local test mode)",
    )
    job_timeout_s: float = Field(
        default=600.0,
        ge=0.0,
        description="The endpoint's execution timeout, seconds; a job stops shortly before it with `timed_out`. "
        "0 for none (none in local test mode)",
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], _UpperCase] = Field(
        default="INFO", description="DEBUG, INFO, WARNING, ERROR or CRITICAL"
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="Form of the log's lines: json, an object each, or text (text in local test mode)"
    )
    log_content: bool = Field(
        default=False,
        description="Let the log quote what clients sent: the beginning of each text, errors in full. Never "
        "recordings, secrets of this worker or queries of URLs",
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port on which Prometheus finds figures of jobs and engine, on all interfaces; 0 for one that is "
        "free, which the log names; not set for none",
    )

    @model_validator(mode="after")
    def _one_library(self) -> Settings:
        if str(self.voices_dir).startswith("s3:"):
            raise ValueError("VOICES_DIR: expected a folder; a bucket is set with VOICES_URI")
        both = self.voices_dir is not None and self.voices_uri is not None
        if both and Path((self.voices_uri or "").removeprefix("file://")) != self.voices_dir:
            raise ValueError("VOICES_DIR and VOICES_URI name different libraries; set one of them")
        return self

    @property
    def voices_location(self) -> str | None:
        """Folder or URI of the voice library; None where there is none."""
        return self.voices_uri or (None if self.voices_dir is None else str(self.voices_dir))

    @property
    def preloaded(self) -> tuple[str, ...] | int:
        """PRELOAD_VOICES: names, or how many of the most used."""
        wanted = [name.strip() for name in (self.preload_voices or "").split(",") if name.strip()]
        return int(wanted[0]) if len(wanted) == 1 and wanted[0].isdecimal() else tuple(wanted)

    @property
    def allowed_reference_buckets(self) -> frozenset[str]:
        """REFERENCE_BUCKETS, or what stands in for it."""
        names = (self.bucket_name or "") if self.reference_buckets is None else self.reference_buckets
        return frozenset(name.strip() for name in names.split(",")) - {""}

    def for_local_test(self) -> Settings:
        """These settings with `LOCAL_DEFAULTS` where the environment says nothing."""
        unset = {name: value for name, value in LOCAL_DEFAULTS.items() if name not in self.model_fields_set}
        return self.model_copy(update=unset)

    @property
    def unused(self) -> list[str]:
        """Variables that are set and mean nothing without others."""
        has_bucket = any((place or "").startswith("s3:") for place in (self.voices_uri, self.work_dir))
        has_bucket |= bool(self.allowed_reference_buckets)
        has_bucket |= self.bucket_name is not None
        names = [] if has_bucket else [*_USED_WITH_A_BUCKET]
        names += [] if self.bucket_name else [*_USED_WITH_BUCKET_NAME]
        return [name.upper() for name in names if getattr(self, name)]

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits that a job can run into, as `info` reports them."""
        names = (
            "max_text_chars",
            "max_long_form_chars",
            "max_reference_bytes",
            "max_reference_s",
            "max_input_s",
            "max_result_bytes",
            "job_timeout_s",
            "max_concurrency",
            "max_voices",
        )
        return {name: getattr(self, name) for name in names}


def read_settings() -> Settings:
    """Read the environment.

    Raises:
        SettingsError: naming every variable at fault, without showing values of secrets.
    """
    try:
        return Settings()
    except ValidationError as error:
        lines = [": ".join(filter(None, (_variable(problem), problem["msg"]))) for problem in error.errors()]
        raise SettingsError("; ".join(lines)) from None


def _variable(problem: ErrorDetails) -> str:
    """The variable that is at fault; nothing where several are, which the message then names."""
    return ".".join(map(str, problem["loc"])).upper()


def settings_table() -> str:
    """The settings as a Markdown table: variable, default, meaning."""
    rows = [
        f"| `{name.upper()}` | {_default_text(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def _default_text(field: FieldInfo) -> str:
    if field.default in (None, ""):
        return "–"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
