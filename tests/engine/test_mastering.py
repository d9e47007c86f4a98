"""Mastering changes the level and the rate of speech, and nothing else about it."""

from __future__ import annotations

import numpy as np
import pyloudnorm
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.audio.mastering import (
    CEILING_DBTP,
    NORMALIZATIONS,
    RMS_DBFS,
    Resampler,
    measure_lufs,
    normalize,
    resample,
)
from engine.errors import SpeechError
from engine.types import FloatArray
from tests.engine.cuts import CUTS, cut
from tests.engine.synthetic_voices import sung_vowel

RATE_HZ = 24_000


@pytest.fixture(scope="module")
def voice() -> FloatArray:
    return sung_vowel(120.0) * np.float32(0.1)


@pytest.fixture(scope="module")
def lively_voice() -> FloatArray:
    """Syllables of different loudness, as in speech: the loudest peak stands 18 dB above the loudness of all."""
    random = np.random.default_rng(1)
    time_s = np.arange(6 * RATE_HZ) / RATE_HZ
    harmonics = np.arange(1, 30)[:, None]
    phases = 2 * np.pi * (random.random(harmonics.shape) + harmonics * (120 * time_s + np.sin(3 * time_s)))
    vowel = (np.cos(phases) * (np.exp(-(((harmonics * 120 - 600) / 500) ** 2)) + 0.1)).sum(0)
    level_db = np.interp(time_s * 8, range(49), random.uniform(-30, 0, 49))
    return (0.02 * vowel * 10 ** (level_db / 20)).astype(np.float32)


def _rms_dbfs(waveform: FloatArray) -> float:
    return float(10 * np.log10(np.mean(waveform.astype(np.float64) ** 2)))


def _lufs(waveform: FloatArray) -> float:
    return float(pyloudnorm.Meter(RATE_HZ).integrated_loudness(waveform.astype(np.float64)))


def _true_peak_dbtp(waveform: FloatArray) -> float:
    finer = soxr.resample(np.pad(waveform, 2400), RATE_HZ, 4 * RATE_HZ, quality="VHQ")
    return float(20 * np.log10(np.abs(finer).max()))


def test_peak_normalisation_brings_the_true_peak_to_the_ceiling_by_one_gain(voice: FloatArray) -> None:
    levelled = normalize(voice, RATE_HZ, "peak")
    assert _true_peak_dbtp(levelled) == pytest.approx(CEILING_DBTP, abs=0.1)
    loudest = np.abs(voice).argmax()
    assert np.allclose(levelled, voice * (levelled[loudest] / voice[loudest]), atol=1e-6)


def test_no_normalisation_leaves_the_audio_alone(voice: FloatArray) -> None:
    assert normalize(voice, RATE_HZ, "none") is voice


def test_rms_normalisation_reaches_its_level(voice: FloatArray) -> None:
    assert _rms_dbfs(normalize(voice, RATE_HZ, "rms")) == pytest.approx(RMS_DBFS, abs=0.1)


@pytest.mark.parametrize("lufs", [-30.0, -23.0, -18.0])
def test_a_loudness_that_needs_no_limiter_is_reached_by_one_gain(voice: FloatArray, lufs: float) -> None:
    louder = normalize(voice, RATE_HZ, "loudness", loudness_lufs=lufs)
    loudest = np.abs(voice).argmax()
    assert _lufs(louder) == pytest.approx(lufs, abs=0.05)
    assert np.allclose(louder, voice * (louder[loudest] / voice[loudest]), atol=1e-6)


@pytest.mark.parametrize("lufs", [-18.0, -16.0, -14.0])
def test_a_loudness_that_needs_a_limiter_is_reached_too(lively_voice: FloatArray, lufs: float) -> None:
    assert _true_peak_dbtp(lively_voice) + lufs - _lufs(lively_voice) > CEILING_DBTP  # a gain alone would clip
    assert _lufs(normalize(lively_voice, RATE_HZ, "loudness", loudness_lufs=lufs)) == pytest.approx(lufs, abs=0.3)


def test_a_loudness_that_cannot_be_reached_stays_short_of_it(lively_voice: FloatArray) -> None:
    assert _lufs(normalize(lively_voice, RATE_HZ, "loudness", loudness_lufs=-3.0)) < -6.0


@pytest.mark.parametrize("mode", sorted(set(NORMALIZATIONS) - {"none"}))
def test_normalisation_never_exceeds_the_ceiling(mode: str) -> None:
    click = sung_vowel(120.0) * np.float32(0.01)
    click[1000] = 0.9
    assert _true_peak_dbtp(normalize(click, RATE_HZ, mode, loudness_lufs=-5.0)) <= CEILING_DBTP + 0.1


