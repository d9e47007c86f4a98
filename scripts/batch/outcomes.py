"""What a job's end means: a result, or an error that may pass or will not."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.streaming import join

MAY_PASS = frozenset(
    ["timed_out", "out_of_memory", "storage_failed", "download_failed", "cancelled", "generation_failed", "internal"]
)
"""Codes of errors after which the same job may be done well, and `timed_out` of long_form with what is kept."""

OF_THE_ENDPOINT = frozenset(["weights_missing", "model_unavailable", "watermark_unavailable"])
"""Codes of errors of a worker, whatever the job: another worker may do it, and where there is none, none will."""

OPEN = ("IN_QUEUE", "IN_PROGRESS")

NO_RESULT, EXPIRED = "no_result", "expired"
"""Our own codes: a job that ended well without a result, and one that the platform has forgotten. Both may pass."""

JOIN_FAILED, FILE_EXISTS = "join_failed", "file_exists"
"""Of ours too: the parts of a text are there, and could not be made one file; the audio's name is taken."""


@dataclass(frozen=True)
class Failure:
    """Why there is no result.

    Args:
        code: of the job API, or one of ours.
        message: for a person.
        may_pass: whether another attempt may help.
    """

    code: str
    message: str
    may_pass: bool


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        result: of the job, or None ...
        failure: ... and why.
        worker_s: what a worker spent on it.
        wait_s: in the queue before that.
    """

    result: dict[str, Any] | None
    failure: Failure | None
    worker_s: float = 0.0
    wait_s: float = 0.0


def outcome_of(answer: Mapping[str, Any]) -> Outcome:
    """What an answer of /status says of a job that is over."""
    times = {"worker_s": _seconds(answer, "executionTime"), "wait_s": _seconds(answer, "delayTime")}
    status, output = answer.get("status"), answer.get("output")
    if status == "COMPLETED" and isinstance(output, dict) and output and not output.get("error"):
        return Outcome(output, None, **times)
    if status == "COMPLETED" and not output:
        return Outcome(None, Failure(NO_RESULT, "the job ended without a result", True), **times)
    return Outcome(None, _failure(str(status), answer.get("error"), output), **times)


def _seconds(answer: Mapping[str, Any], name: str) -> float:
    value = answer.get(name)
    return value / 1000 if isinstance(value, int | float) and value > 0 else 0.0


def _failure(status: str, error: object, output: object) -> Failure:
    if status == "CANCELLED":
        return Failure("cancelled", "the job was cancelled on the platform", True)
    if status == "TIMED_OUT":
        return Failure("timed_out", str(error or "the platform's execution timeout or time to live was over"), True)
    told = {**_object(output), **_object(error)}  # an error of a stream is JSON text, as is a traceback of the SDK
    message = told.get("error") or told.get("error_message") or error or f"the job is {status}"
    code = told.get("error_code")
    if not isinstance(code, str):
        return Failure("internal", _first_line(message), True)
    return Failure(_first_line(code), _first_line(message), code in MAY_PASS | OF_THE_ENDPOINT)


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        decoded = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _first_line(message: object) -> str:
    lines = str(message).encode("utf-8", "replace").decode().strip().splitlines()  # no half of a character
    return lines[0][:500] if lines else "no reason was given"


@dataclass
class Pieces:
    """A stream's pieces, joined as they come (see `jobs.streaming`).

    Attributes:
        audio: of the file, in order.
        result: what the pieces say beside it.
        is_whole: whether the last piece has come.
    """

    audio: list[bytes] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = False
    failure: Failure | None = None
    _num: int = 0

    def add(self, piece: object) -> None:
        """Take the next piece."""
        if self.failure is not None:
            return
        if not isinstance(piece, dict) or piece.get("seq") != self._num:
            if isinstance(piece, dict) and piece.get("error"):
                self.failure = _failure("FAILED", piece["error"], None)
            else:
                self.failure = Failure(NO_RESULT, "a piece of the stream was lost on its way", True)
            return
        self._num += 1
        try:
            self.audio.append(base64.b64decode(piece.get("audio") or "", validate=True))
            join(self.result, piece)
        except (ValueError, TypeError):  # no base64, or parts of a field that are of two kinds
            self.failure = Failure(NO_RESULT, "a piece of the stream came damaged", True)
            return
        self.is_whole = bool(piece.get("final"))
