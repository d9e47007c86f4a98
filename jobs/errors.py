"""One error for everything that stops a job, and the one function that turns it into a result.

The codes are the job API's vocabulary: the engine's own, and those of fetching, storing and delivering.
Clients branch on the code, people read the message; neither ever sees a traceback.
"""

from __future__ import annotations

import logging
import uuid

from engine.errors import CODES as ENGINE_CODES
from engine.errors import SpeechError
from voice_library.errors import LibraryError

CODES = ENGINE_CODES | {
    "voice_not_found",
    "voice_exists",
    "voice_library_full",
    "download_refused",
    "download_failed",
    "storage_failed",
    "result_too_large",
    "timed_out",
}

_log = logging.getLogger(__name__)


class JobError(Exception):
    """A job that cannot be done, with a stable code.

    Args:
        code: one of `CODES`.
        message: what was wrong and what was expected, for a person.
        field: the field of the job's input at fault, or None.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field

    def __reduce__(self) -> tuple[type[JobError], tuple[str, str, str | None]]:
        return type(self), (self.code, self.message, self.field)


def error_result(error: BaseException) -> dict[str, str | None]:
    """The result of a job that failed: `{"error", "error_code", "field"}`.

    An error that nobody foresaw becomes `internal` with a short reference; its traceback goes to the
    log under the same reference, and nowhere else.
    """
    if isinstance(error, (JobError, SpeechError, LibraryError)):
        return _result(error.code, error.message, error.field)
    if _is_lack_of_memory(error):
        _log.error("out of memory", exc_info=error)
        return _result("out_of_memory", "the worker ran out of memory on this job")
    reference = uuid.uuid4().hex[:8]
    _log.error("internal error %s", reference, exc_info=error)
    return _result("internal", f"something went wrong inside the worker (reference {reference} in its log)")


def _is_lack_of_memory(error: BaseException) -> bool:
    """Python's, or torch's for a device, which is known by its name: jobs do not import torch."""
    return isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


def _result(code: str, message: str, field: str | None = None) -> dict[str, str | None]:
    return {
        "error": printable(message) or code,  # the platform takes an empty "error" for a success
        "error_code": code,
        "field": None if field is None else printable(field),
    }


def printable(text: str) -> str:
    """`text` without what UTF-8 cannot hold (half surrogate pairs): such a result could not be sent."""
    return text.encode("utf-8", "replace").decode("utf-8")
