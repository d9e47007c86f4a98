"""Recordings made of arithmetic: a voice of known pitch in phrases with pauses, in known noise."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
RATE_HZ = 24_000


def voice(duration_s: float, *, pitch_hz: float = 130.0, rate_hz: int = RATE_HZ, peak: float = 0.5) -> FloatArray:
    """float32 (T,) without pauses: harmonics up to 10 kHz falling by 12 dB per octave, syllables four a second."""
    period = _voice_period(pitch_hz, rate_hz)
    return np.resize(np.float32(peak) * period, round(duration_s * rate_hz))


@functools.cache
def _voice_period(pitch_hz: float, rate_hz: int) -> FloatArray:
    """(T,) ten seconds, after which a pitch of whole or half Hz, its swing and its syllables begin anew."""
    time_s = np.arange(10 * rate_hz) / rate_hz
    phase = 2 * np.pi * np.cumsum(pitch_hz * (1 + 0.04 * np.sin(2 * np.pi * 1.3 * time_s))) / rate_hz
    highest = min(10_000.0, 0.45 * rate_hz)
    # phases that grow with the square of the harmonic keep the peaks round, as a mouth does
    signal = sum(np.sin(k * phase + 0.1 * k * k) / k**1.5 for k in range(1, int(highest / pitch_hz)))
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s)
    return (signal * syllables / np.abs(signal).max()).astype(np.float32)


def noise(duration_s: float, level_dbfs: float, *, rate_hz: int = RATE_HZ, seed: int = 0) -> FloatArray:
    """float32 (T,) white, of a given RMS."""
    samples = np.random.default_rng(seed).standard_normal(round(duration_s * rate_hz))
    return (samples * 10 ** (level_dbfs / 20)).astype(np.float32)


def silence(duration_s: float, *, rate_hz: int = RATE_HZ) -> FloatArray:
    return np.zeros(round(duration_s * rate_hz), dtype=np.float32)


def speech(
    duration_s: float,
    *,
    noise_dbfs: float | None = -70.0,
    pitch_hz: float = 130.0,
    rate_hz: int = RATE_HZ,
    phrase_s: float = 1.6,
    pause_s: float = 0.4,
) -> FloatArray:
    """float32 (T,): phrases and pauses in turn, starting with a phrase, in white noise of `noise_dbfs`."""
    whole = voice(duration_s, pitch_hz=pitch_hz, rate_hz=rate_hz)
    time_s = np.arange(whole.size) / rate_hz
    whole[(time_s % (phrase_s + pause_s)) >= phrase_s] = 0.0
    return whole if noise_dbfs is None else whole + noise(duration_s, noise_dbfs, rate_hz=rate_hz)[: whole.size]
