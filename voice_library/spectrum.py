"""How far up a recording's spectrum reaches: a file's sample rate promises more than is often in it."""

from __future__ import annotations

import numpy as np

from voice_library.frames import FloatArray

EDGE_DB = 70.0
"""A voice's own spectrum falls by 40 to 60 dB from its strongest band to 8 kHz; resamplers and codecs cut deeper,
and 16-bit rounding lies deeper still."""

_BAND_HZ = 250.0
_BLOCK_FRAMES = 1 << 10


def bandwidth_hz(frames: FloatArray, sample_rate: int) -> float:
    """The upper edge of the highest 250 Hz band within 70 dB of the strongest.

    Args:
        frames: float32 (N, size) of voice.
        sample_rate: Hz.
    """
    size = frames.shape[1]
    window = np.hanning(size)
    power = np.zeros(size // 2 + 1)
    for start in range(0, len(frames), _BLOCK_FRAMES):
        block = frames[start : start + _BLOCK_FRAMES]
        centred = (block - block.mean(axis=1, keepdims=True)) * window
        power += np.sum(np.abs(np.fft.rfft(centred, axis=1)) ** 2, axis=0)
    band = (np.arange(power.size) * sample_rate / size // _BAND_HZ).astype(int)
    mean_power = np.bincount(band, power) / np.maximum(np.bincount(band), 1)
    inside = np.flatnonzero(mean_power > mean_power.max() * 10 ** (-EDGE_DB / 10))
    highest = int(inside[-1]) + 1 if inside.size else 0
    return min(highest * _BAND_HZ, sample_rate / 2)
