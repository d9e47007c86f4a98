"""A limiter holds every peak under its ceiling and touches nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.audio.limiter import LOOK_AHEAD_S, Limiter
from engine.types import FloatArray
from tests.engine.cuts import CUTS, cut
from tests.engine.synthetic_voices import sung_vowel

RATE_HZ = 24_000
WIDTH = round(LOOK_AHEAD_S * RATE_HZ)


def _limited(blocks: Iterable[FloatArray], ceiling_dbtp: float = -1.0, rate_hz: int = RATE_HZ) -> FloatArray:
    limiter = Limiter(rate_hz, ceiling_dbtp)
    return np.concatenate([*[limiter.push(block) for block in blocks], limiter.finish()])


def _true_peak_dbtp(waveform: FloatArray) -> float:
    """Measured with another resampler than the limiter has."""
    finer = soxr.resample(np.pad(waveform, 2400), RATE_HZ, 4 * RATE_HZ, quality="VHQ")
    return float(20 * np.log10(np.abs(finer).max()))


def _with_clicks(scale: float = 0.3) -> FloatArray:
    audio = sung_vowel(120.0)[:30_000] * np.float32(scale)
    audio[[0, 7_000, 7_050, 20_000, 29_999]] = [1.5, 2.0, -4.0, 1.1, -3.0]
    return audio


@given(CUTS)
@settings(max_examples=25, deadline=None)
def test_how_a_waveform_is_cut_changes_no_bit(at: list[int]) -> None:
    audio = _with_clicks()
    assert np.array_equal(_limited(cut(audio, at)), _limited([audio]))


@pytest.mark.parametrize("num_samples", [0, 1, 2, 100, 8_192, 20_000])
@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 48_000])
def test_as_many_samples_come_out_as_went_in(num_samples: int, rate_hz: int) -> None:
    limited = _limited([np.ones(num_samples, np.float32)], rate_hz=rate_hz)
    assert limited.dtype == np.float32 and limited.shape == (num_samples,)


def test_what_stays_under_the_ceiling_comes_out_bit_for_bit() -> None:
    audio = sung_vowel(120.0)
    assert np.array_equal(_limited([audio]), audio)


def test_samples_away_from_a_peak_come_out_bit_for_bit() -> None:
    audio = _with_clicks()
    touched = np.flatnonzero(_limited([audio]) != audio)
    clicks = np.array([0, 7_000, 7_050, 20_000, 29_999])
    assert set(clicks) <= set(touched)
    assert np.abs(touched[:, None] - clicks).min(axis=1).max() <= WIDTH + 24  # the click's own ripple is 24 wide


def test_nothing_is_made_louder_or_turned_round() -> None:
    audio = _with_clicks(3.0)
    gain = _limited([audio])[audio != 0] / audio[audio != 0]
    assert gain.max() <= 1 and gain.min() > 0


@pytest.mark.parametrize("scale", [1.5, 3.0, 8.0])
@pytest.mark.parametrize("ceiling_dbtp", [-1.0, -6.0])
def test_no_true_peak_of_a_voice_is_above_the_ceiling(scale: float, ceiling_dbtp: float) -> None:
    voice = sung_vowel(95.0) * np.float32(scale)
    limited = _limited([voice], ceiling_dbtp)
    assert ceiling_dbtp - 0.1 < _true_peak_dbtp(limited) < ceiling_dbtp + 0.1


def test_a_peak_between_samples_is_held_though_no_sample_is_above_the_ceiling() -> None:
    edges = np.interp(np.arange(6_000), [0, 240, 5_760, 6_000], [0, 1, 1, 0])
    tone = (1.2 * edges * np.sin(np.pi / 2 * np.arange(6_000) + np.pi / 4)).astype(np.float32)
    assert np.abs(tone).max() < 10 ** (-1 / 20) and _true_peak_dbtp(tone) > 1
    assert _true_peak_dbtp(_limited([tone])) < -1 + 0.1


@given(
    places=st.lists(st.tuples(st.integers(0, 5_999), st.floats(-8, 8, width=32)), max_size=20),
    frequency_hz=st.floats(20, 9_000),
    amplitude=st.floats(0, 4),
)
@settings(max_examples=50, deadline=None)
def test_no_true_peak_of_anything_is_above_the_ceiling(
    places: list[tuple[int, float]], frequency_hz: float, amplitude: float
) -> None:
    edges = np.interp(np.arange(6_000), [0, 240, 5_760, 6_000], [0, 1, 1, 0])
    audio = 0.01 + amplitude * edges * np.sin(2 * np.pi * frequency_hz / RATE_HZ * np.arange(6_000))
    for place, height in places:  # clicks without the very highest tones, of which interpolators differ
        audio[place : place + 3] += np.array([0.25, 0.5, 0.25])[: audio.size - place] * height
    assert _true_peak_dbtp(_limited([audio.astype(np.float32)])) < -1.0 + 0.1


def test_the_gain_moves_smoothly() -> None:
    level = np.full(6_000, 0.5, np.float32)
    level[3_000:3_003] = 4.0
    gain = _limited([level]) / level
    assert gain.min() < 0.25 and np.abs(np.diff(gain)).max() < 3 / WIDTH


def test_nothing_can_be_pushed_after_the_end() -> None:
    limiter = Limiter(RATE_HZ)
    limiter.finish()
    with pytest.raises(AssertionError):
        limiter.push(np.zeros(10, np.float32))
    with pytest.raises(AssertionError):
        limiter.finish()
