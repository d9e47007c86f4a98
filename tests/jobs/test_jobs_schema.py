"""What a job may say, and what each refused one is told."""

from __future__ import annotations

import math

import pytest

from engine.types import PARAMETERS
from jobs.compat import IGNORED_FIELDS
from jobs.errors import JobError
from jobs.schema import DeleteVoice, GetVoice, Info, ListVoices, Tts, VoiceClone, parse_job


def parse(**fields: object) -> object:
    return parse_job({"id": "1", "input": fields}).request


def refusal(**fields: object) -> JobError:
    with pytest.raises(JobError) as caught:
        parse_job({"id": "1", "input": fields})
    return caught.value


def test_operation_defaults_to_tts_and_nulls_count_as_not_given() -> None:
    request = parse(text="Hello", seed=None, operation=None, output_format=None)
    assert isinstance(request, Tts)
    assert request.seed is None
    assert request.output_format == "wav"


def test_each_operation_has_its_own_model() -> None:
    assert isinstance(parse(operation="info"), Info)
    assert isinstance(parse(operation="voice_cloning", reference_audio="AAAA"), VoiceClone)
    assert isinstance(parse(operation="list_local_voices"), ListVoices)
    assert isinstance(parse(operation="get_voice", voice_id="v"), GetVoice)
    assert isinstance(parse(operation="delete_voice", voice_name="v"), DeleteVoice)


@pytest.mark.parametrize("job", [{}, {"input": None}, {"input": []}, {"input": "text"}, {"input": True}])
def test_a_job_without_an_input_object_is_invalid(job: dict) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(job)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "input")


@pytest.mark.parametrize("operation", ["long_forms", "voice_transfers", "list_voice", "sing", "", 3, True, [], {}])
def test_an_operation_that_is_not_served_is_refused_with_those_that_are(operation: object) -> None:
    error = refusal(operation=operation, text="Hello")
    assert (error.code, error.field) == ("invalid_request", "operation")
    assert "tts, long_form, voice_clone, voice_conversion, list_voices, get_voice, delete_voice, info" in error.message


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("temprature", "temperature"),
        ("Text", "text"),
        ("referenceAudio", "reference_audio"),
        ("voicename", "voice_name"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(name: str, suggestion: str) -> None:
    error = refusal(text="Hello", **{name: 1})
    assert (error.code, error.field) == ("invalid_request", name)
    assert f"did you mean {suggestion}?" in error.message


def test_a_field_of_another_operation_is_refused_by_name() -> None:
    error = refusal(operation="info", text="Hello")
    assert error.field == "text"
    assert "info" in error.message


def test_an_endless_field_name_does_not_come_back_whole() -> None:
    error = refusal(**{"text": "Hello", "x" * 100_000: 1})
    assert len(error.message) < 1_000
    assert error.field is not None
    assert len(error.field) < 100


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "max_new_tokens"])
@pytest.mark.parametrize("value", [True, "1", math.nan, math.inf, [1], {}, 10**400, -1, 1e9])
def test_a_speech_parameter_takes_nothing_but_a_number_in_its_range(name: str, value: object) -> None:
    error = refusal(text="Hello", **{name: value})
    assert (error.code, error.field) == ("invalid_request", name)
    assert "expected a" in error.message


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "max_new_tokens"])
def test_the_ends_of_a_range_are_inside_it(name: str) -> None:
    bounds = PARAMETERS[name]
    for value in (bounds.low, bounds.high):
        assert getattr(parse(text="Hello", **{name: value}), name) == value


@pytest.mark.parametrize("seed", [True, 1.0, "7", -1, 2**63, math.nan])
def test_a_seed_is_an_integer_of_63_bits(seed: object) -> None:
    assert refusal(text="Hello", seed=seed).field == "seed"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", 5),
        ("text", ["Hello"]),
        ("language", 1),
        ("output_format", "WAV"),
        ("output_format", "aac"),
        ("sample_rate", 24000.5),
        ("sample_rate", 1),
        ("audio_normalization", "loud"),
        ("loudness_lufs", 3),
        ("delivery", "mail"),
        ("mode", "fast"),
        ("reference_audio", 5),
        ("reference_audio", {"url": "x"}),
        ("voice_id", 7),
    ],
)
def test_a_wrong_type_or_choice_is_refused_by_name(name: str, value: object) -> None:
    error = refusal(**({"text": "Hello"} | {name: value}))
    assert (error.code, error.field) == ("invalid_request", name)


