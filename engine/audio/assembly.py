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


def fade_edges(waveform: Tensor) -> Tensor:
    """Raised-cosine fades at both ends."""
    length = min(round(EDGE_FADE_S * SAMPLE_RATE), len(waveform) // 2)
    ramp = (1 - torch.cos(torch.linspace(0, math.pi, length, device=waveform.device))) / 2
    faded = waveform.clone()
    faded[:length] *= ramp
    faded[len(faded) - length :] *= ramp.flip(0)
    return faded
