"""The median pitch of a recording is found, and where there is none nothing is made up."""

from __future__ import annotations

import numpy as np
import pytest

from engine.audio.pitch import median_f0
from tests.engine.synthetic_voices import sung_vowel


@pytest.mark.parametrize("f0_hz", [75.0, 100.0, 140.0, 220.0, 300.0, 420.0])
@pytest.mark.parametrize("rate_hz", [8_000, 24_000, 96_000])
def test_the_pitch_of_a_sung_vowel_is_found_at_any_rate(f0_hz: float, rate_hz: int) -> None:
    assert median_f0(sung_vowel(f0_hz, sample_rate=rate_hz), rate_hz) == pytest.approx(f0_hz, rel=0.03)


def test_noise_level_and_silence_around_a_voice_do_not_change_its_pitch() -> None:
    voice = sung_vowel(130.0)
    noise = np.random.default_rng(0).standard_normal(voice.size).astype(np.float32)
    padded = np.concatenate([np.zeros(24_000 * 30, np.float32), voice * 0.01 + noise * 1e-4])
    assert median_f0(padded, 24_000) == pytest.approx(130.0, rel=0.03)


@pytest.mark.parametrize("kind", ["nothing", "one sample", "silence", "offset", "noise"])
def test_where_nothing_is_voiced_there_is_no_pitch(kind: str) -> None:
    audio = {
        "nothing": np.zeros(0),
        "one sample": np.ones(1),
        "silence": np.zeros(48_000),
        "offset": np.full(48_000, 0.5),
        "noise": np.random.default_rng(0).standard_normal(48_000),
    }[kind]
    assert median_f0(audio.astype(np.float32), 24_000) is None
