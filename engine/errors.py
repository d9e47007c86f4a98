"""The one error that leaves the engine.

Callers branch on `code` (the vocabulary is fixed, see `CODES`), people read `message`, and `field`
names the request field that is at fault, if one is. Anything else that escapes the engine is a bug.
"""

from __future__ import annotations

CODES = frozenset(
    {
        "invalid_request",
        "text_empty",
        "text_too_long",
        "language_unsupported",
        "model_unavailable",
        "reference_unreadable",
        "reference_too_short",
        "reference_too_long",
        "reference_silent",
        "weights_missing",
        "watermark_unavailable",
        "out_of_memory",
        "generation_failed",
        "cancelled",
        "internal",
    }
)


class SpeechError(Exception):
    """A request or a set-up that cannot be served, with a stable code.

    Args:
        code: one of `CODES`.
        message: what was wrong and what was expected, for a person.
        field: the request or configuration field at fault, or None.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field

    def __reduce__(self) -> tuple[type[SpeechError], tuple[str, str, str | None]]:
        return type(self), (self.code, self.message, self.field)
