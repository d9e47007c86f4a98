"""An endpoint's file: TOML, read strictly, and checked against what the worker will make of it."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from engine.models import DRAFT, MODELS
from jobs.settings import Settings
from scripts.deploying.hiding import PLATFORM_SECRET, Secrets, is_platform_secret, is_secret_name, setting_names

VOLUME_FOLDER = "/runpod-volume"
"""Where a serverless worker finds its network volume."""
DEFAULT_EXECUTION_TIMEOUT_S = 600
_FLASHBOOT_MARK = " -fb"
"""RunPod's console appends it to the name of an endpoint with FlashBoot."""
_FROM_ENVIRONMENT = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class DeployError(Exception):
    """What was asked for cannot be done; the message says why, and what would help."""


def base_name(name: str) -> str:
    """A name without what RunPod's console appends, nor blanks around it."""
    name = name.strip()
    while name.endswith(_FLASHBOOT_MARK):
        name = name.removesuffix(_FLASHBOOT_MARK).strip()
    return name


def as_text(value: object) -> object:
    """4 → "4", true → "true": variables are text, whatever TOML makes of them."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


Env = dict[str, Annotated[str, BeforeValidator(as_text)]]
_Version = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
_Cpu = Annotated[str, Field(pattern=r"^cpu\w+-\d+$")]
_Name = Annotated[str, BeforeValidator(lambda value: base_name(value) if isinstance(value, str) else value)]
_Int = Annotated[int, Field(strict=True)]  # true is no 1
_Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Several = Annotated[tuple[str, ...], AfterValidator(lambda values: tuple(dict.fromkeys(values)))]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Workers(_Part):
    """How many workers there are, and how long one without jobs stays."""

    min: _Int | None = Field(default=None, ge=0)
    max: _Int | None = Field(default=None, ge=1)
    idle_timeout_s: _Int | None = Field(default=None, ge=1, le=3600)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is over max ({self.max})")
        return self


class Scaler(_Part):
    """When there are more workers: after so many seconds of waiting, or for so many requests."""

    type: Literal["queue_delay", "request_count"] | None = None
    value: _Float | None = Field(default=None, ge=0.5)

    @model_validator(mode="after")
    def _whole_requests(self) -> Self:
        if self.type == "request_count" and self.value is not None and (self.value < 1 or self.value % 1):
            raise ValueError(f"value: expected a whole number of requests, got {self.value:g}")
        return self


class EndpointFile(_Part):
    """What a file says. None is left to a default at first, and as it is afterwards."""

    name: _Name = Field(min_length=1, max_length=191)
    image: str = Field(min_length=1)
    gpus: _Several = ()
    exclude_gpus: _Several | None = None
    gpus_per_worker: _Int | None = Field(default=None, ge=1)
    cpus: tuple[_Cpu, ...] = ()
    cuda: tuple[_Version, ...] | None = None
    min_cuda: _Version | None = None
    container_disk_gb: _Int | None = Field(default=None, ge=1)
    network_volume: str | None = None
    data_centers: _Several | None = None
    registry: str | None = None
    execution_timeout_s: _Int | None = Field(default=None, ge=5, le=604_800)
    flashboot: StrictBool | None = None
    workers: Workers = Workers()
    scaler: Scaler = Scaler()
    env: Env = Field(default_factory=dict)
    other_env: Env = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.gpus) == bool(self.cpus):
            raise ValueError('expected either gpus = ["AMPERE_24"] or cpus = ["cpu5c-4"]')
        if self.cpus and (self.exclude_gpus or self.cuda is not None or self.min_cuda):
            raise ValueError("exclude_gpus, cuda and min_cuda are for gpus")
        if self.cuda and self.min_cuda:
            raise ValueError("expected either cuda or min_cuda")
        if self.scaler.type == "request_count" and self.workers.idle_timeout_s is not None:
            raise ValueError("workers.idle_timeout_s: RunPod takes none together with the request_count scaler")
        for name, value in self:
            if name not in ("env", "other_env") and _FROM_ENVIRONMENT.search(str(value)):
                raise ValueError(f"{name}: ${{NAME}} is for [env] and [other_env]")
        return self

    @property
    def whole_env(self) -> dict[str, str]:
        return {**self.env, **self.other_env}


def read_file(path: Path, environ: Mapping[str, str], secrets: Secrets) -> EndpointFile:
    """Read a file, with variables of the caller's environment in place of ${NAME}.

    Args:
        environ: the caller's environment.
        secrets: gets to know every value that came from there, and all that must not be shown.

    Raises:
        DeployError: naming all that is wrong with it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise DeployError(f"{path}: {error}") from error
    try:
        written = EndpointFile.model_validate(content)
    except ValidationError as error:
        raise DeployError(f"{path}: {'; '.join(_mistakes(error))}") from None
    _refuse_written_secrets(path, written)
    resolved = {part: _resolve(getattr(written, part), environ, secrets) for part in ("env", "other_env")}
    file = written.model_copy(update=resolved)
    secrets.add_env(file.whole_env)  # before a message can hold one
    wrong = list(_wrong_env(file))
    if wrong:
        raise DeployError(f"{path}: {'; '.join(wrong)}")
    return file


def _mistakes(error: ValidationError) -> Iterator[str]:
    """Each mistake in words; never the value, which may be a secret."""
    for each in error.errors(include_input=False):
        where = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            message = "unknown" + _near(where, _keys(EndpointFile))
        yield f"{where}: {message}" if where else message


