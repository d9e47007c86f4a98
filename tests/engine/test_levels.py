"""A meter says the same of a waveform as the standard does, however the waveform comes."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable

import numpy as np
import pyloudnorm
import pytest
import soxr
from hypothesis import given, settings

from engine.audio.levels import CEILING_DBTP, MAX_MAKEUP_DB, RMS_DBFS, LevelMeter
from engine.errors import SpeechError
from engine.types import FloatArray
from tests.engine.cuts import CUTS, cut
from tests.engine.synthetic_voices import sung_vowel

RATE_HZ = 24_000


def _measured(blocks: Iterable[FloatArray], rate_hz: int = RATE_HZ) -> LevelMeter:
    meter = LevelMeter(rate_hz)
    for block in blocks:
        meter.push(block)
    return meter


def _figures(meter: LevelMeter) -> tuple[float, ...]:
    gains = (meter.gain_db(mode) for mode in ("peak", "rms", "loudness"))
    return (meter.lufs(), meter.rms_dbfs(), meter.peak(), meter.true_peak(), *gains)


def _speechlike(duration_s: float, rate_hz: int = RATE_HZ) -> FloatArray:
    """A vowel that swells and fades, with quiet stretches below the relative gate and silence below the absolute."""
    vowel = sung_vowel(120.0, duration_s, rate_hz)
    swell = np.interp(
        np.arange(vowel.size) / rate_hz, [0, 1, 1.6, 1.7, 2.2, 2.3, 3], [0.05, 0.4, 0.3, 0, 0, 0.005, 0.1]
    )
    return (vowel * swell).astype(np.float32)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("duration_s", [0.41, 1.04, 1.06, 2.96])
def test_loudness_is_that_of_pyloudnorm(rate_hz: int, duration_s: float) -> None:
    audio = _speechlike(duration_s, rate_hz)
    expected = pyloudnorm.Meter(rate_hz).integrated_loudness(audio.astype(np.float64))
    assert _measured([audio], rate_hz).lufs() == pytest.approx(expected, abs=0.01)


def test_silence_counts_neither_as_audio_nor_for_what_is_quiet_beside_it() -> None:
    vowel = sung_vowel(120.0)
    audio = np.concatenate([vowel[:24_000], np.float32(0.125) * vowel, np.zeros(20 * RATE_HZ, np.float32)])
    expected = pyloudnorm.Meter(RATE_HZ).integrated_loudness(audio.astype(np.float64))
    assert _measured([audio]).lufs() == pytest.approx(expected, abs=0.01)


def test_audio_below_the_gate_has_no_loudness_and_is_not_made_louder() -> None:
    meter = _measured([sung_vowel(120.0) * np.float32(1e-4)])
    assert meter.lufs() == -math.inf and meter.gain_db("loudness") == 0.0
    assert math.isfinite(meter.rms_dbfs())


@given(CUTS)
@settings(max_examples=25, deadline=None)
def test_how_a_waveform_is_cut_changes_no_figure(at: list[int]) -> None:
    audio = _speechlike(1.25)
    assert _figures(_measured(cut(audio, at))) == _figures(_measured([audio]))


def test_figures_asked_for_on_the_way_are_those_so_far_and_change_none_after() -> None:
    audio = _speechlike(1.25)
    meter = LevelMeter(RATE_HZ)
    for end in range(1000, audio.size + 1, 5800):
        meter.push(audio[end - 1000 if end == 1000 else end - 5800 : end])
        assert _figures(meter) == _figures(_measured([audio[:end]]))


@pytest.mark.parametrize("num_samples", [1, 100, 2400, 9599])
def test_audio_shorter_than_a_gating_block_is_measured_as_if_repeated(num_samples: int) -> None:
    part = sung_vowel(120.0)[6000 : 6000 + num_samples]
    repeated = np.resize(part, 9600).astype(np.float64)
    assert _measured([part]).lufs() == pytest.approx(pyloudnorm.Meter(RATE_HZ).integrated_loudness(repeated), abs=0.01)


@pytest.mark.parametrize("num_samples", [0, 1, 2400, 9600, 24_000])
def test_silence_of_any_length_has_no_level_and_asks_for_no_gain(num_samples: int) -> None:
    meter = _measured([np.zeros(num_samples, np.float32)])
    assert _figures(meter) == (-math.inf, -math.inf, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_rms_and_peak_are_those_of_the_samples() -> None:
    audio = _speechlike(1.0)
    meter = _measured([audio])
    assert meter.peak() == np.abs(audio).max()
    assert meter.rms_dbfs() == pytest.approx(10 * np.log10(np.mean(audio.astype(np.float64) ** 2)), abs=1e-6)


@pytest.mark.parametrize("frequency_hz", [6_000, 8_000, 9_600])
@pytest.mark.parametrize("phase", [0.1, math.pi / 4, 1.3])
def test_the_true_peak_of_a_tone_is_its_amplitude_wherever_its_samples_lie(frequency_hz: int, phase: float) -> None:
    tone = 0.5 * np.sin(2 * np.pi * frequency_hz / RATE_HZ * np.arange(RATE_HZ) + phase)
    tone *= np.minimum(1, np.minimum(np.arange(RATE_HZ), np.arange(RATE_HZ)[::-1]) / 2400)  # no step at the ends
    true_peak = _measured([tone.astype(np.float32)]).true_peak()
    assert -0.7 < 20 * math.log10(true_peak / 0.5) < 0.05  # read at four points: 0.69 dB is the standard's own bound


@pytest.mark.parametrize("f0_hz", [90.0, 210.0])
def test_the_true_peak_is_that_of_the_waveform_at_four_times_the_rate(f0_hz: float) -> None:
    audio = sung_vowel(f0_hz)
    finer = soxr.resample(np.pad(audio, 2400), RATE_HZ, 4 * RATE_HZ, quality="VHQ")
    assert 20 * math.log10(_measured([audio]).true_peak() / np.abs(finer).max()) == pytest.approx(0.0, abs=0.05)


def test_the_gain_to_a_level_that_needs_no_limiter_is_the_difference_to_it() -> None:
    meter = _measured([_speechlike(2.0)])
    assert meter.gain_db("none") == 0.0
    assert meter.gain_db("peak") == pytest.approx(CEILING_DBTP - 20 * math.log10(meter.true_peak()))
    assert meter.gain_db("rms") > 0 and meter.gain_db("loudness", -40.0) == pytest.approx(-40.0 - meter.lufs())
    quiet = _measured([0.9 * np.sin(np.arange(RATE_HZ)).astype(np.float32)])  # a tone has no peaks to speak of
    assert quiet.gain_db("rms") == pytest.approx(RMS_DBFS - quiet.rms_dbfs())


@pytest.mark.parametrize("mode", ["rms", "loudness"])
def test_no_more_than_a_little_gain_makes_up_for_what_a_limiter_takes(mode: str) -> None:
    click = _speechlike(2.0)
    click[::2400] = 1.0
    meter = _measured([click])
    level, target = (meter.rms_dbfs(), RMS_DBFS) if mode == "rms" else (meter.lufs(), -5.0)
    assert 0.1 < meter.gain_db(mode, -5.0) - (target - level) <= MAX_MAKEUP_DB


def test_what_is_held_of_audio_grows_by_two_numbers_per_tenth_of_a_second() -> None:
    minute = np.tile(_speechlike(3.0), 20)
    meter = LevelMeter(RATE_HZ)
    meter.push(minute)
    before = len(pickle.dumps(meter))
    meter.push(minute)
    assert len(pickle.dumps(meter)) - before <= 600 * 2 * 8 + 100


@pytest.mark.parametrize("lufs", [float("nan"), float("inf"), 1.0, -71.0])
def test_an_impossible_loudness_is_refused_by_name(lufs: float) -> None:
    with pytest.raises(SpeechError) as caught:
        LevelMeter(RATE_HZ).gain_db("loudness", lufs)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "loudness_lufs")


def test_an_unknown_normalisation_is_refused_by_name() -> None:
    with pytest.raises(SpeechError, match="loudness") as caught:
        LevelMeter(RATE_HZ).gain_db("louder")
    assert caught.value.field == "audio_normalization"
