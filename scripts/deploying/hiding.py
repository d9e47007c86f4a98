"""Secrets, and keeping them out of what is printed.

Shown of environment variables are those that the worker's settings know and do not keep secret, and references to
RunPod's secrets. The values of all others stay hidden, deployed ones too: nobody knows what they hold. In sentences,
which may repeat what was sent, they are hidden as well, however JSON has escaped them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from pydantic import SecretStr

from jobs.settings import Settings

HIDDEN = "•••"
LEAST_LENGTH, LEAST_PIECE = 4, 8
"""A shorter secret, or piece of one, would be found in half of all words."""

PLATFORM_SECRET = re.compile(r"\{\{\s*RUNPOD_SECRET_\w+\s*\}\}")
_LOOKS_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH")
_URL_WITH_SECRET = re.compile(r"://.*[@?#]", re.DOTALL)
"""A password may hold any character, so what looks like a path may be one; a query may be a signature."""
_IN_URL = re.compile(r"://[^@]*?:([^@]+)@|[?&#][^=&#]*=([^&#]+)")
"""Its password, and what its query says."""
_NO_WORD = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{8}|.{20}", re.DOTALL)
"""Eight characters with a digit and a letter, or twenty of any: too many for a word that may stand elsewhere too."""
_SHORT = {"\n": "n", "\r": "r", "\t": "t", "\b": "b", "\f": "f"}


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
    return name in setting_names() and not is_secret_name(name) and not _URL_WITH_SECRET.search(value)


class Secrets:
    """All secret values that a run has met.

    Args:
        values: the first of them.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._values: set[str] = set()
        self._named: set[tuple[str, str]] = set()
        self.add(*values)

    def add(self, *values: str) -> None:
        """Values that are hidden wherever they stand, and in pieces too."""
        for value in values:
            self._values |= {each for each in (value,) if len(each) >= LEAST_LENGTH}
            self._values |= {each for each in _pieces(value) if len(each) >= LEAST_PIECE}

    def add_env(self, env: Mapping[str, str]) -> None:
        """Those variables that must not be shown.

        One that looks like a word (MODE = "turbo") is hidden where its variable is named; elsewhere it is a word.
        """
        for name, value in env.items():
            if not value or may_be_shown(name, value):
                continue
            if len(value) >= LEAST_LENGTH and _looks_secret(name, value):
                self.add(value)
            else:
                self._named.add((name, value))

    def hide(self, text: str) -> str:
        """The text without any of them."""
        for value in sorted(self._values, key=len, reverse=True):
            text = re.sub(_escaped(value), HIDDEN, text)
        named = [value for name, value in self._named if re.search(rf"\b{re.escape(name)}\b", text)]
        for value in sorted(named, key=len, reverse=True):
            text = re.sub(rf"(?<!\w){_escaped(value)}(?!\w)", HIDDEN, text)
        return text


def _looks_secret(name: str, value: str) -> bool:
    return bool(is_secret_name(name) or _NO_WORD.match(value) or _URL_WITH_SECRET.search(value))


def _pieces(value: str) -> Iterator[str]:
    """What a message may quote of a secret: a line of a key, the password of an address."""
    if "\n" in value:
        yield from (line.strip() for line in value.splitlines())
    for found in _IN_URL.finditer(value):
        yield from filter(None, found.groups())


def _escaped(value: str) -> str:
    """A pattern of a value as it is, and as JSON or Python write it, once or several times over."""
    return "".join(map(_escaped_character, value))


def _escaped_character(character: str) -> str:
    code = character.encode("utf-16-be")
    units = [code[at : at + 2].hex() for at in range(0, len(code), 2)]  # beyond U+FFFF, JSON takes two
    forms = ["".join(rf"\\+u(?i:{unit})" for unit in units)]
    if ord(character) < 256:
        forms.append(rf"\\+x(?i:{ord(character):02x})")
    if len(units) > 1:
        forms.append(rf"\\+U(?i:{ord(character):08x})")
    if character in _SHORT:
        forms.append(rf"\\+{_SHORT[character]}")
    forms.append(r"\\+" if character == "\\" else rf"\\*{re.escape(character)}")
    return f"(?:{'|'.join(forms)})"