@pytest.mark.parametrize("mode", NORMALIZATIONS)
@pytest.mark.parametrize("num_samples", [0, 1, 2400, 9600, 24_000])
def test_silence_of_any_length_stays_silence(mode: str, num_samples: int) -> None:
    silence = np.zeros(num_samples, np.float32)
    assert np.array_equal(normalize(silence, RATE_HZ, mode), silence)


@pytest.mark.parametrize("mode", NORMALIZATIONS)
def test_normalisation_gives_float32_of_the_same_length(mode: str, voice: FloatArray) -> None:
    levelled = normalize(voice[:2400], RATE_HZ, mode)
    assert levelled.dtype == np.float32 and levelled.shape == (2400,)


def test_loudness_is_measured_as_pyloudnorm_does(lively_voice: FloatArray) -> None:
    assert measure_lufs(lively_voice, RATE_HZ) == pytest.approx(_lufs(lively_voice), abs=0.01)


def test_audio_shorter_than_a_loudness_block_is_measured_as_if_repeated(voice: FloatArray) -> None:
    part = voice[6000:8400]  # 0.1 s
    assert measure_lufs(part, RATE_HZ) == pytest.approx(measure_lufs(np.tile(part, 20), RATE_HZ), abs=0.5)


@pytest.mark.parametrize("mode", NORMALIZATIONS)
def test_an_impossible_loudness_is_refused_by_name_in_any_mode(voice: FloatArray, mode: str) -> None:
    with pytest.raises(SpeechError) as caught:
        normalize(voice, RATE_HZ, mode, loudness_lufs=float("nan"))
    assert (caught.value.code, caught.value.field) == ("invalid_request", "loudness_lufs")


def test_an_unknown_normalisation_is_refused_by_name(voice: FloatArray) -> None:
    with pytest.raises(SpeechError, match="loudness") as caught:
        normalize(voice, RATE_HZ, "louder")
    assert caught.value.field == "audio_normalization"


@pytest.mark.parametrize("to_hz", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_duration_pitch_and_level(to_hz: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)
    other = resample(tone, RATE_HZ, to_hz)
    expected = np.sin(2 * np.pi * 440 * np.arange(to_hz) / to_hz)
    inside = slice(to_hz // 10, -to_hz // 10)
    assert other.dtype == np.float32 and other.size == to_hz
    assert np.abs(other[inside] - expected[inside]).max() < 1e-3


def test_resampling_to_the_same_rate_changes_nothing(voice: FloatArray) -> None:
    assert resample(voice, RATE_HZ, RATE_HZ) is voice
    resampler = Resampler(RATE_HZ, RATE_HZ)
    assert np.array_equal(np.concatenate([resampler.push(voice), resampler.finish()]), voice)


@given(at=CUTS, rates_hz=st.sampled_from([(24_000, 48_000), (24_000, 44_100), (24_000, 8_000), (44_100, 24_000)]))
@settings(max_examples=30, deadline=None)
def test_how_a_waveform_is_cut_changes_no_resampled_sample(at: list[int], rates_hz: tuple[int, int]) -> None:
    voice = sung_vowel(120.0)[:20_000]
    resampler = Resampler(*rates_hz)
    pieces = [*[resampler.push(block) for block in cut(voice, at)], resampler.finish()]
    whole = soxr.resample(voice, *rates_hz, quality="HQ")
    joined = np.concatenate(pieces)
    assert joined.size == round(voice.size * rates_hz[1] / rates_hz[0])
    num_shared = min(whole.size, joined.size)  # soxr rounds the length down
    assert np.abs(joined[:num_shared] - whole[:num_shared]).max() < 1e-6


@pytest.mark.parametrize("num_samples", [0, 1, 2, 50, 999])
@pytest.mark.parametrize("to_hz", [8_000, 22_050, 44_100, 48_000])
def test_any_number_of_samples_becomes_the_exact_number(num_samples: int, to_hz: int) -> None:
    other = resample(np.ones(num_samples, np.float32), RATE_HZ, to_hz)
    assert other.dtype == np.float32 and other.size == round(num_samples * to_hz / RATE_HZ)


def test_the_last_sample_is_sound_where_the_length_is_rounded_up() -> None:
    tone = np.cos(2 * np.pi * 100 * np.arange(50_000) / RATE_HZ).astype(np.float32)
    assert resample(tone, RATE_HZ, 22_050).size == 45_938
    assert abs(resample(tone, RATE_HZ, 22_050)[-1]) > 0.1


def test_nothing_can_be_pushed_after_the_end_of_resampling(voice: FloatArray) -> None:
    resampler = Resampler(RATE_HZ, 48_000)
    resampler.finish()
    with pytest.raises(AssertionError):
        resampler.push(voice)
    with pytest.raises(AssertionError):
        resampler.finish()
