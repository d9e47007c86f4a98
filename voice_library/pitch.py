"""A cheap hint at a second speaker: long stretches of voice at pitches far apart.

Without a model, two voices of like pitch cannot be told apart, and one voice may sweep an octave within a
sentence; so only turns of seconds, half an octave or more apart, count, and no finding is no promise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from voice_library.frames import FRAME_S, FloatArray, Frames

MIN_APART_OCTAVES = 0.6
"""Between the median pitches: men's and women's lie 0.7 to 0.9 octaves apart, one reader's sentences 0.3."""

MIN_SHARE = 0.2
"""Of all turns that the rarer speaker takes; less may be a quotation read in another voice."""

_TURN_S = 1.5
_MIN_VOICED_IN_TURN = 0.3
_LOWEST_HZ, _HIGHEST_HZ = 70.0, 400.0
_MIN_PERIODICITY = 0.5
"""Of the normalised autocorrelation: vowels reach 0.8, noise stays below 0.4."""

_MIN_TURNS = 4
_BLOCK_FRAMES = 1 << 10


def count_speakers(audio: FloatArray, sample_rate: int, frames: Frames) -> int | None:
    """2 when turns of 1.5 s fall into two groups of pitch, far apart and each tight; None when that is not told.

    Args:
        audio: float32 (T,).
        sample_rate: Hz.
        frames: of that audio.
    """
    pitch = _frame_pitch(audio, sample_rate, frames)
    turns = np.sort(_turn_pitch(np.log2(pitch)))  # octaves
    if turns.size < _MIN_TURNS:
        return None
    gaps = np.diff(turns)
    at = int(np.argmax(gaps)) + 1
    low, high = turns[:at], turns[at:]
    is_two = min(low.size, high.size) >= MIN_SHARE * turns.size and min(low.size, high.size) >= 2
    return 2 if is_two and np.median(high) - np.median(low) >= MIN_APART_OCTAVES and gaps.max() >= 0.25 else None


def _turn_pitch(octaves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of each 1.5 s that is voiced enough; NaN frames have no pitch."""
    size = int(_TURN_S / FRAME_S)
    turns = octaves[: octaves.size // size * size].reshape(-1, size)
    voiced = [turn[~np.isnan(turn)] for turn in turns]
    return np.array([np.median(turn) for turn in voiced if turn.size >= _MIN_VOICED_IN_TURN * size])


def _frame_pitch(audio: FloatArray, sample_rate: int, frames: Frames) -> NDArray[np.float64]:
    """Hz of each frame by the peak of its normalised autocorrelation over 40 ms; NaN where there is none."""
    step = max(sample_rate // 8_000, 1)  # a mean of neighbours is filter enough to find a pitch below 400 Hz
    thin = audio[: audio.size // step * step].reshape(-1, step).mean(axis=1)
    rate = sample_rate / step
    width, num_frames = int(2 * FRAME_S * rate), frames.is_voice.size
    pitch = np.full(num_frames, np.nan)
    starts = (np.arange(num_frames) * frames.size / step).astype(int)
    usable = np.flatnonzero(frames.is_voice & (starts + width <= thin.size))
    for first in range(0, usable.size, _BLOCK_FRAMES):
        chosen = usable[first : first + _BLOCK_FRAMES]
        pitch[chosen] = _pitch_of(thin[starts[chosen][:, None] + np.arange(width)], rate)
    return pitch


def _pitch_of(windows: NDArray, rate: float) -> NDArray[np.float64]:
    """(N, width) → Hz (N,)."""
    width = windows.shape[1]
    centred = windows - windows.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, 2 * width, axis=1)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2, axis=1)[:, :width]
    overlap = 1.0 - np.arange(width) / width
    correlation /= np.maximum(correlation[:, :1], 1e-12) * np.maximum(overlap, 0.1)
    low, high = int(rate / _HIGHEST_HZ), min(int(rate / _LOWEST_HZ) + 1, width - 1)
    lags = _first_peak(correlation[:, low:high]) + low
    periodic = correlation[np.arange(len(lags)), lags] >= _MIN_PERIODICITY
    return np.where(periodic, rate / lags, np.nan)


def _first_peak(correlation: NDArray) -> NDArray[np.intp]:
    """The shortest lag that is nearly as good as the best: twice a period fits as well as once."""
    best = correlation.max(axis=1, keepdims=True)
    is_peak = correlation >= 0.9 * best
    first = np.argmax(is_peak, axis=1)
    # up the slope that the first sample over the bar lies on
    for _ in range(correlation.shape[1] // 4):
        ahead = np.minimum(first + 1, correlation.shape[1] - 1)
        rises = correlation[np.arange(len(first)), ahead] > correlation[np.arange(len(first)), first]
        if not rises.any():
            break
        first = np.where(rises, ahead, first)
    return first
