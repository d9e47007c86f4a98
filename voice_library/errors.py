"""The one error that leaves the voice library.

Callers branch on `code`, people read `message`, `field` names the argument at fault, and `suggestions`
are names that the caller may have meant. Anything else that escapes the library is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable

CODES = frozenset(
    {
        "invalid_request",
        "voice_not_found",
        "voice_exists",
        "voice_library_full",
        "reference_unreadable",
        "reference_too_short",
        "reference_too_long",
        "reference_silent",
        "storage_failed",
    }
)


class LibraryError(Exception):
    """Something the library cannot do, with a stable code.

    Args:
        code: one of `CODES`.
        message: what was wrong and what was expected, for a person.
        field: the argument at fault, or None.
        suggestions: names of voices that may have been meant, best first.
    """

    def __init__(self, code: str, message: str, field: str | None = None, suggestions: Iterable[str] = ()) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.suggestions = tuple(suggestions)

    def __reduce__(self) -> tuple[type[LibraryError], tuple[str, str, str | None, tuple[str, ...]]]:
        return type(self), (self.code, self.message, self.field, self.suggestions)
