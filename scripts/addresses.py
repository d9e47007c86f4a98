"""Where a key may be sent, and what can be one. No message here shows a key, or an address, which may hold one."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(.*@)?(\[[0-9A-Fa-f:.]+]|[A-Za-z0-9._-]+)(:[0-9]*)?")


def checked_url(url: str) -> str:
    """An address that a key can be sent to, as it was given.

    Raises:
        ValueError: it is not https:// (http:// is for this machine only), names a user, or different programs could
            read different hosts in it. The message says what was expected.
    """
    parts = _parts(url)
    if parts is None:
        raise ValueError("expected an address such as https://host/path, of ASCII characters without spaces")
    if "@" in parts.netloc:
        raise ValueError("expected an address without a user or password in it")
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _THIS_MACHINE):
        return url
    raise ValueError("expected an address with https://; over http the key is sent to this machine only")


def is_this_machine(url: str) -> bool:
    """Whether an address is of this machine, so behind no proxy. Not of one that merely begins like it."""
    parts = _parts(url)
    return parts is not None and parts.hostname in _THIS_MACHINE


def checked_key(key: str) -> str:
    """A key as a header can carry it, without the line end that comes with one from a file.

    Raises:
        ValueError: it is none. The message does not show it.
    """
    key = key.strip()
    if not key or any(not "!" <= character <= "~" for character in key):
        raise ValueError("the key holds characters that no key has")
    return key


def _parts(url: str) -> SplitResult | None:
    """None for what is no address, or not the same one to everybody: some drop line ends, some take \\ for /."""
    if any(not "!" <= character <= "~" for character in url):
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises as it is read
    except ValueError:
        return None
    return parts if _HOST.fullmatch(parts.netloc) else None
