"""How high a voice is: the median fundamental frequency of a recording.

The draft voice needs one robust number per voice, not a contour, so this is autocorrelation on numpy
alone. (librosa's pyin answers the same question, but compiles for seconds in a fresh process.)
"""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

from engine.types import FloatArray

MIN_HZ = 60.0
MAX_HZ = 500.0
"""Where the median pitch of speaking voices lies, from deep male to small child."""

_RATE_HZ = 16_000
_WINDOW = int(0.05 * _RATE_HZ)  # three periods of the deepest voice
_HOP = int(0.01 * _RATE_HZ)
_FFT = 1 << (2 * _WINDOW - 1).bit_length()

_MAX_ANALYSED_S = 20.0
_MIN_VOICED_FRAMES = 5
_MIN_PERIODICITY = 0.6
_OCTAVE_COST = 0.02
_FLOOR_DB = -35.0


def median_f0(audio: FloatArray, sample_rate: int) -> float | None:
    """Median fundamental frequency of the voiced frames.

    Autocorrelation normalised by that of its window, with a cost per octave of lag, after P. Boersma,
    "Accurate short-term analysis of the fundamental frequency and the harmonics-to-noise ratio of a
    sampled sound", IFA Proceedings 17 (1993), without its path finding: the median does that work.

    Args:
        audio: float (T,) mono; the first 20 s that are not silence are looked at.
        sample_rate: Hz.

    Returns:
        Hz from 60 to 500, or None where nothing is voiced (silence, noise, a whisper).
    """
    loud = _loud_frames(_bounded(audio, sample_rate))
    if not len(loud):
        return None
    periodicity, f0_hz = _best_lags(_normalised_autocorrelation(loud))
    voiced = f0_hz[periodicity > _MIN_PERIODICITY]
    return float(np.median(voiced)) if voiced.size >= _MIN_VOICED_FRAMES else None


def _bounded(audio: FloatArray, sample_rate: int) -> FloatArray:
    """The part to look at, at the analysis rate."""
    sounding = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max(initial=0.0))
    start = int(sounding[0]) if sounding.size else 0
    part = audio[start : start + int(_MAX_ANALYSED_S * sample_rate)]
    return soxr.resample(np.asarray(part, np.float32), sample_rate, _RATE_HZ)


def _loud_frames(audio: FloatArray) -> FloatArray:
    """Frames (N, window) without their mean, those far below the loudest left out."""
    if audio.size < _WINDOW:
        return np.empty((0, _WINDOW), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(audio, _WINDOW)[::_HOP]
    frames = frames - frames.mean(axis=1, keepdims=True)
    level = np.sqrt(np.mean(frames**2, axis=1))
    return frames[(level > level.max() * 10 ** (_FLOOR_DB / 20)) & (level > 1e-6)]


def _normalised_autocorrelation(frames: FloatArray) -> NDArray[np.float64]:
    """Periodicity by lag, (N, window): 1 where a frame repeats itself exactly."""
    window = np.hanning(_WINDOW)
    correlation = _autocorrelation(frames * window)
    of_window = _autocorrelation(window[None])
    return correlation / correlation[:, :1] / np.maximum(of_window / of_window[:, :1], 1e-3)


def _autocorrelation(frames: NDArray) -> NDArray[np.float64]:
    return np.fft.irfft(np.abs(np.fft.rfft(frames, _FFT, axis=1)) ** 2, axis=1)[:, :_WINDOW]


def _best_lags(correlation: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each frame its best periodicity (N,) and the frequency of that lag in Hz (N,)."""
    low, high = int(_RATE_HZ / MAX_HZ), int(_RATE_HZ / MIN_HZ)
    lags = np.arange(low, high + 1)
    before, here, after = (correlation[:, low + shift : high + 1 + shift] for shift in (-1, 0, 1))
    is_peak = (here >= before) & (here >= after)
    # a period's multiples repeat as well as the period does: the shortest of equals is the pitch
    score = np.where(is_peak, here - _OCTAVE_COST * np.log2(lags / low), -np.inf)
    best = np.arange(len(score)), score.argmax(axis=1)
    curvature = before[best] - 2 * here[best] + after[best]
    offset = 0.5 * (before[best] - after[best]) / np.where(curvature == 0, -1.0, curvature)
    periodicity = np.where(np.isfinite(score[best]), here[best], 0.0)
    return periodicity, _RATE_HZ / (lags[best[1]] + np.clip(offset, -0.5, 0.5))
