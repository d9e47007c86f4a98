"""Whatever JSON comes as a job, the answer is a result or a coded error that can be sent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jobs.compat import FIELD_ALIASES, IGNORED_FIELDS, UNSERVED_FIELDS
from jobs.errors import CODES
from jobs.schema import INPUT_MODELS
from jobs.worker import Worker

TEXT = st.text(st.characters(), max_size=20)  # half surrogate pairs included: JSON can carry them
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
FIELDS = {name for model in INPUT_MODELS.values() for name in model.model_fields}
KNOWN = sorted(FIELDS | {*FIELD_ALIASES, *IGNORED_FIELDS, *UNSERVED_FIELDS})
OPERATIONS = [*INPUT_MODELS, "voice_cloning", "voice_transfer", "list_local_voices"]
NAMES = st.sampled_from(KNOWN) | TEXT
SEGMENTS = st.fixed_dictionaries(
    {"text": st.sampled_from(["Hello", "", "😀", "[pause 1s]", "[pause x]"]) | TEXT},
    optional={
        "voice_id": TEXT,
        "voice_name": TEXT,
        "reference_audio": st.sampled_from(["AAAA", "file:x"]) | VALUES,
        "language": st.sampled_from(["en", "fr", "xx"]) | VALUES,
        "pause_after_s": st.floats(0, 90) | VALUES,
    },
)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "text": st.sampled_from(["Hello", "", "😀", "a" * 6_000]) | VALUES,
        "operation": st.sampled_from(OPERATIONS) | VALUES,
        "input_audio": st.sampled_from(["AAAA", "data:,x", "file:x"]) | VALUES,
        "reference_audio": st.sampled_from(["AAAA", "data:,x", "file:x", "s3://b/k"]) | VALUES,
        "temperature": st.floats(0, 2) | VALUES,
        "output_format": st.sampled_from(["wav", "opus"]) | VALUES,
        "sample_rate": st.integers(8_000, 48_000) | VALUES,
        "seed": st.integers() | VALUES,
        "save_to_library": st.booleans(),
        "voice_id": st.sampled_from(["anna", "../x", "é"]) | TEXT,
        "voice_name": st.sampled_from(["Anna", "anna", "Ann", ".."]) | TEXT,
        "segments": st.lists(SEGMENTS | VALUES, max_size=3) | VALUES,
        "pronunciations": st.dictionaries(TEXT, TEXT, max_size=3) | VALUES,
        "subtitles": st.sampled_from(["srt", "vtt"]) | VALUES,
        "title": TEXT,
    },
)
INPUTS = VALUES | st.builds(lambda some, more: {**more, **some}, LIKELY, st.dictionaries(NAMES, VALUES, max_size=4))


@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(job_input=INPUTS)
def test_any_json_gives_a_result_or_a_coded_error_and_never_a_traceback(worker: Worker, job_input: Any) -> None:
    result = asyncio.run(worker.run({"id": "1", "input": job_input}))
    text = json.dumps(result, ensure_ascii=False, allow_nan=False)
    text.encode("utf-8")
    assert "Traceback" not in text
    if "error" in result:
        assert set(result) == {"error", "error_code", "field"}
        assert result["error_code"] in CODES
        assert result["error_code"] != "internal", result
    else:
        assert "audio" in result or "versions" in result
