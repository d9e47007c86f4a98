"""A limiter: where the waveform would rise above a ceiling, it is turned down in time, and nowhere else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.audio.levels import CEILING_DBTP, REACH, heights
from engine.types import FloatArray

LOOK_AHEAD_S = 0.005
"""The gain begins to fall so long before a peak, and has risen again so long after it: fast enough to leave
the syllable as loud as it was, slow enough not to be heard as distortion."""

_SLAB = 1 << 13  # samples worked on at a time: what they need stays in the processor's cache
_MAX_OVERSHOOT = 3.0  # the curve between samples never rises higher above them: the sum of any |taps| is less


class Limiter:
    """Holds the true peaks of a waveform that comes in blocks under a ceiling.

    The gain at a sample depends on the samples up to 5 ms before and after it alone, so it is the same
    however the waveform is cut into blocks. Samples with no peak that near come out bit for bit as they
    went in.

    Args:
        sample_rate: Hz.
        ceiling_dbtp: highest true peak, dB relative to full scale.
    """

    def __init__(self, sample_rate: int, ceiling_dbtp: float = CEILING_DBTP) -> None:
        from scipy.ndimage import maximum_filter1d

        self._sliding_max = maximum_filter1d
        self._ceiling = 10 ** (ceiling_dbtp / 20)
        self._width = max(round(LOOK_AHEAD_S * sample_rate), 2)
        window = np.hanning(self._width + 2)[1:-1]
        self._window: NDArray[np.float64] = window / window.sum()
        self._margin = REACH + self._width - 1  # what a sample's gain depends on, on either side
        self._held: FloatArray = np.zeros(self._margin, np.float32)
        self._finished = False

    def push(self, block: FloatArray) -> FloatArray:
        """Take float32 (n,); give the samples that are settled, float32: in the end as many as came in."""
        assert not self._finished and block.ndim == 1, (self._finished, block.shape)
        samples = np.concatenate([self._held, np.asarray(block, np.float32)])
        num_settled = max(samples.size - 2 * self._margin, 0)
        self._held = samples[num_settled:]
        starts = range(0, num_settled, _SLAB)
        slabs = [samples[start : min(start + _SLAB, num_settled) + 2 * self._margin] for start in starts]
        return np.concatenate([np.zeros(0, np.float32), *map(self._limited, slabs)])

    def finish(self) -> FloatArray:
        """The samples that were still held, float32 (n,). Nothing may be pushed after it."""
        rest = self.push(np.zeros(self._margin, np.float32))
        self._finished = True
        return rest

    def _limited(self, samples: FloatArray) -> FloatArray:
        """Float32 (n + 2 * margin,) to (n,)."""
        inner = samples[self._margin : -self._margin]
        if np.abs(samples).max() * _MAX_OVERSHOOT <= self._ceiling:
            return inner
        return inner * (1 - self._attenuation(heights(samples))).astype(np.float32)

    def _attenuation(self, curve: FloatArray) -> NDArray[np.float64]:
        """One minus the gain, (n,), from the heights around each sample, (n + 2 * width - 2,).

        The most that any sample of a window needs, averaged over the windows that hold the sample: each
        of them needs at least what the sample does, so the average does.
        """
        needed = 1 - self._ceiling / np.maximum(curve.astype(np.float64), self._ceiling)
        centre = self._width // 2
        most = self._sliding_max(needed, self._width)[centre : needed.size - self._width + 1 + centre]
        return np.convolve(most, self._window, "valid")
