"""How loud a waveform is, measured block by block: hours of audio are never held, only what was found in them."""

from __future__ import annotations

import copy
import math
from array import array

import numpy as np
from numpy.typing import NDArray

from engine.errors import SpeechError
from engine.types import FloatArray

NORMALIZATIONS = ("none", "peak", "rms", "loudness")

CEILING_DBTP = -1.0
"""No normalised audio has a true peak above this: lossy formats overshoot a little, and must not clip."""

RMS_DBFS = -20.0
"""RMS level of mode "rms": about 6 dB below full-scale speech with its usual peaks."""

DEFAULT_LUFS = -16.0
"""Loudness of mode "loudness": the usual recommendation for mono and mobile spoken word."""

MAX_MAKEUP_DB = 3.0
"""Gain beyond the plain one that may make up for what a limiter takes: with more, speech sounds flattened."""

REACH = 24
"""Samples on either side that the curve between two samples is computed from."""

_STEPS_PER_S = 10  # loudness is gated in blocks of four such steps, each a step after the last
_FRAMES_PER_STEP = 20  # of 5 ms, about as long as a limiter holds a peak down
_STEPS_PER_BLOCK = 4
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_LU = -10.0
_LUFS_OFFSET = -0.691

_LOWEST_DBFS, _HIGHEST_DBFS, _BINS_PER_DB = -120, 40, 10
_MAKEUP_STEP_DB = 0.05


def check_normalization(mode: str, loudness_lufs: float = DEFAULT_LUFS) -> None:
    """Refuse a level that cannot be asked for.

    Raises:
        SpeechError: invalid_request (fields audio_normalization, loudness_lufs).
    """
    if mode not in NORMALIZATIONS:
        message = f"audio_normalization: expected one of {', '.join(NORMALIZATIONS)}, got {mode!r}"
        raise SpeechError("invalid_request", message, "audio_normalization")
    if not (math.isfinite(loudness_lufs) and -70 <= loudness_lufs <= 0):
        message = f"loudness_lufs: expected a number from -70 to 0, got {loudness_lufs!r}"
        raise SpeechError("invalid_request", message, "loudness_lufs")


