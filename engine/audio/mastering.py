"""The last steps of a waveform: loudness, sample rate, file format. Whole waveforms here; the classes that the
functions stand on take audio of any length block by block, and are to be had from here too."""

from __future__ import annotations

import numpy as np
import soxr

from engine.audio.encoding import (
    FORMATS,
    STREAM_FORMATS,
    AudioFormat,
    FileEncoder,
    StreamEncoder,
    check_format,
    encode,
)
from engine.audio.levels import (
    CEILING_DBTP,
    DEFAULT_LUFS,
    NORMALIZATIONS,
    RMS_DBFS,
    LevelMeter,
    check_normalization,
)
from engine.audio.limiter import Limiter
from engine.types import FloatArray

__all__ = [
    "CEILING_DBTP",
    "DEFAULT_LUFS",
    "FORMATS",
    "NORMALIZATIONS",
    "RMS_DBFS",
    "STREAM_FORMATS",
    "AudioFormat",
    "FileEncoder",
    "LevelMeter",
    "Limiter",
    "Resampler",
    "StreamEncoder",
    "check_format",
    "check_normalization",
    "encode",
    "measure_lufs",
    "normalize",
    "resample",
]

_BLOCK = 1 << 16


def normalize(
    waveform: FloatArray, sample_rate: int, mode: str = "none", *, loudness_lufs: float = DEFAULT_LUFS
) -> FloatArray:
    """Bring a waveform to a level: by one gain, and by a limiter where its peaks would then be too high.

    No true peak is above -1 dBTP (but in mode "none", which changes nothing). Speech reaches its
    level to 0.1 dB as long as its peaks stand 6 dB over the ceiling at most; where the limiter would
    have to do more, the audio stays quieter. Silence stays as it is.

    Args:
        waveform: float32 (T,).
        sample_rate: Hz.
        mode, loudness_lufs: see `LevelMeter.gain_db`.

    Raises:
        SpeechError: invalid_request, see `check_normalization`.
    """
    check_normalization(mode, loudness_lufs)
    if mode == "none":
        return waveform
    gain_db = _measured(waveform, sample_rate).gain_db(mode, loudness_lufs)
    louder = np.asarray(waveform * np.float32(10 ** (gain_db / 20)), np.float32)
    if mode == "peak":
        return louder
    limiter = Limiter(sample_rate)
    return np.concatenate([limiter.push(louder), limiter.finish()])


def measure_lufs(waveform: FloatArray, sample_rate: int) -> float:
    """Integrated loudness after ITU-R BS.1770-4, see `LevelMeter.lufs`."""
    return _measured(waveform, sample_rate).lufs()


def _measured(waveform: FloatArray, sample_rate: int) -> LevelMeter:
    meter = LevelMeter(sample_rate)
    for start in range(0, waveform.size, _BLOCK):
        meter.push(waveform[start : start + _BLOCK])
    return meter


def resample(waveform: FloatArray, from_hz: int, to_hz: int) -> FloatArray:
    """Change the sample rate, see `Resampler`; the waveform itself where the rates are the same."""
    if from_hz == to_hz:
        return waveform
    resampler = Resampler(from_hz, to_hz)
    return np.concatenate([resampler.push(waveform), resampler.finish()])


class Resampler:
    """Changes the sample rate of a waveform that comes in blocks (soxr, high quality: 20-bit precision, linear phase).

    N samples become round(N * to_hz / from_hz), in step with the original, however they are cut into blocks.

    Args:
        from_hz, to_hz: sample rates.
    """

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._stream = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")
        self._from_hz, self._to_hz = from_hz, to_hz
        self._num_in = self._num_out = 0
        self._finished = False

    def push(self, block: FloatArray) -> FloatArray:
        """Take float32 (n,); give the samples that are settled, float32."""
        assert not self._finished and block.ndim == 1, (self._finished, block.shape)
        if self._from_hz == self._to_hz:
            return block
        samples = self._stream.resample_chunk(np.ascontiguousarray(block, np.float32))
        self._num_in += block.size
        self._num_out += samples.size
        return np.asarray(samples, np.float32)

    def finish(self) -> FloatArray:
        """The samples that were still held, float32. Nothing may be pushed after it."""
        assert not self._finished
        self._finished = True
        missing = round(self._num_in * self._to_hz / self._from_hz) - self._num_out
        if missing <= 0:
            return np.zeros(0, np.float32)
        silence = np.zeros(2 + 2 * self._from_hz // self._to_hz, np.float32)  # where soxr alone would round down
        return np.asarray(self._stream.resample_chunk(silence, last=True)[:missing], np.float32)
