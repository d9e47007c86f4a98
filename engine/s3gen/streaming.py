"""A pass that is heard while its tokens are still coming.

Each time, the flow makes the mel of all tokens so far with the noise that the whole would have, and the vocoder speaks
what is new of it. The last tokens wait: the encoder looks three ahead, and the vocoder's convolutions some frames.
The source of the vocoder goes on where it was, in phase and in noise, and the new rendering fades in over the end of
the old one, so that a seam is a place like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.s3gen.flow import FRAMES_PER_TOKEN
from engine.s3gen.vocoder import SAMPLES_PER_FRAME, SourceNoise, Vocoder, count_cycles

LOOK_AHEAD_TOKENS = 3
"""Of the flow's encoder: the last tokens sound otherwise when more follow (upstream's `pre_lookahead_len`)."""
CONTEXT_FRAMES = 24
"""What the vocoder sees of the past: F0 reaches over 5 frames, its dilated convolutions over some 15."""
WAITING_FRAMES = 12
"""What waits at the end for its future: beyond them the waveform changes by less than -40 dB."""
SEAM_SAMPLES = SAMPLES_PER_FRAME
"""Over which the new rendering replaces the old one: 20 ms."""


@dataclass(frozen=True)
class StreamedPass:
    """The vocoder's side of one pass: what was spoken, and where its source stands.

    Args:
        seed: of the pass.
        num_frames: spoken so far.
        start: the first frame that the next rendering sees.
        f0: Hz of every sample of the frames from there to what was spoken, (1, 1, samples).
        cycles: of F0 and its harmonics before it, (1, 9, 1).
        tail: float32 (samples,) of the last rendering, behind what was spoken; None before the first.
    """

    seed: int
    num_frames: int = 0
    start: int = 0
    f0: Tensor | None = None
    cycles: Tensor | float = 0.0
    tail: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """Spoken so far."""
        return self.num_frames * SAMPLES_PER_FRAME

    def speak(self, vocoder: Vocoder, mel: Tensor, *, is_last: bool) -> tuple[Tensor, StreamedPass]:
        """Speak what is new.

        Args:
            vocoder: whose.
            mel: float32 (80, frames) of all tokens so far.
            is_last: whether no more tokens follow.

        Returns:
            float32 (samples,), behind what was spoken before; and the pass as it is then.
        """
        num_seen = mel.shape[1] if is_last else mel.shape[1] - FRAMES_PER_TOKEN * LOOK_AHEAD_TOKENS
        end = num_seen if is_last else num_seen - WAITING_FRAMES
        if end <= self.num_frames:
            assert not is_last or end == self.num_frames, (end, self.num_frames)
            return mel.new_zeros(0), self
        window = mel[None, :, self.start : num_seen]
        f0 = self._track_f0(vocoder, window)
        cycles = count_cycles(f0, self.cycles)
        noise = SourceNoise.from_seed(self.seed, window.shape[2], window.device, first_frame=self.start)
        audio = vocoder.decode(window, vocoder.excite(f0, cycles, noise))[0]
        done, until = (SAMPLES_PER_FRAME * (frame - self.start) for frame in (self.num_frames, end))
        spoken = self._joined(vocoder, audio[done:until])
        return spoken, self._moved_on(end, f0, cycles, audio[until : until + SEAM_SAMPLES])

    def _track_f0(self, vocoder: Vocoder, window: Tensor) -> Tensor:
        """As it was heard where it was heard: the source stands in one place only."""
        f0 = vocoder.track_f0(window)
        return f0 if self.f0 is None else torch.cat((self.f0, f0[:, :, self.f0.shape[2] :]), dim=2)

    def _joined(self, vocoder: Vocoder, new: Tensor) -> Tensor:
        """With what comes before: the old rendering's tail, or the silence that an utterance begins with."""
        new = new.clone()
        if self.tail is None:
            length = min(len(new), len(vocoder.fade_in))
            new[:length] *= vocoder.fade_in[:length]
            return new
        length = min(len(new), len(self.tail))
        ramp = (torch.arange(length, device=new.device) + 0.5) / length  # one sound twice: amplitudes add up
        new[:length] = new[:length] * ramp + self.tail[:length] * (1 - ramp)
        return new

    def _moved_on(self, end: int, f0: Tensor, cycles: Tensor, tail: Tensor) -> StreamedPass:
        start = max(self.start, end - CONTEXT_FRAMES)
        first, until = (SAMPLES_PER_FRAME * (frame - self.start) for frame in (start, end))
        before = cycles[:, :, first - 1 : first].clone() if first else self.cycles
        return StreamedPass(self.seed, end, start, f0[:, :, first:until].clone(), before, tail.clone())