class LevelMeter:
    """Measures a waveform that comes in blocks; how it is cut into blocks changes nothing.

    Holds two numbers per 0.1 s of audio (6 MB for nine hours). Every figure can be asked for at any
    time and is that of the audio so far.

    Args:
        sample_rate: Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        import pyloudnorm  # imports scipy's filters: only where a level is asked for

        filters = pyloudnorm.Meter(sample_rate)._filters.values()  # K-weighting, as that library designs it
        self._sections = np.array([[*stage.b, *stage.a] for stage in filters])
        self._filter_state = np.zeros((len(self._sections), 2))
        self._rate = sample_rate
        self._num_samples = 0
        self._num_frames = 0
        self._waiting: FloatArray = np.zeros(REACH, np.float32)  # unmeasured samples, and REACH before them
        self._start: FloatArray = np.zeros(0, np.float32)  # while it is shorter than a gating block
        self._weighted = array("d")  # K-weighted energy of each step
        self._energies = array("d")  # energy of each step
        self._by_peak = np.zeros((2, (_HIGHEST_DBFS - _LOWEST_DBFS) * _BINS_PER_DB + 1))
        self._peak = 0.0
        self._true_peak = 0.0

    def push(self, block: FloatArray) -> None:
        """Measure the next float32 (n,)."""
        assert block.ndim == 1, block.shape
        if self._num_samples < self._block_samples:
            self._start = np.concatenate([self._start, block[: self._block_samples]])
        self._num_samples += block.size
        self._peak = max(self._peak, float(np.abs(block).max(initial=0.0)))
        self._waiting = np.concatenate([self._waiting, np.asarray(block, np.float32)])
        whole_steps = (_STEPS_PER_S * (self._num_samples - REACH + 1) - 1) // self._rate
        self._measure(until_frame=whole_steps * _FRAMES_PER_STEP)

    def lufs(self) -> float:
        """Integrated loudness after ITU-R BS.1770-4; -inf where all of it is below the gate.

        Audio shorter than the 0.4 s of a gating block is measured as if repeated to that length.
        """
        if self._num_samples < self._block_samples:
            repeated = LevelMeter(self._rate)
            repeated.push(np.resize(self._start, self._block_samples))
            return repeated.lufs()
        # a last step that is more than half there counts as one, as in pyloudnorm
        num_blocks = round(self._num_samples * _STEPS_PER_S / self._rate) - _STEPS_PER_BLOCK + 1
        sums = np.convolve(self._settled()._weighted, np.ones(_STEPS_PER_BLOCK), "valid")[:num_blocks]
        return _gated(sums * _STEPS_PER_S / (_STEPS_PER_BLOCK * self._rate))

    def rms_dbfs(self) -> float:
        """Level of the root of the mean square; 0 is a full-scale square wave, silence is -inf."""
        return _decibels(math.fsum(self._settled()._energies) / max(self._num_samples, 1))

    def peak(self) -> float:
        """Highest sample, 1 at full scale."""
        return self._peak

    def true_peak(self) -> float:
        """Highest point of the curve through the samples, 1 at full scale: see `heights`."""
        return self._settled()._true_peak

    def gain_db(self, mode: str, loudness_lufs: float = DEFAULT_LUFS) -> float:
        """The gain that reaches a level; 0 for silence.

        "rms" and "loudness" are meant for a limiter behind the gain. What that will take away is
        foreseen from how much of the energy lies in frames of 5 ms with how high a peak, and added,
        up to `MAX_MAKEUP_DB`.

        Args:
            mode: "none"; "peak" (true peak at -1 dBTP); "rms" (RMS at -20 dBFS); "loudness"
                (integrated loudness at `loudness_lufs`).
            loudness_lufs: -70 to 0.

        Raises:
            SpeechError: invalid_request, see `check_normalization`.
        """
        check_normalization(mode, loudness_lufs)
        if mode == "none" or self._peak == 0.0:
            return 0.0
        if mode == "peak":
            return CEILING_DBTP - _decibels(self.true_peak() ** 2)
        level = self.rms_dbfs() if mode == "rms" else self.lufs()
        if not math.isfinite(level):
            return 0.0
        plain_db = (RMS_DBFS if mode == "rms" else loudness_lufs) - level
        return plain_db + self._makeup_db(plain_db, 0 if mode == "rms" else 1)

    def _makeup_db(self, plain_db: float, weighting: int) -> float:
        """What to add to a gain so that the level is still reached behind a limiter.

        Args:
            plain_db: the gain that would reach it without one.
            weighting: 0 for the plain energy, 1 for the K-weighted.
        """
        by_peak = self._settled()._by_peak[weighting]
        filled = np.flatnonzero(by_peak)
        peaks_dbfs = filled / _BINS_PER_DB + _LOWEST_DBFS
        makeup_db = np.arange(0.0, MAX_MAKEUP_DB + _MAKEUP_STEP_DB / 2, _MAKEUP_STEP_DB)
        over_db = np.maximum(peaks_dbfs + plain_db + makeup_db[:, None] - CEILING_DBTP, 0.0)  # (gains, bins)
        left = 10 ** (-over_db / 10) @ by_peak[filled] / by_peak.sum()
        return float(np.interp(0.0, makeup_db + 10 * np.log10(left), makeup_db))

    @property
    def _block_samples(self) -> int:
        """Samples of a gating block: shorter audio has no loudness."""
        return math.ceil(_STEPS_PER_BLOCK * self._rate / _STEPS_PER_S)

    def _settled(self) -> LevelMeter:
        """A copy that has measured what still waits, as if silence followed."""
        settled = copy.deepcopy(self)
        settled._waiting = np.pad(self._waiting, (0, REACH))
        settled._measure(until_frame=-(-self._num_samples * _STEPS_PER_S * _FRAMES_PER_STEP // self._rate))
        return settled

    def _measure(self, until_frame: int) -> None:
        """Take in the waiting samples of all frames before this one."""
        from scipy.signal import sosfilt

        if until_frame <= self._num_frames:
            return
        frames = np.arange(self._num_frames, until_frame + 1)
        edges = np.minimum(frames * self._rate // (_STEPS_PER_S * _FRAMES_PER_STEP), self._num_samples)
        starts, size = edges[:-1] - edges[0], int(edges[-1] - edges[0])
        samples = self._waiting[REACH : REACH + size].astype(np.float64)
        weighted, self._filter_state = sosfilt(self._sections, samples, zi=self._filter_state)
        energies = np.stack([np.add.reduceat(part * part, starts) for part in (samples, weighted)])  # (2, frames)
        self._note(energies, np.maximum.reduceat(heights(self._waiting[: size + 2 * REACH]), starts))
        self._waiting = self._waiting[size:]
        self._num_frames = until_frame

    def _note(self, energies: NDArray[np.float64], peaks: FloatArray) -> None:
        """Keep the figures of frames: their energies, plain and weighted (2, frames), and true peaks (frames,)."""
        self._true_peak = max(self._true_peak, float(peaks.max()))
        bins = np.rint((20 * np.log10(np.maximum(peaks, 1e-30)) - _LOWEST_DBFS) * _BINS_PER_DB)
        bins = np.clip(bins, 0, self._by_peak.shape[1] - 1).astype(np.intp)
        steps = np.arange(0, peaks.size, _FRAMES_PER_STEP)
        for kept, by_peak, energy in zip((self._energies, self._weighted), self._by_peak, energies, strict=True):
            kept.extend(np.add.reduceat(energy, steps))
            np.add.at(by_peak, bins, energy)  # one after the other, however many come at once


def _gated(powers: NDArray[np.float64]) -> float:
    """Loudness of the mean of those gating blocks that are loud enough, from their mean squares (N,)."""
    loudness = _LUFS_OFFSET + 10 * np.log10(np.maximum(powers, 1e-30))
    loud = loudness >= _ABSOLUTE_GATE_LUFS
    if not loud.any():
        return -math.inf
    relative_gate = _LUFS_OFFSET + _decibels(float(powers[loud].mean())) + _RELATIVE_GATE_LU
    return _LUFS_OFFSET + _decibels(float(powers[loud & (loudness > relative_gate)].mean()))


def _decibels(power: float) -> float:
    return 10 * math.log10(power) if power > 0.0 else -math.inf


def heights(samples: FloatArray) -> FloatArray:
    """How high the curve through the samples rises around each of them, on either side.

    The curve is read at four points per sample (ITU-R BS.1770-4, annex 2), each from the 48 samples
    around it, where the standard's example takes 12: flat to 0.04 dB up to 11 kHz of audio at 24 kHz.

    Args:
        samples: float32 (n + 2 * REACH,).

    Returns:
        float32 (n,), without the first and the last `REACH`.
    """
    before, half, after = (np.convolve(samples, taps, "valid") for taps in _TAPS)  # (n + 1,) each
    curve = np.abs(samples[REACH:-REACH])
    for between in (before[:-1], half[:-1], half[1:], after[1:]):
        np.maximum(curve, np.abs(between), out=curve)
    return curve


def _taps(offset: float) -> FloatArray:
    """Windowed sinc that reads the curve `offset` samples before a sample, as `np.convolve` takes it."""
    distances = np.arange(-REACH, REACH) + offset
    window = np.i0(5.0 * np.sqrt(1 - (distances / REACH) ** 2))  # Kaiser's, its side lobes 50 dB down
    taps = np.sinc(distances) * window
    taps = (taps / taps.sum())[::-1].astype(np.float32)
    taps.setflags(write=False)
    return taps


_TAPS = (_taps(0.25), _taps(0.5), _taps(0.75))  # before the sample; the last is a quarter after the one before
