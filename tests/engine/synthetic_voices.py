"""Recordings made of arithmetic: a voice of known pitch, for tests that need one."""

from __future__ import annotations

import functools

import numpy as np

from engine.types import FloatArray, VoicePrompt


def sung_vowel(f0_hz: float, duration_s: float = 3.0, sample_rate: int = 24_000) -> FloatArray:
    """Two syllables a second of an open vowel, its pitch swinging 5 % around `f0_hz`. float32 (T,)."""
    return _sung_vowel(f0_hz, duration_s, sample_rate).copy()


@functools.cache
def _sung_vowel(f0_hz: float, duration_s: float, sample_rate: int) -> FloatArray:
    time_s = np.arange(int(duration_s * sample_rate)) / sample_rate
    pitch_hz = f0_hz * (1 + 0.05 * np.sin(2 * np.pi * 3 * time_s))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / sample_rate
    harmonics = range(1, int(4_000 / f0_hz))
    signal = sum(np.cos(k * phase) * (np.exp(-(((k * f0_hz - 600) / 500) ** 2)) + 0.3 / k) for k in harmonics)
    gated = signal * (np.sin(2 * np.pi * 2 * time_s) > -0.5)
    return (0.7 * gated / np.abs(gated).max()).astype(np.float32)


def prompt_of(f0_hz: float, duration_s: float = 3.0) -> VoicePrompt:
    return VoicePrompt(sung_vowel(f0_hz, duration_s), 24_000)
