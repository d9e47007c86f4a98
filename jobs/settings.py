"""What a deployment can set, read from the environment once, at start.

Each setting is a field below, its environment variable the field's name in capitals, and its
description a row of the README's table (`settings_table`). An empty variable counts as not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.models import DRAFT, MODELS

LOCAL_DEFAULTS: Mapping[str, Any] = {"model": DRAFT, "max_result_bytes": 0, "job_timeout_s": 0.0}
"""What differs in local test mode, where there is no platform to set limits. An explicit setting wins."""

_NOT_YET_USED = (
    "voices_dir",
    "work_dir",
    "bucket_endpoint_url",
    "bucket_name",
    "bucket_access_key_id",
    "bucket_secret_access_key",
)

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
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of the models: auto, float32, bfloat16, float16 (x86 CPUs: slow to load, fast)",
    )
    max_concurrency: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="Jobs one worker takes at a time and decodes together; the rest wait in the endpoint's queue",
    )
    streaming: bool = Field(default=False, description="Serve streams of pieces. Not built yet: must be off")
    voices_dir: Path | None = Field(default=None, description="Folder of the voice library. Not built yet")
    default_voice: str | None = Field(
        default=None, description="Voice of jobs that name none; not set means the model's built-in voice"
    )
    work_dir: Path | None = Field(default=None, description="Folder for checkpoints of long jobs. Not built yet")
    bucket_endpoint_url: str | None = Field(default=None, description="S3 endpoint for results. Not built yet")
    bucket_name: str | None = Field(default=None, description="S3 bucket for results. Not built yet")
    bucket_access_key_id: SecretStr | None = Field(default=None, description="S3 access key. Not built yet")
    bucket_secret_access_key: SecretStr | None = Field(default=None, description="S3 secret key. Not built yet")
    max_text_chars: int = Field(default=5_000, ge=1, le=500_000, description="Longest text of a `tts` job, characters")
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

    @field_validator("streaming")
    @classmethod
    def _not_streaming(cls, value: bool) -> bool:
        if value:
            raise ValueError("this version does not stream yet; leave STREAMING off")
        return value

    def for_local_test(self) -> Settings:
        """These settings with `LOCAL_DEFAULTS` where the environment says nothing."""
        unset = {name: value for name, value in LOCAL_DEFAULTS.items() if name not in self.model_fields_set}
        return self.model_copy(update=unset)

    @property
    def unused(self) -> list[str]:
        """Variables that are set although this version does not use them yet."""
        return [name.upper() for name in _NOT_YET_USED if getattr(self, name) is not None]

    @property
    def limits(self) -> dict[str, float]:
        """The limits that a job can run into, as `info` reports them."""
        names = (
            "max_text_chars",
            "max_reference_bytes",
            "max_reference_s",
            "max_input_s",
            "max_result_bytes",
            "job_timeout_s",
            "max_concurrency",
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
        lines = [f"{'.'.join(map(str, problem['loc'])).upper()}: {problem['msg']}" for problem in error.errors()]
        raise SettingsError("; ".join(lines)) from None


def settings_table() -> str:
    """The settings as a Markdown table: variable, default, meaning."""
    rows = [
        f"| `{name.upper()}` | {_default_text(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def _default_text(field: FieldInfo) -> str:
    if field.default is None:
        return "–"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
