"""What is measured of a reference is what was put into it; the hopeless is refused, the best part is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.voice_library.recordings import RATE_HZ, FloatArray, noise, silence, speech, voice
from voice_library.errors import LibraryError
from voice_library.frames import clipped_samples
from voice_library.quality import assess, choose_part, measure, prepare_reference


def code_of(audio: FloatArray, rate_hz: int = RATE_HZ, **limits: float) -> str:
    with pytest.raises(LibraryError) as raised:
        assess(audio, rate_hz, **limits)
    return raised.value.code


def clipped(audio: FloatArray, share: float) -> FloatArray:
    """Recorded too high for a ceiling of 0.9, so that about a share of the samples is cut off."""
    ceiling = np.quantile(np.abs(audio), 1 - share)
    return np.clip(audio, -ceiling, ceiling) / np.float32(ceiling / 0.9)


# ---------------------------------------------------------------------------------------- measuring


def test_a_clean_recording_of_good_length_has_no_warnings() -> None:
    assert assess(speech(12.0), RATE_HZ).warnings == ()


@pytest.mark.parametrize("noise_dbfs", [-75.0, -60.0, -45.0])
def test_the_noise_floor_is_that_of_the_noise(noise_dbfs: float) -> None:
    assert measure(speech(12.0, noise_dbfs=noise_dbfs), RATE_HZ).noise_floor_dbfs == pytest.approx(noise_dbfs, abs=1.5)


def test_the_snr_falls_with_the_noise_and_is_near_what_it_was_mixed_at() -> None:
    level = measure(speech(12.0, noise_dbfs=None), RATE_HZ).level_dbfs
    for noise_dbfs in (-70.0, -55.0, -40.0):
        quality = measure(speech(12.0, noise_dbfs=noise_dbfs), RATE_HZ)
        assert quality.snr_db == pytest.approx(level - noise_dbfs, abs=3.0)


def test_digital_silence_at_the_ends_does_not_hide_the_noise() -> None:
    noisy = speech(10.0, noise_dbfs=-40.0)
    padded = np.concatenate([silence(4.0), noisy, silence(4.0)])
    assert measure(padded, RATE_HZ).noise_floor_dbfs == pytest.approx(-40.0, abs=2.0)


def test_steady_noise_has_no_measurable_floor_and_is_warned_of() -> None:
    quality = assess(noise(8.0, -25.0), RATE_HZ)
    assert quality.noise_floor_dbfs is None and quality.snr_db is None
    assert any("hardly changes" in warning for warning in quality.warnings)


@pytest.mark.parametrize("share", [0.005, 0.02, 0.08])
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_clipping_is_measured_even_when_it_was_turned_down_afterwards(share: float, gain: float) -> None:
    audio = gain * clipped(speech(8.0, noise_dbfs=None), share)
    found = assess(audio, RATE_HZ)
    assert found.clipped_share == pytest.approx(share, rel=0.35)
    assert any("clipped" in warning for warning in found.warnings)


def test_a_loud_recording_that_does_not_clip_counts_nothing_as_clipped() -> None:
    audio = speech(8.0, noise_dbfs=None)
    assert clipped_samples((audio / np.abs(audio).max() * np.float32(0.999)).astype(np.float32)).mean() < 1e-4


def test_samples_at_full_scale_count_as_clipped() -> None:
    audio = speech(8.0)
    audio[1000:1003] = 1.0
    assert np.count_nonzero(clipped_samples(audio)) == 3


def test_silence_share_is_that_of_the_pauses() -> None:
    quality = measure(speech(20.0, phrase_s=1.0, pause_s=1.0), RATE_HZ)
    assert quality.silence_share == pytest.approx(0.5, abs=0.05)


def test_a_little_voice_in_a_long_quiet_recording_is_found() -> None:
    audio = noise(60.0, -65.0)
    audio[RATE_HZ * 30 : RATE_HZ * 32] += voice(2.0)
    assert measure(audio, RATE_HZ).voice_s == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize(("original_hz", "expected_hz"), [(8_000, 4_000), (16_000, 8_000)])
def test_bandwidth_is_that_of_the_sound_not_of_the_file(original_hz: int, expected_hz: int) -> None:
    narrow = speech(8.0, rate_hz=original_hz)
    quality = measure(soxr.resample(narrow, original_hz, 48_000, quality="VHQ"), 48_000)
    assert quality.bandwidth_hz == pytest.approx(expected_hz, abs=500)
    assert any("narrow" in warning for warning in quality.warnings) == (expected_hz < 7_000)


def test_two_pitches_in_turns_are_two_speakers_and_one_pitch_is_never_called_so() -> None:
    low, high = speech(6.0, pitch_hz=105.0), speech(6.0, pitch_hz=215.0)
    assert measure(np.concatenate([low, high]), RATE_HZ).speakers == 2
    for one in (np.concatenate([low, low]), np.concatenate([high, high])):
        assert measure(one, RATE_HZ).speakers is None


def test_quality_goes_into_json() -> None:
    assert json.loads(json.dumps(assess(speech(6.0), RATE_HZ).to_dict()))["duration_s"] == 6.0


# ----------------------------------------------------------------------------------------- refusing


def test_what_cannot_become_a_voice_is_refused_with_its_code() -> None:
    assert code_of(speech(4.0)) == "reference_too_short"
    assert code_of(speech(5.0)) == "reference_too_short", "the models take none of exactly this length"
    assert code_of(silence(8.0)) == "reference_silent"
    assert code_of(noise(8.0, -75.0)) == "reference_silent"
    assert code_of(np.concatenate([speech(0.6), silence(8.0)])) == "reference_too_short"
    assert code_of(clipped(speech(8.0, noise_dbfs=None), 0.3)) == "reference_unreadable"


def test_a_click_is_not_a_voice() -> None:
    audio = silence(8.0)
    audio[RATE_HZ : RATE_HZ + 100] = 0.9
    assert code_of(audio) == "reference_silent"


def test_a_constant_offset_is_silence() -> None:
    assert code_of(np.full(8 * RATE_HZ, 0.3, dtype=np.float32)) == "reference_silent"


@pytest.mark.parametrize(
    "audio",
    [
        np.zeros((2, RATE_HZ), dtype=np.float32),
        np.zeros(RATE_HZ, dtype=np.int16),
        np.full(6 * RATE_HZ, np.nan, dtype=np.float32),
        np.full(6 * RATE_HZ, 1e300, dtype=np.float64),
    ],
    ids=["stereo", "integers", "nan", "infinite as float32"],
)
def test_what_is_not_finite_mono_float_audio_is_unreadable(audio: np.ndarray) -> None:
    assert code_of(audio) == "reference_unreadable"


@pytest.mark.parametrize("rate_hz", [0, -1, 4_000, 10**9])
def test_an_impossible_sample_rate_is_unreadable(rate_hz: int) -> None:
    assert code_of(speech(6.0), rate_hz) == "reference_unreadable"


def test_the_shortest_reference_is_the_callers_to_say() -> None:
    assert assess(speech(3.0), RATE_HZ, min_s=1.0).duration_s == 3.0


# ----------------------------------------------------------------------------------------- choosing


def test_silence_at_both_ends_is_left_out() -> None:
    part = choose_part(np.concatenate([silence(3.0), speech(9.6, noise_dbfs=None), silence(3.0)]), RATE_HZ)
    assert part.start_s == pytest.approx(2.9, abs=0.05)
    assert part.end_s == pytest.approx(12.7, abs=0.15)


def test_a_part_of_a_long_recording_is_of_the_wanted_length_and_ends_in_pauses() -> None:
    audio = speech(90.0)
    part = choose_part(audio, RATE_HZ)
    assert 10.0 <= part.end_s - part.start_s <= 15.0
    for edge in (part.audio[: RATE_HZ // 50], part.audio[-RATE_HZ // 50 :]):
        assert np.sqrt(np.mean(edge**2)) < 10 ** (-60 / 20), "an edge lies in a phrase"


def test_a_part_is_the_stretch_of_the_recording_that_it_says() -> None:
    audio = speech(40.0)
    part = choose_part(audio, RATE_HZ)
    start, end = round(part.start_s * RATE_HZ), round(part.end_s * RATE_HZ)
    assert np.array_equal(part.audio, audio[start:end])


@pytest.mark.parametrize("good_at_s", [0.0, 20.0, 40.0])
def test_the_clean_stretch_is_chosen_over_noisy_ones(good_at_s: float) -> None:
    audio = speech(60.0, noise_dbfs=-75.0)
    bad = noise(60.0, -35.0, seed=1)
    bad[int(good_at_s * RATE_HZ) : int((good_at_s + 20.0) * RATE_HZ)] = 0.0
    part = choose_part(audio + bad, RATE_HZ)
    assert good_at_s - 0.5 <= part.start_s and part.end_s <= good_at_s + 20.5


def test_the_stretch_that_does_not_clip_is_chosen() -> None:
    good, bad = speech(20.0), clipped(speech(20.0, noise_dbfs=None), 0.05)
    part = choose_part(np.concatenate([bad, good, bad]), RATE_HZ)
    assert part.start_s >= 19.5 and part.end_s <= 40.5


def test_the_stretch_with_more_speech_is_chosen() -> None:
    sparse, dense = speech(30.0, phrase_s=0.5, pause_s=2.0), speech(20.0)
    part = choose_part(np.concatenate([sparse, dense, sparse]), RATE_HZ)
    assert part.start_s >= 28.0 and part.end_s <= 52.0


def test_a_recording_without_pauses_still_gives_a_part_of_the_wanted_length() -> None:
    part = choose_part(voice(40.0), RATE_HZ)
    assert 10.0 <= part.end_s - part.start_s <= 15.0


def test_leaving_out_silence_never_makes_a_long_enough_recording_too_short() -> None:
    audio = np.concatenate([silence(1.0), speech(4.6), silence(1.0)])
    assert prepare_reference(audio, RATE_HZ).audio.size > 5.0 * RATE_HZ


@given(
    lead_s=st.floats(0.0, 20.0), speech_s=st.floats(1.5, 40.0), tail_s=st.floats(0.0, 20.0), min_s=st.floats(0.5, 6.0)
)
@settings(max_examples=40, deadline=None)
def test_a_part_lies_in_the_recording_and_is_long_enough_whatever_the_recording(
    lead_s: float, speech_s: float, tail_s: float, min_s: float
) -> None:
    rate_hz = 8_000
    audio = np.concatenate(
        [silence(lead_s, rate_hz=rate_hz), speech(speech_s, rate_hz=rate_hz), silence(tail_s, rate_hz=rate_hz)]
    )
    part = choose_part(audio, rate_hz, min_s=min_s)
    duration_s = part.audio.size / rate_hz
    assert 0.0 <= part.start_s < part.end_s <= audio.size / rate_hz
    assert duration_s <= 15.0 + 1e-9
    assert duration_s > min(min_s, audio.size / rate_hz - 1e-9)


# ---------------------------------------------------------------------------------------- preparing


def test_what_is_kept_is_at_24_khz_at_most_within_full_scale_and_says_where_it_lay() -> None:
    prepared = prepare_reference(speech(40.0, rate_hz=48_000) * np.float32(1.99), 48_000)
    assert prepared.sample_rate == 24_000 and prepared.audio.dtype == np.float32
    assert np.abs(prepared.audio).max() <= 1.0
    part = prepared.quality["part"]
    assert part["of_s"] == 40.0
    assert prepared.audio.size / 24_000 == pytest.approx(part["end_s"] - part["start_s"], abs=0.002)
    assert prepared.quality["duration_s"] == pytest.approx(part["end_s"] - part["start_s"], abs=0.01)
    json.dumps(prepared.quality)


def test_a_lower_rate_is_kept_as_it_is() -> None:
    assert prepare_reference(speech(8.0, rate_hz=16_000), 16_000).sample_rate == 16_000


def test_a_recording_that_clips_in_one_half_is_judged_by_the_other() -> None:
    bad, good = clipped(speech(20.0, noise_dbfs=None), 0.4), speech(20.0)
    prepared = prepare_reference(np.concatenate([bad, good]), RATE_HZ)
    assert prepared.quality["clipped_share"] < 0.001
    assert prepared.quality["part"]["start_s"] >= 19.5


def test_what_is_kept_is_longer_than_the_shortest_reference_at_any_rate() -> None:
    audio = speech(6.0, rate_hz=96_000)[:480_001]  # 5 s and one sample: at 24 kHz, 5 s
    with pytest.raises(LibraryError, match="more than 5 s"):
        prepare_reference(audio, 96_000)
