"""Mastering changes the level, the rate and the container of speech, and nothing else about it."""

from __future__ import annotations

import io

import numpy as np
import pyloudnorm
import pytest
import soundfile

from engine.audio.mastering import (
    CEILING_DBFS,
    FORMATS,
    NORMALIZATIONS,
    RMS_DBFS,
    encode,
    measure_lufs,
    normalize,
    resample,
)
from engine.errors import SpeechError
from tests.engine.synthetic_voices import sung_vowel

RATE_HZ = 24_000
CEILING = 10 ** (CEILING_DBFS / 20)


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    return sung_vowel(120.0) * np.float32(0.1)


def _rms_dbfs(waveform: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(waveform.astype(np.float64) ** 2)))


def test_peak_normalisation_brings_the_highest_sample_to_the_ceiling(voice: np.ndarray) -> None:
    assert np.abs(normalize(voice, RATE_HZ, "peak")).max() == pytest.approx(CEILING, rel=1e-5)


def test_no_normalisation_leaves_the_audio_alone(voice: np.ndarray) -> None:
    assert normalize(voice, RATE_HZ, "none") is voice


def test_rms_normalisation_reaches_its_level(voice: np.ndarray) -> None:
    assert _rms_dbfs(normalize(voice, RATE_HZ, "rms")) == pytest.approx(RMS_DBFS, abs=0.01)


@pytest.mark.parametrize("lufs", [-30.0, -23.0, -18.0])
def test_loudness_normalisation_reaches_its_level(voice: np.ndarray, lufs: float) -> None:
    louder = normalize(voice, RATE_HZ, "loudness", loudness_lufs=lufs)
    assert pyloudnorm.Meter(RATE_HZ).integrated_loudness(louder.astype(np.float64)) == pytest.approx(lufs, abs=0.1)


@pytest.mark.parametrize("mode", sorted(set(NORMALIZATIONS) - {"none"}))
def test_normalisation_is_one_gain_and_never_exceeds_the_ceiling(mode: str) -> None:
    click = sung_vowel(120.0) * np.float32(0.01)
    click[1000] = 0.9
    levelled = normalize(click, RATE_HZ, mode, loudness_lufs=-5.0)
    assert np.abs(levelled).max() <= CEILING * (1 + 1e-5)
    assert np.allclose(levelled, click * (levelled[1000] / click[1000]), atol=1e-6)


@pytest.mark.parametrize("mode", NORMALIZATIONS)
@pytest.mark.parametrize("num_samples", [0, 1, 2400, 9600, 24_000])
def test_silence_of_any_length_stays_silence(mode: str, num_samples: int) -> None:
    silence = np.zeros(num_samples, np.float32)
    assert np.array_equal(normalize(silence, RATE_HZ, mode), silence)


@pytest.mark.parametrize("mode", NORMALIZATIONS)
def test_normalisation_gives_float32_of_the_same_length(mode: str, voice: np.ndarray) -> None:
    levelled = normalize(voice[:2400], RATE_HZ, mode)
    assert levelled.dtype == np.float32 and levelled.shape == (2400,)


def test_audio_shorter_than_a_loudness_block_is_measured_as_if_repeated(voice: np.ndarray) -> None:
    part = voice[6000:8400]  # 0.1 s
    assert measure_lufs(part, RATE_HZ) == pytest.approx(measure_lufs(np.tile(part, 20), RATE_HZ), abs=0.5)


@pytest.mark.parametrize("lufs", [float("nan"), float("inf"), 1.0, -71.0])
def test_an_impossible_loudness_is_refused_by_name(voice: np.ndarray, lufs: float) -> None:
    with pytest.raises(SpeechError) as caught:
        normalize(voice, RATE_HZ, "loudness", loudness_lufs=lufs)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "loudness_lufs")


def test_an_unknown_normalisation_is_refused_by_name(voice: np.ndarray) -> None:
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


def test_resampling_to_the_same_rate_changes_nothing(voice: np.ndarray) -> None:
    assert resample(voice, RATE_HZ, RATE_HZ) is voice


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_lossless_formats_give_back_every_sample_to_16_bits(name: str, voice: np.ndarray) -> None:
    read, rate_hz = soundfile.read(io.BytesIO(encode(voice, RATE_HZ, name)), dtype="float32")
    assert rate_hz == RATE_HZ and read.shape == voice.shape
    assert np.abs(read - voice).max() <= 1.01 / 32768


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 24_000, 48_000])
def test_every_format_gives_a_file_of_its_kind_that_sounds_the_same(name: str, rate_hz: int) -> None:
    voice = sung_vowel(150.0, sample_rate=rate_hz)
    file = soundfile.SoundFile(io.BytesIO(encode(voice, rate_hz, name)))
    read = file.read(dtype="float32")
    assert (file.format, file.subtype) == (FORMATS[name].container, FORMATS[name].subtype)
    assert file.samplerate == rate_hz and file.channels == 1
    assert read.size / rate_hz == pytest.approx(3.0, abs=0.15)  # mp3 pads its ends
    assert _rms_dbfs(read[: voice.size]) == pytest.approx(_rms_dbfs(voice), abs=1.0)


@pytest.mark.parametrize("name", FORMATS)
def test_audio_of_many_blocks_is_written_whole(name: str) -> None:
    minute = np.zeros(RATE_HZ * 60 + 1, np.float32)
    assert soundfile.info(io.BytesIO(encode(minute, RATE_HZ, name))).duration == pytest.approx(60, abs=0.2)


@pytest.mark.parametrize("name", FORMATS)
def test_even_no_audio_makes_a_readable_answer(name: str) -> None:
    assert isinstance(encode(np.zeros(0, np.float32), RATE_HZ, name), bytes)


def test_samples_beyond_full_scale_are_clipped_not_wrapped() -> None:
    read, _ = soundfile.read(io.BytesIO(encode(np.array([1.5, -1.5], np.float32), RATE_HZ, "wav")))
    assert read[0] > 0.99 and read[1] < -0.99


@pytest.mark.parametrize(("name", "rate_hz"), [("opus", 44_100), ("opus", 22_050), ("mp3", 96_000)])
def test_a_rate_that_the_format_cannot_hold_is_refused_by_name(name: str, rate_hz: int, voice: np.ndarray) -> None:
    with pytest.raises(SpeechError, match="24000") as caught:
        encode(voice, rate_hz, name)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "sample_rate")


def test_an_unknown_format_is_refused_by_name(voice: np.ndarray) -> None:
    with pytest.raises(SpeechError, match="wav, flac, mp3, opus") as caught:
        encode(voice, RATE_HZ, "aac")
    assert (caught.value.code, caught.value.field) == ("invalid_request", "output_format")


def test_the_mp3_and_opus_rates_are_those_the_library_takes() -> None:
    """The table of rates against libsndfile itself, so that neither promises what the other refuses."""
    for name in ("mp3", "opus"):
        audio_format = FORMATS[name]
        for rate_hz in (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000):
            arguments = (io.BytesIO(), "w", rate_hz, 1, audio_format.subtype)
            try:
                soundfile.SoundFile(*arguments, format=audio_format.container).close()
                taken = True
            except soundfile.LibsndfileError:
                taken = False
            assert taken == (rate_hz in (audio_format.sample_rates or ())), (name, rate_hz)
