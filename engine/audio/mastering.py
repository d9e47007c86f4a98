"""The last steps of a waveform: loudness, sample rate, file format. Pure functions, on the host."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from engine.errors import SpeechError
from engine.types import FloatArray

NORMALIZATIONS = ("none", "peak", "rms", "loudness")

CEILING_DBFS = -1.0
"""No normalised sample exceeds this: lossy formats overshoot a little, and must not clip."""

RMS_DBFS = -20.0
"""RMS level of mode "rms": about 6 dB below full-scale speech with its usual peaks."""

DEFAULT_LUFS = -16.0
"""Loudness of mode "loudness": the usual recommendation for mono and mobile spoken word."""

_GATING_BLOCK_S = 0.4  # of ITU-R BS.1770-4: shorter audio has no loudness
_WRITE_FRAMES = 1 << 16


@dataclass(frozen=True)
class AudioFormat:
    """A file format that speech can be delivered in.

    Args:
        name: what a request calls it.
        mime_type: for HTTP and data URIs.
        suffix: of file names, with the dot.
        container, subtype: as libsndfile names them.
        sample_rates: Hz that the format can hold; None for any.
    """

    name: str
    mime_type: str
    suffix: str
    container: str
    subtype: str
    sample_rates: tuple[int, ...] | None = None


_MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)

FORMATS: Mapping[str, AudioFormat] = {
    audio_format.name: audio_format
    for audio_format in (
        AudioFormat("wav", "audio/wav", ".wav", "WAV", "PCM_16"),
        AudioFormat("flac", "audio/flac", ".flac", "FLAC", "PCM_16"),
        AudioFormat("mp3", "audio/mpeg", ".mp3", "MP3", "MPEG_LAYER_III", _MP3_RATES),
        AudioFormat("opus", "audio/ogg", ".opus", "OGG", "OPUS", _OPUS_RATES),
    )
}


def normalize(
    waveform: FloatArray, sample_rate: int, mode: str = "none", *, loudness_lufs: float = DEFAULT_LUFS
) -> FloatArray:
    """Bring a waveform to a level by one gain, so that nothing but its level changes.

    Peaks never exceed -1 dBFS: where the wanted level would need more, the audio stays that much
    quieter (it is not limited). Silence stays as it is. Audio shorter than the 0.4 s that a loudness
    measurement needs is measured as if repeated to that length.

    Args:
        waveform: float32 (T,).
        sample_rate: Hz.
        mode: "none"; "peak" (highest sample at -1 dBFS); "rms" (RMS at -20 dBFS); "loudness"
            (integrated loudness at `loudness_lufs`, ITU-R BS.1770-4).
        loudness_lufs: -70 to 0.

    Raises:
        SpeechError: invalid_request.
    """
    if mode not in NORMALIZATIONS:
        raise _invalid("audio_normalization", f"one of {', '.join(NORMALIZATIONS)}", mode)
    if not (math.isfinite(loudness_lufs) and -70 <= loudness_lufs <= 0):
        raise _invalid("loudness_lufs", "a number from -70 to 0", loudness_lufs)
    peak = float(np.abs(waveform).max(initial=0.0))
    if mode == "none" or peak == 0.0:
        return waveform
    gain_db = _gain_db(waveform, sample_rate, mode, loudness_lufs)
    gain = min(10 ** (gain_db / 20), 10 ** (CEILING_DBFS / 20) / peak)
    return np.asarray(waveform * np.float32(gain), np.float32)


def _gain_db(waveform: FloatArray, sample_rate: int, mode: str, loudness_lufs: float) -> float:
    """The gain that reaches the level; the ceiling comes later."""
    if mode == "peak":
        return math.inf
    if mode == "rms":
        return RMS_DBFS - 10 * math.log10(float(np.mean(np.square(waveform, dtype=np.float64))))
    measured = measure_lufs(waveform, sample_rate)
    return loudness_lufs - measured if math.isfinite(measured) else 0.0


def measure_lufs(waveform: FloatArray, sample_rate: int) -> float:
    """Integrated loudness after ITU-R BS.1770-4; -inf where all of it is below the gate.

    Audio shorter than 0.4 s is measured as if repeated to that length.
    """
    import pyloudnorm  # imports scipy's filters: only where loudness is asked for

    num_needed = math.ceil(_GATING_BLOCK_S * sample_rate) + 1
    if waveform.size < num_needed:
        waveform = np.resize(waveform, num_needed)
    meter = pyloudnorm.Meter(sample_rate, block_size=_GATING_BLOCK_S)
    with np.errstate(divide="ignore"):  # digital silence is -inf LUFS, which is the answer
        return float(meter.integrated_loudness(waveform.astype(np.float64)))


def resample(waveform: FloatArray, from_hz: int, to_hz: int) -> FloatArray:
    """Change the sample rate (soxr, high quality: 20-bit precision, linear phase)."""
    if from_hz == to_hz:
        return waveform
    return np.asarray(soxr.resample(waveform, from_hz, to_hz, quality="HQ"), np.float32)


def check_format(name: str, sample_rate: int) -> AudioFormat:
    """Look a format up and check that it can hold the sample rate.

    Raises:
        SpeechError: invalid_request for an unknown format (field output_format) or for a rate that it
            cannot hold (field sample_rate).
    """
    if name not in FORMATS:
        raise _invalid("output_format", f"one of {', '.join(FORMATS)}", name)
    rates = FORMATS[name].sample_rates
    if rates is not None and sample_rate not in rates:
        raise _invalid("sample_rate", f"for {name} one of {', '.join(map(str, rates))} Hz", sample_rate)
    return FORMATS[name]


def encode(waveform: FloatArray, sample_rate: int, format: str = "wav") -> bytes:
    """Write an audio file.

    wav and flac hold 16-bit samples, rounded without dither: the rounding lies 98 dB below full scale,
    far under the noise of any voice. What exceeds full scale is clipped. mp3 and opus are written at
    libsndfile's default quality (mp3 about 64 kbit/s, opus about 48 kbit/s for mono at 24 kHz).

    Args:
        waveform: float32 (T,) mono.
        sample_rate: Hz; opus takes 8, 12, 16, 24 or 48 kHz, mp3 its nine MPEG rates.
        format: a name of `FORMATS`.

    Raises:
        SpeechError: invalid_request, see `check_format`.
    """
    assert waveform.ndim == 1, waveform.shape
    audio_format = check_format(format, sample_rate)
    target = io.BytesIO()
    with soundfile.SoundFile(target, "w", sample_rate, 1, audio_format.subtype, format=audio_format.container) as file:
        for block in _blocks(waveform):
            file.write(block)
    return target.getvalue()


def _blocks(waveform: FloatArray) -> Iterable[FloatArray]:
    """In pieces: libsndfile's Ogg writers put all that one call gives them on the stack."""
    return (waveform[start : start + _WRITE_FRAMES] for start in range(0, waveform.size, _WRITE_FRAMES))


def _invalid(field: str, expected: str, value: object) -> SpeechError:
    return SpeechError("invalid_request", f"{field}: expected {expected}, got {value!r}", field)
