"""Kinds of workers and what they cost, from a table that people edit (scripts/prices.toml)."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SECONDS_PER_HOUR = 3600.0


class PlanError(Exception):
    """What was asked for cannot be planned; the message says why, and what would help."""


class Kind(BaseModel):
    """A kind of worker.

    Prices are US dollars. None stands for a price that nobody has filled in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    flex_per_s: float | None = Field(default=None, ge=0)
    active_per_s: float | None = Field(default=None, ge=0)
    pod_per_hour: float | None = Field(default=None, ge=0)
    memory_gb: float | None = Field(default=None, gt=0)
    gpus: tuple[str, ...] = ()
    vcpus: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _gpu_or_cpu(self) -> Self:
        if bool(self.gpus) == (self.vcpus is not None):
            raise ValueError("expected either gpus or vcpus")
        return self

    @property
    def always_on_per_s(self) -> float | None:
        """Dollars for a second of a worker that never stops."""
        return self.flex_per_s if self.active_per_s is None else self.active_per_s

    def at_price(self, usd_per_hour: float) -> Kind:
        """The same at one price for flex and active workers."""
        per_s = usd_per_hour / SECONDS_PER_HOUR
        return self.model_copy(update={"flex_per_s": per_s, "active_per_s": per_s})


class Prices(BaseModel):
    """The table, with where and when its figures were read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    url: str
    read: datetime.date
    kinds: dict[str, Kind]


def read_prices(path: Path) -> Prices:
    """Read a table.

    Raises:
        PlanError: when it cannot be read, naming what is wrong where.
    """
    try:
        return Prices.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error
    except ValidationError as error:
        raise PlanError(f"{path}: {first_mistake(error)}") from error


def first_mistake(error: ValidationError) -> str:
    """Where it is and what was expected, as `kinds.ADA_24.vcpus: …`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
