"""Whatever JSON comes as a job, the answer is a result or a coded error that can be sent."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engine.audio.mastering import encode
from engine.types import PARAMETERS
from jobs.compat import FIELD_ALIASES, IGNORED_FIELDS
from jobs.errors import CODES
from jobs.schema import INPUT_MODELS
from jobs.worker import Worker
from tests.jobs.conftest import ToneEngine, tone
from tests.jobs.voice_support import MakeWorker, save

TEXT = st.text(st.characters(), max_size=20)  # half surrogate pairs included: JSON can carry them
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
FIELDS = {name for model in INPUT_MODELS.values() for name in model.model_fields}
KNOWN = sorted(FIELDS | {*FIELD_ALIASES, *IGNORED_FIELDS, "s3Config"})


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def recordings() -> list[str]:
    """Good ones in each format, and broken ones of each kind."""
    good = [encode(tone(6.0), 24_000, name) for name in ("wav", "flac", "mp3", "opus")]
    cut = [data[: len(data) // 2] for data in good]
    riddled = [data[:300] + bytes(200) + data[500:] for data in good]
    claims_hours = good[0][:40] + (2**31 - 1).to_bytes(4, "little") + good[0][44:]
    nothing = encode(np.zeros(150_000, np.float32), 24_000, "flac")  # tiny, and silent
    texts = [as_text(data) for data in [*good, *cut, *riddled, claims_hours, nothing, b"RIFF", b"OggS" + bytes(100)]]
    uris = [f"data:audio/wav;base64,{texts[0]}", "data:,x", "data:audio/wav;base64,%%%"]
    return [
        *texts,
        *uris,
        "file:/etc/passwd",
        "s3://bucket/key",
        "https://127.0.0.1/x.wav",
        "http://a/b",
        "ftp://x",
        "",
    ]


SAID = st.sampled_from(["Hello there.", "One. Two. Three!", "[pause 0.5s] Later.", "😀", "", "a" * 6_000]) | TEXT
RECORDING = st.sampled_from(recordings())
NAME = st.sampled_from(["Anna", "anna", "Ann", "..", "../x", "é"])
SEGMENT: dict[str, Any] = {
    "voice_id": NAME,
    "voice_name": NAME,
    "reference_audio": RECORDING,
    "language": st.sampled_from(["en", "fr", "xx"]),
    "pause_after_s": st.floats(0, 60),
}
FITTING: dict[str, Any] = {
    **{name: st.integers(1, 500) if bounds.integer else st.floats(bounds.low, bounds.high)
       for name, bounds in PARAMETERS.items()},
    "mode": st.sampled_from(["basic", "streaming"]),
    "text": SAID,
    "seed": st.integers(0, 2**63 - 1),
    "output_format": st.sampled_from(["wav", "flac", "mp3", "opus", "pcm"]),
    "sample_rate": st.sampled_from([8_000, 16_000, 24_000, 44_100, 48_000]),
    "audio_normalization": st.sampled_from(["none", "peak", "rms", "loudness"]),
    "loudness_lufs": st.floats(-40, 0),
    "delivery": st.sampled_from(["auto", "inline", "s3"]),
    "idempotency_key": st.sampled_from(["a", "b"]),
    "subtitles": st.sampled_from(["srt", "vtt"]),
    "title": st.just("A title"),
    "pronunciations": st.dictionaries(st.just("SQL"), st.just("sequel")),
    "segments": st.lists(
        st.fixed_dictionaries({"text": SAID}, optional=SEGMENT), min_size=1, max_size=3
    ),
    "save_to_library": st.booleans(),
    "tags": st.lists(st.just("calm"), max_size=2),
    "transfer_mode": st.sampled_from(["embedding", "audio"]),
    "offset": st.integers(0, 3),
    "limit": st.integers(1, 3),
    **dict.fromkeys(("input_audio", "target_audio", "reference_audio"), RECORDING),
    **dict.fromkeys(("voice_id", "voice_name"), NAME),
    **dict.fromkeys(("language",), st.sampled_from(["en", "fr", "xx"])),
}  # fmt: skip
"""For each field values that it may have."""

SUCH = st.just("such")


@st.composite
def fitting_inputs(draw: st.DrawFn) -> dict[str, Any]:
    """Made from the schema: an operation with what it needs and a few of its other fields."""
    operation = draw(st.sampled_from(sorted(INPUT_MODELS)))
    model = INPUT_MODELS[operation]
    names = sorted(set(model.model_fields) - {"operation"})
    needed = [name for name in names if model.model_fields[name].is_required()]
    chosen = [*needed, *draw(st.lists(st.sampled_from(names), max_size=4))] if names else []
    if operation == "long_form":
        chosen.append("segments" if draw(st.booleans()) else "text")
    return {"operation": operation} | {name: draw(FITTING.get(name, SUCH)) for name in chosen}


@st.composite
def bent_inputs(draw: st.DrawFn) -> Any:
    """Against the schema: one or two things of a fitting input are not as they should be."""
    fields = draw(fitting_inputs())
    for name in draw(st.lists(st.sampled_from(KNOWN) | TEXT | st.sampled_from(sorted(fields)), min_size=1, max_size=2)):
        fields[name] = draw(VALUES | FITTING.get(name, VALUES))
    return fields


INPUTS = fitting_inputs() | bent_inputs() | bent_inputs() | VALUES
JOBS = st.fixed_dictionaries(
    {"input": INPUTS},
    optional={
        "id": st.sampled_from(["job-1", "../../etc", ""]) | VALUES,
        "webhook": VALUES,
    },
) | st.fixed_dictionaries(
    {
        "input": fitting_inputs(),
        "s3Config": VALUES
        | st.fixed_dictionaries(
            dict.fromkeys(("accessId", "accessSecret", "bucketName"), st.just("such")),
            optional={"endpointUrl": st.sampled_from(["https://127.0.0.1", "http://a", "https://[::1]:443"]) | TEXT},
        ),
    }
)


@pytest.fixture
def worker(make_worker: MakeWorker) -> Worker:
    """With a library that holds Anna and has little room."""
    worker = make_worker(ToneEngine(), max_voices=5)
    assert "error" not in save(worker, "Anna")
    return worker


def check_answer(worker: Worker, job: Any) -> str:
    """Run a job, and look at what comes; gives its code."""
    result = asyncio.run(asyncio.wait_for(worker.run(job), 60))
    text = json.dumps(result, ensure_ascii=False, allow_nan=False)
    text.encode("utf-8")
    assert "Traceback" not in text
    if "error" not in result:
        return "done"
    assert set(result) == {"error", "error_code", "field"}
    assert result["error_code"] in CODES
    assert result["error_code"] != "internal", result
    return str(result["error_code"])


def run_jobs(worker: Worker, num: int) -> Counter[str]:
    """Run so many generated jobs; gives what became of them."""
    outcomes: Counter[str] = Counter()

    @hypothesis_settings(max_examples=num, deadline=None, suppress_health_check=list(HealthCheck))
    @given(job=JOBS)
    def run(job: Any) -> None:
        outcomes[check_answer(worker, job)] += 1

    run()
    return outcomes


def test_any_json_gives_a_result_or_a_coded_error_and_never_a_traceback(worker: Worker) -> None:
    outcomes = run_jobs(worker, 400)
    assert outcomes["done"] >= 20 and len(outcomes) >= 6, outcomes  # else they say little


@pytest.mark.slow
def test_any_of_ten_thousand_jobs_gives_a_result_or_a_coded_error(worker: Worker) -> None:
    outcomes = run_jobs(worker, 10_000)
    print(outcomes.most_common())
    assert outcomes["done"] >= 500 and len(outcomes) >= 8, outcomes


def test_the_recordings_that_jobs_are_made_with_are_good_and_bad(worker: Worker) -> None:
    codes = Counter(
        check_answer(worker, {"input": {"text": "Hello.", "reference_audio": recording}}) for recording in recordings()
    )
    assert codes["done"] >= 5 and {"reference_unreadable", "reference_silent", "download_refused"} <= set(codes), codes
