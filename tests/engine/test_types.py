"""The public types refuse what cannot be served, with a code and the field, and never a raw error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine import Conditionals, EngineConfig, Segment, SpeechError, SpeechRequest, VoicePrompt

TONE = np.sin(np.arange(48_000) / 20).astype(np.float32)


def conditionals() -> Conditionals:
    arrays: list[Any] = [np.ones(256), np.arange(9), np.arange(8), np.ones((16, 80)), np.ones(192)]
    return Conditionals("key", "model", *arrays)


@pytest.mark.parametrize(
    ("audio", "rate", "field"),
    [
        (TONE[None], 24_000, "audio"),
        (TONE[:0], 24_000, "audio"),
        ((TONE * 1000).astype(np.int16), 24_000, "audio"),
        (np.full(10, np.nan, np.float32), 24_000, "audio"),
        (np.full(10, 1e300), 24_000, "audio"),
        (TONE, 100, "sample_rate"),
        (TONE, None, "sample_rate"),
        (TONE, "24000", "sample_rate"),
        (TONE, 24_000.0, "sample_rate"),
        (TONE, True, "sample_rate"),
    ],
)
def test_a_prompt_that_is_not_mono_audio_at_a_rate_is_refused(audio: Any, rate: Any, field: str) -> None:
    with pytest.raises(SpeechError) as caught:
        VoicePrompt(audio, rate)
    assert (caught.value.code, caught.value.field) == ("reference_unreadable", field)


def test_a_prompts_key_is_its_content_and_its_audio_is_a_private_copy() -> None:
    audio = TONE.copy()
    rate: Any = np.int64(24_000)
    first = VoicePrompt(audio, rate)
    assert first.key == VoicePrompt(TONE.astype(np.float64), 24_000).key
    audio[0] = 0.5
    assert first.key == VoicePrompt(TONE, 24_000).key != VoicePrompt(audio, 24_000).key
    assert first.key != VoicePrompt(TONE, 16_000).key
    with pytest.raises(ValueError, match="read-only"):
        first.audio[0] = 1.0


def test_conditionals_survive_their_bytes_exactly_and_equal_ones_are_equal_bytes() -> None:
    once, again = conditionals().to_bytes(), conditionals().to_bytes()
    assert len({conditionals().to_bytes() for _ in range(20)}) == 1
    assert once == again == Conditionals.from_bytes(once).to_bytes()
    assert Conditionals.from_bytes(once).key == "key"


@pytest.mark.parametrize("damage", [b"", b"\x00" * 8, conditionals().to_bytes()[:-9], b"\xff" * 64])
def test_damaged_conditionals_are_a_value_error(damage: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any of its subclasses says enough
        Conditionals.from_bytes(damage)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": 5}, "text"),
        ({"text": None}, "text"),
        ({"text": "a", "segments": [Segment("b")]}, "text"),
        ({"segments": ["abc"]}, "segments"),
        ({"segments": [None]}, "segments"),
        ({"text": "a", "voice": "anna"}, "voice"),
        ({"text": "a", "language": 7}, "language"),
        ({"text": "a", "temperature": True}, "temperature"),
        ({"text": "a", "temperature": float("nan")}, "temperature"),
        ({"text": "a", "temperature": 10**400}, "temperature"),
        ({"text": "a", "top_k": 1.5}, "top_k"),
        ({"text": "a", "seed": 2**63}, "seed"),
        ({"text": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_request_that_cannot_be_served_names_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(SpeechError) as caught:
        SpeechRequest(**fields)
    assert (caught.value.code, caught.value.field) == ("invalid_request", field)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dtype": "float8"}, "dtype"),
        ({"device": None}, "device"),
        ({"model": 3}, "model"),
        ({"model_dir": 5}, "model_dir"),
        ({"num_threads": 0}, "num_threads"),
        ({"num_threads": "2"}, "num_threads"),
        ({"watermark": "no"}, "watermark"),
        ({"max_rows": 0}, "max_rows"),
        ({"max_queued": -1}, "max_queued"),
        ({"max_chunk_chars": 5}, "max_chunk_chars"),
    ],
)
def test_a_configuration_that_makes_no_sense_names_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(SpeechError) as caught:
        EngineConfig(**fields)
    assert (caught.value.code, caught.value.field) == ("invalid_request", field)
