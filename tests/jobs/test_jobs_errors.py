"""Every failure becomes one shape of result, and no traceback ever leaves the worker."""

from __future__ import annotations

import json
import logging
import pickle

import pytest

from engine.errors import CODES as ENGINE_CODES
from engine.errors import SpeechError
from jobs.errors import CODES, JobError, error_result
from voice_library.errors import CODES as LIBRARY_CODES
from voice_library.errors import LibraryError


def test_every_code_of_the_engine_is_a_code_of_jobs() -> None:
    assert ENGINE_CODES < CODES


def test_every_code_of_the_library_is_a_code_of_jobs() -> None:
    assert LIBRARY_CODES < CODES


@pytest.mark.parametrize(
    "error",
    [
        JobError("voice_not_found", "no ann", "voice_id"),
        SpeechError("internal", "x"),
        LibraryError("storage_failed", "gone", "uri"),
    ],
)
def test_a_foreseen_error_keeps_its_code_message_and_field(error: JobError | SpeechError | LibraryError) -> None:
    assert error_result(error) == {"error": error.message, "error_code": error.code, "field": error.field}


def test_an_unforeseen_error_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        try:
            raise KeyError("secret detail")
        except KeyError as error:
            result = error_result(error)
    assert result["error_code"] == "internal"
    assert "secret" not in json.dumps(result)
    assert "Traceback" not in json.dumps(result)
    reference = str(result["error"]).split("reference ")[1].split()[0]
    assert reference in caplog.text
    assert "secret detail" in caplog.text


def test_a_lack_of_memory_has_its_own_code() -> None:
    assert error_result(MemoryError())["error_code"] == "out_of_memory"


def test_so_has_a_devices_lack_of_memory() -> None:
    import torch

    assert error_result(torch.OutOfMemoryError("CUDA out of memory"))["error_code"] == "out_of_memory"


def test_an_error_is_never_empty_since_the_platform_takes_that_for_success() -> None:
    assert error_result(JobError("internal", ""))["error"]


def test_a_result_can_always_be_sent_as_utf8() -> None:
    result = error_result(JobError("invalid_request", "bad \ud800", "\udfff"))
    json.dumps(result, ensure_ascii=False).encode("utf-8")


def test_an_error_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(JobError("timed_out", "late", "text")))
    assert (copy.code, copy.message, copy.field) == ("timed_out", "late", "text")
