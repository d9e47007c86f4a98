"""What RunPod answers about an endpoint, checked before anything is read of it.

Shapes are those of the REST API v2 (https://docs.runpod.io/api-reference-v2/openapi.json), all optional but the id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from scripts.deploying.files import DeployError, as_text


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="allow")


class _Gpu(_Answer):
    pools: list[str] | None = None
    excluded_types: list[str] | None = None
    count: int | None = None
    allowed_cuda_versions: list[str] | None = None
    min_cuda_version: str | None = None


class _Cpu(_Answer):
    id: str
    vcpu_count: int


class _Workers(_Answer):
    min: int | None = None
    max: int | None = None
    idle_timeout: int | None = None


class _Scaling(_Answer):
    type: str | None = None
    queue_delay: float | None = Field(default=None, allow_inf_nan=False)
    request_count: int | None = None


def _env_text(value: object) -> object:
    return "" if value is None else as_text(value)


class _Endpoint(_Answer):
    """What is read of an answer; the rest is let through."""

    id: str = Field(pattern=r"^[\w-]+$")
    name: str | None = None
    type: str | None = None
    image: str | None = None
    gpu: _Gpu | None = None
    cpu: list[_Cpu] | None = None
    workers: _Workers | None = None
    scaling: _Scaling | None = None
    timeout: int | None = None
    flashboot: str | None = None
    disk: int | None = None
    data_center_ids: list[str] | None = None
    network_volumes: list[str] | None = None
    registry: str | None = None
    env: dict[str, Annotated[str, BeforeValidator(_env_text)]] | None = None
    request_urls: dict[str, Any] | None = None


def checked_endpoint(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer, once it is known to be readable.

    Raises:
        DeployError: naming what is not as documented; never a value, which may be a secret.
    """
    try:
        return _Endpoint.model_validate(answer).model_dump(by_alias=True, exclude_unset=True)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_input=False)]
        raise DeployError(
            f"endpoint {answer.get('name')}: the answer is not what RunPod's REST API v2 gives: {'; '.join(wrong)}"
        ) from None
