"""Chunks of audio to one waveform, on the device: silence trimmed, levels matched, joined without a click.

Chunks come one after another, whole or piece by piece, and what is final is given out at once: joining holds one
chunk at most, however long the whole is, and gives the same samples however a chunk is cut into pieces.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.types import SAMPLE_RATE

EDGE_FADE_S = 0.005
"""Fade at a chunk's edge where silence follows: short enough to be unheard, long enough for no click."""

JOIN_S = 0.015
"""Chunks without a pause between them are heard together for so long, in equal power."""

SILENCE_DBFS = -50.0
"""A stretch below is silence that the model added, where a chunk begins or ends: speech, breath included, is louder."""
FRAME_SAMPLES = SAMPLE_RATE // 100
KEPT_BEFORE_FRAMES, KEPT_AFTER_FRAMES = 5, 10
"""Of that silence, what stays before and after the sound: a soft onset, a word dying away."""

CHUNKS_AHEAD = 4
"""So many chunks are looked at before one's level is decided: a quiet first one is known for what it is."""
MOST_GAIN_DB = 6.0
"""Chunks differ by a few dB; what differs more is meant to."""
ACTIVE_DB = 20.0
"""A chunk's level is that of its frames within so much of the loudest: pauses do not make it quieter."""
FEWEST_ACTIVE_FRAMES = 30
PEAK_LIMIT = 0.99

CROSSFADE_S = 0.08
"""Two stretches that overlap are heard together for so long: a few periods of the deepest voice."""


@dataclass(frozen=True)
class Clip:
    """A chunk's place in the whole.

    Args:
        pause_before_s, pause_after_s: silence around it, seconds.
        voice: chunks of one voice are brought to one level.
    """

    pause_before_s: float = 0.0
    pause_after_s: float = 0.0
    voice: str = ""


class Joins(Protocol):
    """Puts chunks together."""

    def push(self, samples: Tensor, *, is_end: bool) -> Tensor:
        """The next audio of the chunk whose turn it is; gives what is final."""

    def finish(self) -> Tensor:
        """The rest, after the last chunk."""

    @property
    def num_joined(self) -> int:
        """Chunks that have come to their end."""

    @property
    def spans_s(self) -> tuple[tuple[float, float], ...]:
        """Start and end of each of them in the whole, seconds."""


