"""File names from keys: safe on every file system, and never outside their folder."""

from __future__ import annotations

import hashlib
import re
import unicodedata

MAX_STEM_BYTES = 120
"""File systems take 255 bytes; there is an extension behind, and a book's parts have a number before it."""

PARTS = "-parts"
"""Behind the name of a folder with a text's parts: no file of another row is called so."""

_UNSAFE = re.compile(r"[^\w.-]+")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)
"""Names that Windows keeps for devices, whatever extension stands behind them."""


def stem_of(key: str) -> str:
    """A readable file name without extension. Different keys may have the same."""
    text = _UNSAFE.sub("-", unicodedata.normalize("NFC", key)).replace("..", ".").strip(".-")
    while len(text.encode()) > MAX_STEM_BYTES:
        text = text[:-1].rstrip(".-")
    if not text:
        return digest(key)
    return f"_{text}" if _RESERVED.fullmatch(text.partition(".")[0]) else text


def distinct_stem_of(key: str, number: int) -> str:
    """Others, of which hardly any other key has the first."""
    return f"{stem_of(key)}-{digest(key)}" + (f"-{number}" if number > 1 else "")


def folded(stem: str) -> str:
    """What names have in common that a file system may take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", stem).casefold())


def digest(text: str) -> str:
    """Short, of any text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()