def _keys(model: type[BaseModel]) -> Iterator[str]:
    """All keys of a file, those of its tables with the table's name."""
    for name, field in model.model_fields.items():
        yield name
        part = field.annotation
        if isinstance(part, type) and issubclass(part, _Part):
            yield from (f"{name}.{inner}" for inner in part.model_fields)


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {found[0]}?" if found else ""


# ------------------------------------------------------------------------------------- environment


def _refuse_written_secrets(path: Path, file: EndpointFile) -> None:
    for name, value in file.whole_env.items():
        stands_for = _FROM_ENVIRONMENT.fullmatch(value) or is_platform_secret(value)
        if is_secret_name(name) and value and not stands_for:
            raise DeployError(
                f"{path}: {name}: a secret does not belong into a file. Write ${{{name}}} to take it from your "
                "environment, or {{ RUNPOD_SECRET_name }} for one that RunPod keeps"
            )


def _resolve(env: Mapping[str, str], environ: Mapping[str, str], secrets: Secrets) -> dict[str, str]:
    """${NAME} → what it is in the caller's environment."""

    resolved = {}
    for name, value in env.items():
        for variable in _FROM_ENVIRONMENT.findall(value):
            if not environ.get(variable):
                raise DeployError(f"{name}: ${{{variable}}} is not set in your environment")
            secrets.add(environ[variable])
        resolved[name] = _FROM_ENVIRONMENT.sub(lambda match: environ[match[1]], value)
        if resolved[name] != value:
            secrets.add(resolved[name])
    return resolved


def _wrong_env(file: EndpointFile) -> Iterator[str]:
    """What is wrong with the variables."""
    known = setting_names()
    for name in file.env.keys() - known.keys():
        hint = _near(name.upper(), known) or ". A variable that is not the worker's own belongs into [other_env]"
        yield f"env.{name}: no setting of the worker{hint}"
    for name in file.other_env:
        if not _NAME.fullmatch(name):
            yield f"other_env.{name}: expected letters, digits and _"
        if name.upper() in known:
            yield f"other_env.{name}: a setting of the worker, it belongs into [env]"
    for name, value in file.whole_env.items():
        if "RUNPOD_SECRET_" in PLATFORM_SECRET.sub("", value):
            yield f"{name}: expected {{{{ RUNPOD_SECRET_name }}}} for a secret that RunPod keeps"
    yield from _wrong_settings(file)


class _FileSettings(Settings):
    """The settings of a file alone, without what happens to be in this environment."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _settings(env: Mapping[str, str]) -> Settings:
    """What the worker will read; a reference to a secret counts as not set, as nobody here knows its value."""
    known = {
        name.lower(): value
        for name, value in env.items()
        if name in setting_names() and value and not PLATFORM_SECRET.search(value)
    }
    return _FileSettings(**known)  # type: ignore[arg-type]  # text, as from the environment


def _wrong_settings(file: EndpointFile) -> Iterator[str]:
    try:
        settings = _settings(file.env)
    except ValidationError as error:
        for each in error.errors(include_input=False):
            yield ": ".join(filter(None, (".".join(map(str, each["loc"])).upper(), each["msg"])))
        return
    if settings.model not in (*MODELS, DRAFT):
        yield f"MODEL: expected one of {', '.join(MODELS)}, got {settings.model!r}"
    if file.cpus and settings.device.startswith("cuda"):
        yield f"DEVICE: {settings.device} on workers without a GPU"
    yield from jobs_too_long(file, file.execution_timeout_s)


def jobs_too_long(file: EndpointFile, execution_timeout_s: float | None) -> Iterator[str]:
    """What is wrong when an endpoint has this timeout (None: not known)."""
    job_timeout_s = _settings(file.env).job_timeout_s
    if execution_timeout_s is not None and job_timeout_s > execution_timeout_s:
        yield (
            f"JOB_TIMEOUT_S: {job_timeout_s:g} s are over execution_timeout_s ({execution_timeout_s:g} s), "
            f"where RunPod ends a job without a result. Set JOB_TIMEOUT_S = {execution_timeout_s:g}"
        )


def warnings(file: EndpointFile, execution_timeout_s: float | None) -> Iterator[str]:
    """What is allowed, and probably not meant, in an endpoint of this timeout (None: not known)."""
    settings = _settings(file.env)
    if settings.job_timeout_s == 0:
        yield "JOB_TIMEOUT_S is 0: a job that takes too long is ended by RunPod, without a result"
    elif execution_timeout_s is not None and settings.job_timeout_s < execution_timeout_s:
        yield f"JOB_TIMEOUT_S ends jobs after {settings.job_timeout_s:g} s, the endpoint {execution_timeout_s:g} s"
    if settings.model == DRAFT:
        yield "MODEL is draft: the worker's image does not have it, and jobs will end with model_unavailable"
    if file.gpus and settings.device == "cpu":
        yield "DEVICE is cpu on workers with a GPU"
    on_volume = [
        name for name, value in file.env.items() if value.startswith(VOLUME_FOLDER) and file.network_volume is None
    ]
    if on_volume:
        yield f"{', '.join(on_volume)}: {VOLUME_FOLDER} without a network_volume is each worker's own, and lost with it"