def test_text_is_needed_for_tts_and_a_recording_for_voice_clone() -> None:
    assert refusal().field == "text"
    assert refusal(operation="voice_clone", text="Hello").field == "reference_audio"


def test_two_voices_are_refused() -> None:
    error = refusal(text="Hello", voice_name="ann", reference_audio="AAAA")
    assert error.code == "invalid_request"
    assert "voice_name and reference_audio" in error.message


@pytest.mark.parametrize("field", ["text", "language", "reference_audio", "voice_name"])
def test_half_a_surrogate_pair_is_refused(field: str) -> None:
    assert refusal(**({"text": "Hello"} | {field: "a\ud800b"})).field == field


def test_fields_of_other_workers_are_renamed_or_ignored_with_a_warning() -> None:
    parsed = parse_job({"input": {"text": "Hello", "cfg": 0.7, "speed": 1.2, "no_watermark": True, "user_id": "u"}})
    assert isinstance(parsed.request, Tts)
    assert parsed.request.cfg_weight == 0.7
    assert [warning.split()[0] for warning in parsed.warnings] == ["speed", "no_watermark", "user_id"]


@pytest.mark.parametrize("name", IGNORED_FIELDS)
@pytest.mark.parametrize("value", [1, "x", True, [1]])
def test_every_ignored_field_says_so_whatever_it_holds(name: str, value: object) -> None:
    (warning,) = parse_job({"input": {"text": "Hello", name: value}}).warnings
    assert warning.startswith(f"{name} was ignored")


@pytest.mark.parametrize("key", ["", "a" * 201, "two\nlines", "\u200b", "\ud800", 7, True])
def test_an_idempotency_key_is_printable_and_short(key: object) -> None:
    assert refusal(text="Hello", idempotency_key=key).field == "idempotency_key"
    assert refusal(operation="delete_voice", voice_id="v", idempotency_key=key).field == "idempotency_key"


@pytest.mark.parametrize("key", ["a", "a" * 200, "Bestellung № 7 / ü"])
def test_a_key_is_taken_by_what_makes_or_changes_something_and_by_nothing_else(key: str) -> None:
    request = parse(text="Hello", idempotency_key=key)
    assert isinstance(request, Tts) and request.idempotency_key == key
    assert "but of tts" in refusal(operation="list_voices", idempotency_key=key).message


def test_a_field_and_its_other_name_are_not_taken_together() -> None:
    assert refusal(text="Hello", cfg=0.5, cfg_weight=0.6).field == "cfg"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"operation": "get_voice"}, "voice_id"),
        ({"operation": "delete_voice", "voice_id": "v", "voice_name": "v"}, "voice_id"),
        ({"operation": "list_voices", "limit": 0}, "limit"),
        ({"operation": "list_voices", "limit": 10_000}, "limit"),
        ({"operation": "list_voices", "offset": -1}, "offset"),
        ({"operation": "list_voices", "tags": "x"}, "tags"),
        ({"operation": "voice_clone", "reference_audio": "A", "save_to_library": True}, "voice_name"),
        ({"operation": "voice_clone", "reference_audio": "A", "save_to_library": "yes"}, "save_to_library"),
        ({"operation": "voice_clone", "reference_audio": "A", "tags": "x"}, "tags"),
        ({"operation": "voice_clone", "reference_audio": "A", "tags": [1]}, "tags"),
        ({"operation": "voice_clone", "reference_audio": "A", "description": "x", "voice_description": "y"}, None),
    ],
)
def test_a_wrong_field_of_the_library_is_refused_by_name(fields: dict[str, object], field: str | None) -> None:
    error = refusal(**fields)
    assert (error.code, error.field) == ("invalid_request", field or "voice_description")


def test_other_workers_description_of_a_voice_is_that_of_one_that_is_cloned_and_else_ignored() -> None:
    request = parse(operation="voice_clone", reference_audio="AAAA", voice_description="warm")
    assert isinstance(request, VoiceClone) and request.description == "warm"
    assert len(parse_job({"input": {"text": "Hello", "voice_description": "warm"}}).warnings) == 1


def test_contradictions_of_output_are_refused() -> None:
    assert refusal(text="Hello", loudness_lufs=-20, audio_normalization="peak").field == "loudness_lufs"
