"""Chunks of audio to one waveform, on the device, with one copy to the host at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.types import SAMPLE_RATE, FloatArray

EDGE_FADE_S = 0.005
"""Fade at a chunk's edge where silence follows: short enough to be unheard, long enough for no click."""

CROSSFADE_S = 0.08
"""Two stretches that overlap are heard together for so long: a few periods of the deepest voice."""


@dataclass(frozen=True)
class Clip:
    """One chunk's audio.

    Args:
        waveform: float32 (T,) on the device.
        pause_after_s: silence behind it.
        pause_before_s: silence before it.
    """

    waveform: Tensor
    pause_after_s: float = 0.0
    pause_before_s: float = 0.0


@dataclass(frozen=True)
class Assembled:
    """The joined audio.

    Args:
        waveform: float32 (T,) on the host.
        spans_s: start and end of each clip in it, seconds.
    """

    waveform: FloatArray
    spans_s: tuple[tuple[float, float], ...]


def assemble(clips: Sequence[Clip]) -> Assembled:
    """Join clips with their pauses; edges fade over 5 ms, so that no join clicks."""
    parts: list[Tensor] = []
    spans: list[tuple[float, float]] = []
    position = 0
    for clip in clips:
        waveform = fade_edges(clip.waveform)
        before, after = (round(s * SAMPLE_RATE) for s in (clip.pause_before_s, clip.pause_after_s))
        parts += [waveform.new_zeros(before), waveform, waveform.new_zeros(after)]
        start = position + before
        spans.append((start / SAMPLE_RATE, (start + len(waveform)) / SAMPLE_RATE))
        position = start + len(waveform) + after
    return Assembled(torch.cat(parts).cpu().numpy(), tuple(spans))


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
        ramp = torch.sin((torch.arange(2 * half, device=part.device) + 0.5) * (math.pi / (4 * half)))
        if not is_first:
            part[: 2 * half] *= ramp
        if not is_last:
            part[len(part) - 2 * half :] *= ramp.flip(0)
        whole[begin : begin + len(part)] += part
    waveform = fade_edges(whole[:num_samples]).clamp(-1.0, 1.0)
    waveform = torch.nn.functional.pad(waveform, (0, num_samples - len(waveform)))
    ends_s = [min(stretch.end, num_samples) / SAMPLE_RATE for stretch in stretches]
    spans = zip([stretch.start / SAMPLE_RATE for stretch in stretches], ends_s, strict=True)
    return Assembled(waveform.cpu().numpy(), tuple(spans))


def fade_edges(waveform: Tensor) -> Tensor:
    """Raised-cosine fades at both ends."""
    length = min(round(EDGE_FADE_S * SAMPLE_RATE), len(waveform) // 2)
    ramp = (1 - torch.cos(torch.linspace(0, math.pi, length, device=waveform.device))) / 2
    faded = waveform.clone()
    faded[:length] *= ramp
    faded[len(faded) - length :] *= ramp.flip(0)
    return faded
