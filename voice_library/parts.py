"""Which part of a recording is kept as a voice: the best 10 to 15 s, cut at pauses.

More is not better: Turbo hears the first 15 s of a reference, S3Gen the first 10, so of a longer recording
the start would count, good or bad. The part with the most speech and the least clipping and noise is taken.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voice_library.frames import FRAME_S, FloatArray, Frames, runs, split_frames

WANTED_S = (10.0, 15.0)

_MARGIN_S = 0.1
"""Kept of a pause on either side of the speech, so that no breath or fading end is cut."""

_MIN_PAUSE_S = 0.12
"""Shorter quiet stretches are closures inside words."""

_SNAP_S = 0.3
"""How far an edge moves to a quiet frame where there is no pause to cut at."""

_SPARE_S = 0.05
"""Kept beyond the shortest reference, so that it is longer than that after resampling too."""

_CLIPPING_WEIGHT, _NOISE_WEIGHT = 10.0, 0.5
"""Against speech, which counts 1 where it fills the part: 5 % of clipped samples outweigh half of the speech,
and a dB less noise is worth a hundredth of it."""

_CLEAN_DB = 50.0
"""A voice this far above its noise gains nothing from still less noise."""


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of a recording.

    Args:
        start_s, end_s: where it lies in the recording, seconds.
        audio: float32 (T,), a view of the recording.
    """

    start_s: float
    end_s: float
    audio: FloatArray


def choose_part(
    audio: FloatArray, sample_rate: int, wanted_s: tuple[float, float] = WANTED_S, *, min_s: float = 0.0
) -> Part:
    """Leave out the silence at both ends, and pick the best stretch of what is longer than wanted.

    Args:
        audio: float32 (T,) in [-1, 1], finite.
        sample_rate: Hz.
        wanted_s: the shortest and longest stretch to pick, seconds. What holds less speech is kept whole.
        min_s: more than this is kept, with silence if need be, of a recording that is longer than this.
    """
    assert 0 < wanted_s[0] <= wanted_s[1], wanted_s
    frames = split_frames(audio, sample_rate)
    start, end = _without_silent_ends(frames)
    longest = int(wanted_s[1] / FRAME_S)
    if end - start > longest:
        start, end = _best_stretch(frames, start, end, int(np.ceil(wanted_s[0] / FRAME_S)), longest)
    first, last = _samples(frames, audio.size, start, end)
    first, last = _widened(first, last, audio.size, int((min_s + _SPARE_S) * sample_rate) if min_s else 0)
    return Part(first / sample_rate, last / sample_rate, audio[first:last])


def _without_silent_ends(frames: Frames) -> tuple[int, int]:
    voiced = np.flatnonzero(frames.is_voice)
    total = frames.is_voice.size
    if not voiced.size:
        return 0, total
    margin = round(_MARGIN_S / FRAME_S)
    return max(int(voiced[0]) - margin, 0), min(int(voiced[-1]) + 1 + margin, total)


def _samples(frames: Frames, num_samples: int, start: int, end: int) -> tuple[int, int]:
    """Frames as samples; the last frame takes along what is left over behind it."""
    is_last = end == frames.is_voice.size
    return start * frames.size, num_samples if is_last else end * frames.size


def _widened(first: int, last: int, num_samples: int, at_least: int) -> tuple[int, int]:
    """Grown evenly to both sides, as far as there is audio."""
    length = max(last - first, min(at_least, num_samples))
    first -= (length - (last - first)) // 2
    first = min(max(first, 0), num_samples - length)
    return first, first + length


def _best_stretch(frames: Frames, start: int, end: int, shortest: int, longest: int) -> tuple[int, int]:
    """The best of all stretches between two pauses; without any of that length, cut where it is quietest."""
    score = _Score(frames, longest)
    stretches = list(_between_pauses(frames, start, end, shortest, longest))
    if stretches:
        return max(stretches, key=lambda stretch: score(*stretch))
    hop = max(round(_MARGIN_S / FRAME_S), 1)
    anywhere = [(first, first + longest) for first in range(start, end - longest + 1, hop)]
    first, last = max(anywhere, key=lambda stretch: score(*stretch))
    reach = min(round(_SNAP_S / FRAME_S), (longest - shortest) // 2)
    return _quietest(frames, first, first + reach), _quietest(frames, last - reach, last)


def _quietest(frames: Frames, start: int, end: int) -> int:
    return start + int(np.argmin(frames.levels_dbfs[start : end + 1]))


def _between_pauses(frames: Frames, start: int, end: int, shortest: int, longest: int) -> Iterator[tuple[int, int]]:
    """(start, end) of stretches of the right length that begin after a pause and end before one."""
    margin, min_pause = round(_MARGIN_S / FRAME_S), round(_MIN_PAUSE_S / FRAME_S)
    pauses = [pause for pause in runs(~frames.is_voice) if pause[1] - pause[0] >= min_pause]
    inside = [(first, last) for first, last in pauses if first > start and last < end]
    starts = [start, *(max(last - margin, first) for first, last in inside)]
    ends = [*(min(first + margin, last) for first, last in inside), end]
    for first in starts:
        low, high = bisect.bisect_left(ends, first + shortest), bisect.bisect_right(ends, first + longest)
        yield from ((first, last) for last in ends[low:high])


class _Score:
    """How good a stretch of frames is; from running sums, since there are many stretches.

    Args:
        frames: of the whole recording.
        longest: frames of a part that is as long as wanted.
    """

    def __init__(self, frames: Frames, longest: int) -> None:
        power = 10 ** (frames.levels_dbfs / 10)
        self._longest = longest
        self._num_voice = _running_sum(frames.is_voice)
        self._clipped = _running_sum(frames.clipped)
        self._voice_power = _running_sum(np.where(frames.is_voice, power, 0.0))
        self._pause_power = _running_sum(np.where(frames.is_voice, 0.0, power))

    def __call__(self, start: int, end: int) -> float:
        num_voice = _between(self._num_voice, start, end)
        clipped = _between(self._clipped, start, end) / (end - start)
        cleanness = self._snr_db(start, end, num_voice) / _CLEAN_DB
        return num_voice / self._longest - _CLIPPING_WEIGHT * clipped + _NOISE_WEIGHT * cleanness

    def _snr_db(self, start: int, end: int, num_voice: float) -> float:
        """Voice over pauses, 0 to `_CLEAN_DB`; 0 where there is only one of them."""
        num_pause = end - start - num_voice
        if not num_voice or not num_pause:
            return 0.0
        voice = _between(self._voice_power, start, end) / num_voice
        pause = _between(self._pause_power, start, end) / num_pause
        return float(np.clip(10 * np.log10(max(voice, 1e-12) / max(pause, 1e-12)), 0.0, _CLEAN_DB))


def _running_sum(values: NDArray) -> NDArray[np.float64]:
    return np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))


def _between(sums: NDArray[np.float64], start: int, end: int) -> float:
    return float(sums[end] - sums[start])
