"""What voices may be called, and which files that gives.

Ids become parts of paths and object keys, so they are plain ASCII without separators or dots. Names are
for people: Unicode, kept as metadata only, and turned into paths by hashing. Nothing a caller says ever
reaches a path in another way.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

from voice_library.errors import LibraryError

MAX_NAME_CHARS = 100
MAX_ID_CHARS = 64

_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_ID_CHARS - 1}}}")
_JOINERS = "\u200c\u200d"
"""Zero-width joiners belong to the spelling of Persian, Indic scripts and emoji; other invisible characters do not."""
_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories of control, invisible, half and unassigned characters and of line ends."""
_SLUG_CHARS = 40
_ID_HASH_CHARS = 8


def check_id(voice_id: object, field: str = "voice_id") -> str:
    """The id, if it is one.

    Raises:
        LibraryError: invalid_request.
    """
    if isinstance(voice_id, str) and _ID.fullmatch(voice_id):
        return voice_id
    raise LibraryError(
        "invalid_request",
        f"expected an id of 1 to {MAX_ID_CHARS} letters a-z, digits, '-' and '_', starting with a letter or digit, "
        f"got {_shown(voice_id)}",
        field,
    )


def check_name(name: object, field: str = "name") -> str:
    """The name in Unicode's composed form (NFC), without surrounding spaces.

    Raises:
        LibraryError: invalid_request, for an empty or long name, control characters and path tricks.
    """
    if not isinstance(name, str):
        raise LibraryError("invalid_request", f"expected a name, got {_shown(name)}", field)
    if len(name) > 4 * MAX_NAME_CHARS:  # before normalising, which takes time on long input
        raise LibraryError("invalid_request", f"expected a name of at most {MAX_NAME_CHARS} characters", field)
    composed = unicodedata.normalize("NFC", name).strip()
    problem = _name_problem(composed)
    if problem:
        raise LibraryError("invalid_request", f"expected a name {problem}, got {_shown(name)}", field)
    return composed


def _name_problem(name: str) -> str | None:
    if not name.strip(_JOINERS):
        return "that is not empty"
    if len(name) > MAX_NAME_CHARS:
        return f"of at most {MAX_NAME_CHARS} characters"
    if any(char in "/\\" for char in name) or name.startswith("."):
        return "without '/' or '\\' that does not start with '.'"
    if has_refused_char(name):
        return "without control or invisible characters"
    return None


def has_refused_char(text: str) -> bool:
    """Whether something in a line of text has no place in a text for people."""
    return not text.isprintable() and any(is_refused_char(char) for char in text)


def is_refused_char(char: str) -> bool:
    """Whether a character is one for control, invisible, half or unassigned."""
    return unicodedata.category(char) in _REFUSED_CATEGORIES and char not in _JOINERS


def fold(name: str) -> str:
    """What names that differ only in case have in common (Unicode's canonical caseless matching, D145)."""
    decomposed = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", decomposed))


def make_id(name: str, audio_hash: str, attempt: int = 0) -> str:
    """An id for a voice that was given none: a readable part and a hash of name and audio.

    Equal names with equal audio give equal ids on any machine; `attempt` gives others, for when one is taken.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii").lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_name)[:_SLUG_CHARS].strip("-")
    return f"{slug or 'voice'}-{text_hash(f'{name}/{audio_hash}/{attempt}')[:_ID_HASH_CHARS]}"


def text_hash(text: str) -> str:
    """A path-safe stand-in for any text: 32 hex digits, alike on any machine."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _shown(value: object) -> str:
    """A value in a message: short, and harmless to print (ascii escapes halves of surrogate pairs too)."""
    text = repr(value) if isinstance(value, str) and not has_refused_char(value[:60]) else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
