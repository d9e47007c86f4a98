"""Secrets, and keeping them out of what is printed.

Shown of environment variables are those that the worker's settings know and do not keep secret, and references to
RunPod's secrets. The values of all others stay hidden, deployed ones too: nobody knows what they hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import get_args

from pydantic import SecretStr

from jobs.settings import Settings

HIDDEN = "•••"
LEAST_LENGTH = 4
"""A shorter one would be found in half of all words."""

PLATFORM_SECRET = re.compile(r"\{\{\s*RUNPOD_SECRET_\w+\s*\}\}")
_LOOKS_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH")
_URL_WITH_PASSWORD = re.compile(r"://[^/\s@]+@")


def setting_names() -> dict[str, bool]:
    """The worker's variables, and whether each is secret."""
    return {
        name.upper(): SecretStr in (field.annotation, *get_args(field.annotation))
        for name, field in Settings.model_fields.items()
    }


def is_platform_secret(value: str) -> bool:
    """Whether a value is nothing but a reference that RunPod resolves."""
    return PLATFORM_SECRET.fullmatch(value.strip()) is not None


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    settings = setting_names()
    return settings[name] if name in settings else _LOOKS_SECRET.search(name.upper()) is not None


def may_be_shown(name: str, value: str) -> bool:
    """Whether an environment variable's value may be printed."""
    if is_platform_secret(value):
        return True
    return name in setting_names() and not is_secret_name(name) and not _URL_WITH_PASSWORD.search(value)


class Secrets:
    """All secret values that a run has met.

    Args:
        values: the first of them.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._values: set[str] = set()
        self.add(*values)

    def add(self, *values: str) -> None:
        self._values |= {value for value in values if len(value) >= LEAST_LENGTH}

    def add_env(self, env: Mapping[str, str]) -> None:
        """Those of deployed variables that must not be shown."""
        self.add(*(value for name, value in env.items() if not may_be_shown(name, value)))

    def hide(self, text: str) -> str:
        """The text without any of them."""
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, HIDDEN)
        return text