class Joiner:
    """Joins chunks in their order.

    Silence that the model added is trimmed where two chunks meet; it stays at the very beginning and end, so a single
    chunk comes out as it went in but for the fades of 5 ms. Where a pause follows, the chunk fades out and the next
    fades in; where none does, one fades into the other.

    Args:
        clips: all chunks.
        even_levels: bring each chunk to the median level of its voice's chunks up to some chunks ahead; takes whole
            chunks only.
    """

    def __init__(self, clips: Sequence[Clip], *, even_levels: bool = False) -> None:
        self._clips, self._even_levels = clips, even_levels
        self._levels: dict[str, list[float]] = {}
        self._ahead: deque[tuple[Tensor, float | None]] = deque()  # chunks, and their levels in dB
        self._num_taken = 0
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._num_out = 0
        self._tail: Tensor | None = None  # of the chunk before, to be faded into this one
        self._reset()

    def _reset(self) -> None:
        self._pending: Tensor | None = None  # of this chunk, from a frame's start on
        self._has_begun = False
        self._num_given = 0  # of this chunk's samples, in whole frames
        self._heard = 0  # up to which sample of the chunk there is sound

    @property
    def num_joined(self) -> int:
        """Chunks that have come to their end."""
        return len(self._ends)

    @property
    def spans_s(self) -> tuple[tuple[float, float], ...]:
        """Start and end of each joined chunk in the whole, seconds."""
        starts = self._starts[: len(self._ends)]
        return tuple((a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in zip(starts, self._ends, strict=True))

    def push(self, samples: Tensor, *, is_end: bool) -> Tensor:
        """Add the next samples of the chunk whose turn it is.

        Args:
            samples: float32 (n,) on the device.
            is_end: whether the chunk ends with them.

        Returns:
            float32 (m,): what is final now.
        """
        if not self._even_levels:
            return self._push(samples, is_end=is_end)
        assert is_end, "levels are those of whole chunks"
        self._look_at(samples)
        out = [samples.new_zeros(0)]
        while self._ahead and (len(self._ahead) > CHUNKS_AHEAD or self._num_taken == len(self._clips)):
            chunk, level_db = self._ahead.popleft()
            out.append(self._push(chunk * self._gain(chunk, level_db), is_end=True))
        return torch.cat(out)

    def _push(self, samples: Tensor, *, is_end: bool) -> Tensor:
        pending = samples if self._pending is None else torch.cat((self._pending, samples))
        out = [samples.new_zeros(0)]
        if not self._has_begun:
            start = self._onset(pending, is_end=is_end)
            if start is None:
                self._pending = pending
                return out[0]
            pending = self._begin(pending[start:], out)
        loud = _loud_frames(pending)
        if len(loud):
            self._heard = self._num_given + (int(loud[-1]) + 1) * FRAME_SAMPLES
        if is_end:
            self._end(pending, out)
        else:
            settled = self._num_settled(pending)
            self._num_given += settled
            self._pending = pending[settled:]
            out.append(pending[:settled])
        joined = torch.cat(out).clamp(-1.0, 1.0)
        self._num_out += len(joined)
        return joined

    def finish(self) -> Tensor:
        """What is left after the last chunk: nothing."""
        assert self.num_joined == len(self._clips), (self.num_joined, len(self._clips))
        return torch.zeros(0)

    # ------------------------------------------------------------------------------ a chunk's edges

    @property
    def _index(self) -> int:
        return len(self._ends)

    @property
    def _is_last(self) -> bool:
        return self._index == len(self._clips) - 1

    def _onset(self, pending: Tensor, *, is_end: bool) -> int | None:
        """Where the chunk begins to be heard; None while that is not known."""
        start: int | None = 0
        if self._index > 0:
            loud = _loud_frames(pending)
            silent = 0 if is_end else None
            start = max(0, int(loud[0]) - KEPT_BEFORE_FRAMES) * FRAME_SAMPLES if len(loud) else silent
        is_long_enough = start is not None and (is_end or len(pending) - start >= _samples(JOIN_S))
        return start if is_long_enough else None

    def _begin(self, pending: Tensor, out: list[Tensor]) -> Tensor:
        """The chunk's beginning, faded in or faded over from the chunk before."""
        self._has_begun = True
        before = pending.new_zeros(_samples(self._clips[self._index].pause_before_s))
        out.append(before)
        self._starts.append(self._num_out + len(before))
        pending = pending.clone()
        if self._tail is None:
            length = min(_samples(EDGE_FADE_S), len(pending))
            pending[:length] *= _raised_cosine(length, pending)
            return pending
        length = min(len(self._tail), len(pending))
        out.append(self._tail[: len(self._tail) - length])
        ramp = _quarter_sine(length, pending)
        pending[:length] = pending[:length] * ramp + self._tail[len(self._tail) - length :] * ramp.flip(0)
        self._tail = None
        return pending

    def _num_settled(self, pending: Tensor) -> int:
        """Samples, of whole frames, that stay as they are however the chunk goes on."""
        most = len(pending) - _samples(JOIN_S)
        if not self._is_last:
            most = min(most, self._num_kept - self._num_given - _samples(JOIN_S))
        return max(0, most) // FRAME_SAMPLES * FRAME_SAMPLES

    @property
    def _num_kept(self) -> int:
        """Samples of the chunk up to where its silence is cut, were it to end now."""
        return self._heard + KEPT_AFTER_FRAMES * FRAME_SAMPLES

    def _end(self, rest: Tensor, out: list[Tensor]) -> None:
        """Trim, fade out or keep the tail for the next chunk, and pause."""
        clip, is_last = self._clips[self._index], self._is_last
        if self._heard and not is_last:
            rest = rest[: self._num_kept - self._num_given]
        self._ends.append(self._num_out + sum(len(part) for part in out) + len(rest))
        if is_last or clip.pause_after_s > 0:
            length = min(_samples(EDGE_FADE_S), len(rest))
            rest = rest.clone()
            rest[len(rest) - length :] *= _raised_cosine(length, rest).flip(0)
            out += [rest, rest.new_zeros(_samples(clip.pause_after_s))]
        else:
            length = min(_samples(JOIN_S), len(rest))
            self._tail = rest[len(rest) - length :]
            out.append(rest[: len(rest) - length])
        self._reset()

    # ------------------------------------------------------------------------------ levels

    def _look_at(self, samples: Tensor) -> None:
        level_db = _level_db(samples)
        if level_db is not None:
            self._levels.setdefault(self._clips[self._num_taken].voice, []).append(level_db)
        self._ahead.append((samples, level_db))
        self._num_taken += 1

    def _gain(self, samples: Tensor, level_db: float | None) -> float:
        if level_db is None:
            return 1.0
        usual_db = statistics.median(self._levels[self._clips[self._index].voice])
        gain_db = min(max(usual_db - level_db, -MOST_GAIN_DB), MOST_GAIN_DB)
        return min(10 ** (gain_db / 20), max(1.0, PEAK_LIMIT / float(samples.abs().max())))


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


def _frame_energies(samples: Tensor) -> Tensor:
    """Mean square of each frame of 10 ms, the last filled up with silence."""
    padded = torch.nn.functional.pad(samples, (0, -len(samples) % FRAME_SAMPLES))
    return padded.reshape(-1, FRAME_SAMPLES).square().mean(dim=1)


def _loud_frames(samples: Tensor) -> Tensor:
    """Indexes of the frames that are not silence."""
    return (_frame_energies(samples) > 10 ** (SILENCE_DBFS / 10)).nonzero()[:, 0].cpu()


def _level_db(samples: Tensor) -> float | None:
    """How loud the speech is; None for what is too short to tell."""
    energies = _frame_energies(samples).cpu().double()
    active = energies[energies > max(float(energies.max()) * 10 ** (-ACTIVE_DB / 10), 10 ** (SILENCE_DBFS / 10))]
    return 10 * math.log10(float(active.mean())) if len(active) >= FEWEST_ACTIVE_FRAMES else None


def _raised_cosine(length: int, like: Tensor) -> Tensor:
    """From 0 to 1."""
    return (1 - torch.cos(torch.linspace(0, math.pi, length, device=like.device))) / 2


def _quarter_sine(length: int, like: Tensor) -> Tensor:
    """From 0 to 1, so that its square and that of its mirror image sum to one."""
    return torch.sin((torch.arange(length, device=like.device) + 0.5) * (math.pi / (2 * max(length, 1))))


@dataclass(frozen=True)
class Assembled:
    """Stretches as one.

    Args:
        waveform: float32 (T,) on the device.
        spans_s: start and end of each stretch in it, seconds.
    """

    waveform: Tensor
    spans_s: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Stretch:
    """A clip that reaches over into its neighbours.

    Args:
        waveform: float32 (T,) on the device.
        first: sample of the whole where it begins.
        start, end: samples of the whole that are its own; around both, it and its neighbour are heard together.
    """

    waveform: Tensor
    first: int
    start: int
    end: int


def crossfade(stretches: Sequence[Stretch], num_samples: int) -> Assembled:
    """Join stretches that overlap to exactly `num_samples`; what is missing is silence, what is over is cut off.

    Two renderings of one sound differ in phase, so their powers add up: the fades are a quarter of a sine, whose
    squares sum to one.
    """
    whole = stretches[0].waveform.new_zeros(stretches[-1].end)
    half = round(CROSSFADE_S * SAMPLE_RATE) // 2
    for index, stretch in enumerate(stretches):
        is_first, is_last = index == 0, index == len(stretches) - 1
        begin = stretch.first if is_first else stretch.start - half
        until = stretch.end if is_last else stretch.end + half
        part = stretch.waveform[begin - stretch.first : until - stretch.first].clone()
        ramp = _quarter_sine(2 * half, part)
        if not is_first:
            part[: 2 * half] *= ramp
        if not is_last:
            part[len(part) - 2 * half :] *= ramp.flip(0)
        whole[begin : begin + len(part)] += part
    waveform = fade_edges(whole[:num_samples]).clamp(-1.0, 1.0)
    waveform = torch.nn.functional.pad(waveform, (0, num_samples - len(waveform)))
    ends_s = [min(stretch.end, num_samples) / SAMPLE_RATE for stretch in stretches]
    spans = zip([stretch.start / SAMPLE_RATE for stretch in stretches], ends_s, strict=True)
    return Assembled(waveform, tuple(spans))


def fade_edges(waveform: Tensor) -> Tensor:
    """Raised-cosine fades at both ends."""
    length = min(_samples(EDGE_FADE_S), len(waveform) // 2)
    ramp = _raised_cosine(length, waveform)
    faded = waveform.clone()
    faded[:length] *= ramp
    faded[len(faded) - length :] *= ramp.flip(0)
    return faded
