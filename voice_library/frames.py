"""A recording frame by frame: how loud, clipped or not, voice or pause.

What `quality` judges and `parts` cuts by. Levels alone tell voice from pause here: that needs no model,
and a reference is one voice recorded on purpose, not a street.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

FRAME_S = 0.02
"""Short enough that a plosive's closure is a frame of its own, long enough to hold a low voice's period."""

SILENCE_DBFS = -60.0
"""Below this nothing of a voice is left to imitate, whatever the rest of the recording is like."""

LOWEST_DBFS = -100.0
"""Levels stop here: under 16-bit audio's own rounding (-98 dBFS) there is nothing to compare."""

MIN_RANGE_DB = 6.0
"""Less between loud and quiet frames is a level that hardly changes: no pause shows where the noise lies."""

_QUIET_SHARE = 0.10
"""Read speech is a seventh to a third pauses, so its quietest tenth is noise."""

_LOUD_SHARE, _MAX_LOUD_FRAMES = 0.05, 100
"""The loudest twentieth, but at most two seconds, are vowels: that many there are in a long quiet recording too."""

_EDGE_RANGE_DB = 35.0
"""What lies further below the loudest frames is outside the recorded speech when it is at an edge."""

_VOICE_SHARE = 0.35
"""Where between noise (0) and voice (1), in dB, a frame begins to count as voice: consonants lie low."""

_FLAT_TOP_SAMPLES = 4
_FLAT_TOP_SHARE, _FLAT_TOLERANCE = 0.99, 1e-4
_FULL_SCALE = 1.0 - 2.0**-15
_BLOCK_FRAMES = 1 << 12


@dataclass(frozen=True, eq=False)
class Frames:
    """A recording's 20 ms frames; what is left over at its end belongs to none.

    Args:
        size: samples per frame.
        levels_dbfs: float64 (N,) RMS of each frame, a constant offset left out.
        clipped: float64 (N,) share of each frame's samples that are clipped.
        is_voice: bool (N,).
        noise_dbfs: level of the pauses; None when the level hardly changes.
    """

    size: int
    levels_dbfs: NDArray[np.float64]
    clipped: NDArray[np.float64]
    is_voice: BoolArray
    noise_dbfs: float | None

    @property
    def voice_s(self) -> float:
        return float(np.count_nonzero(self.is_voice)) * FRAME_S

    @property
    def voice_dbfs(self) -> float:
        """RMS over all frames of voice."""
        return mean_dbfs(self.levels_dbfs[self.is_voice])


def split_frames(audio: FloatArray, sample_rate: int) -> Frames:
    """Measure a recording's frames.

    Args:
        audio: float32 (T,) in [-1, 1], finite, at least one frame long.
        sample_rate: Hz.
    """
    size = int(FRAME_S * sample_rate)
    assert audio.size >= size, (audio.size, size)
    levels = _levels(audio, size)
    noise, threshold = _noise_and_threshold(levels)
    clipped = clipped_samples(audio)[: levels.size * size].reshape(-1, size).mean(axis=1)
    return Frames(size, levels, clipped, levels > threshold, noise)


def clipped_samples(audio: FloatArray) -> BoolArray:
    """(T,) which samples are cut off: at full scale, or on a flat top, four equal samples at the peak.

    Flat tops are found at any level, since recordings are often turned down after they were clipped.
    """
    magnitude = np.abs(audio)
    peak = float(magnitude.max(initial=0.0))
    is_clipped: BoolArray = magnitude >= _FULL_SCALE
    if peak <= 10 ** (SILENCE_DBFS / 20):
        return np.zeros(audio.size, dtype=np.bool_)
    is_flat = (magnitude[1:] >= _FLAT_TOP_SHARE * peak) & (np.abs(np.diff(audio)) <= _FLAT_TOLERANCE * peak)
    is_clipped[_in_runs(is_flat, _FLAT_TOP_SAMPLES - 1)] = True
    return is_clipped


def runs(mask: BoolArray) -> list[tuple[int, int]]:
    """Where a mask is true: (start, end) of each stretch, end excluded."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def mean_dbfs(levels_dbfs: NDArray[np.float64]) -> float:
    """Level of frames taken together: the mean of their powers."""
    if not levels_dbfs.size:
        return LOWEST_DBFS
    return float(10 * np.log10(np.mean(10 ** (levels_dbfs / 10))))


def _levels(audio: FloatArray, size: int) -> NDArray[np.float64]:
    frames = audio[: audio.size // size * size].reshape(-1, size)
    offset = np.mean(audio, dtype=np.float64)
    power = np.empty(len(frames))
    for start in range(0, len(frames), _BLOCK_FRAMES):  # in double precision, but never all of it at once
        block = slice(start, start + _BLOCK_FRAMES)
        power[block] = np.mean((frames[block] - offset) ** 2, axis=1)
    return 10 * np.log10(np.maximum(power, 10 ** (LOWEST_DBFS / 10)))


def _noise_and_threshold(levels: NDArray[np.float64]) -> tuple[float | None, float]:
    """The noise floor, and the level above which a frame is voice, both in dBFS.

    The floor is taken between the first and the last loud frame: silence that was added at the ends says
    nothing of the noise under the voice.
    """
    num_loud = min(max(int(_LOUD_SHARE * levels.size), 1), _MAX_LOUD_FRAMES)
    loud = float(np.partition(levels, -num_loud)[-num_loud])
    inside = np.flatnonzero(levels > loud - _EDGE_RANGE_DB)
    quiet = float(np.quantile(levels[inside[0] : inside[-1] + 1], _QUIET_SHARE)) if inside.size else loud
    if loud - quiet < MIN_RANGE_DB:
        return None, max(loud - 2 * MIN_RANGE_DB, SILENCE_DBFS)
    threshold = quiet + max(MIN_RANGE_DB, _VOICE_SHARE * (loud - quiet))
    return quiet, max(min(threshold, loud - MIN_RANGE_DB), SILENCE_DBFS)


def _in_runs(is_flat: BoolArray, min_length: int) -> BoolArray:
    """(T,) samples of the stretches in which at least `min_length` neighbours (T - 1,) are equal."""
    found = np.zeros(is_flat.size + 1, dtype=np.bool_)
    for start, end in runs(is_flat):
        if end - start >= min_length:
            found[start : end + 1] = True
    return found
