"""HiFT: mel spectrogram to waveform (HiFTNet, Li et al. 2023, arXiv 2309.09493).

The module is laid out like upstream's `HiFTGenerator` with weight norm folded into plain weights at
load. Its sine source takes phases and noise as arguments: upstream draws them from the global
generator, here they belong to the utterance (see `SourceNoise`). Everything is float32, and the convolutions
are not causal, so utterances of different lengths are not padded into one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import noise
from engine.kernels import can_compile, snake
from engine.types import SAMPLE_RATE

NUM_HARMONICS = 8
SINE_AMPLITUDE = 0.1
NOISE_STD = 0.003
VOICED_THRESHOLD_HZ = 10.0
SAMPLES_PER_FRAME = 480
FFT_SIZE = 16
FFT_HOP = 4
UPSAMPLE_RATES = (8, 5, 3)
UPSAMPLE_KERNELS = (16, 11, 7)
RESBLOCK_KERNELS = (3, 7, 11)
SOURCE_KERNELS = (7, 7, 11)
DILATIONS = (1, 3, 5)
LEAKY_SLOPE = 0.1
AUDIO_LIMIT = 0.99
FADE_SAMPLES = SAMPLE_RATE // 50
"""An utterance begins with 20 ms of silence and a 20 ms fade-in, against spill-over from the prompt."""


class Snake(nn.Module):
    """x + sin²(αx)/α (Ziyin et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """Activate (rows, width, time); `in_place` allows to write over x."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and can_compile():
            return snake(x.contiguous(), self.alpha, in_place=in_place)
        alpha = self.alpha[:, None]
        # In place after the first product: these are the largest tensors there are, and fresh memory is what costs.
        return (x * alpha).sin_().square_().mul_(1.0 / (alpha + 1e-9)).add_(x)


class ResBlock(nn.Module):
    """Three dilated convolution pairs with residuals."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(width, width, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in DILATIONS)
        self.convs2 = nn.ModuleList(conv(1) for _ in DILATIONS)
        self.activations1 = nn.ModuleList(Snake(width) for _ in DILATIONS)
        self.activations2 = nn.ModuleList(Snake(width) for _ in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        for act1, conv1, act2, conv2 in zip(
            self.activations1, self.convs1, self.activations2, self.convs2, strict=True
        ):
            x = conv2(act2(conv1(act1(x)), in_place=True)).add_(x)
        return x


class F0Predictor(nn.Module):
    """Mel (rows, 80, frames) to fundamental frequency in Hz (rows, frames); 0 to 10 Hz means unvoiced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(80 if i == 0 else width, width, 3, padding=1) for i in range(5))
        self.out = nn.Linear(width, 1)

    def forward(self, mel: Tensor) -> Tensor:
        for conv in self.convs:
            mel = F.elu(conv(mel))
        return self.out(mel.transpose(1, 2)).squeeze(-1).abs()


@dataclass(frozen=True)
class SourceNoise:
    """The random part of the source, one per utterance.

    Args:
        phases: float32 (rows, 9, 1), initial phase of each harmonic in radians, the first 0.
        noise: float32 (rows, 1, samples), standard normal. Upstream draws one signal per harmonic, equally
            loud, and mixes them linearly; the mix is one normal signal, scaled by the norm of the weights.
    """

    phases: Tensor
    noise: Tensor

    @classmethod
    def from_seed(cls, seed: int, num_frames: int, device: torch.device, first_frame: int = 0) -> SourceNoise:
        low, high = (torch.tensor(part, dtype=torch.int64, device=device) for part in noise.split_seed(seed))
        harmonics = torch.arange(NUM_HARMONICS + 1, dtype=torch.int64, device=device)
        phases = (2.0 * noise.uniform(low, high, noise.STREAM_SOURCE_PHASE, harmonics * 0, harmonics) - 1.0) * math.pi
        phases[0] = 0.0
        size = (1, 1, num_frames * SAMPLES_PER_FRAME)
        offset = first_frame * SAMPLES_PER_FRAME
        return cls(phases[None, :, None], noise.normal(seed, noise.STREAM_SOURCE_NOISE, size, device, offset))


class Vocoder(nn.Module):
    """Mel to waveform.

    Args:
        width: channels after the first convolution.
        f0_width: channels of the F0 predictor.
    """

    def __init__(self, width: int, f0_width: int) -> None:
        super().__init__()
        widths = [width // 2 ** (i + 1) for i in range(len(UPSAMPLE_RATES))]
        self.f0_predictor = F0Predictor(f0_width)
        self.source_mix = nn.Linear(NUM_HARMONICS + 1, 1)
        self.conv_in = nn.Conv1d(80, width, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(2 * out, out, kernel, rate, padding=(kernel - rate) // 2)
            for out, rate, kernel in zip(widths, UPSAMPLE_RATES, UPSAMPLE_KERNELS, strict=True)
        )
        # The source is shortened to each stage's rate: 15, 3 and 1 spectrum frames per step.
        self.source_downs = nn.ModuleList(
            nn.Conv1d(FFT_SIZE + 2, out, *((1, 1, 0) if rate == 1 else (2 * rate, rate, rate // 2)))
            for out, rate in zip(widths, (15, 3, 1), strict=True)
        )
        self.source_resblocks = nn.ModuleList(
            ResBlock(out, kernel) for out, kernel in zip(widths, SOURCE_KERNELS, strict=True)
        )
        self.resblocks = nn.ModuleList(ResBlock(out, kernel) for out in widths for kernel in RESBLOCK_KERNELS)
        self.conv_out = nn.Conv1d(widths[-1], FFT_SIZE + 2, 7, padding=3)
        self.register_buffer("window", None, persistent=False)
        self.register_buffer("fade_in", None, persistent=False)

    def finish_loading(self, device: torch.device) -> None:
        """Compute what no checkpoint holds."""
        self.window = torch.hann_window(FFT_SIZE, periodic=True, device=device)
        ramp = (torch.cos(torch.linspace(math.pi, 0, FADE_SAMPLES, device=device)) + 1) / 2
        self.fade_in = torch.cat((torch.zeros(FADE_SAMPLES, device=device), ramp))

    def forward(self, mel: Tensor, source_noise: SourceNoise, *, fade_in: bool = True) -> Tensor:
        """Speak.

        Args:
            mel: float32 (rows, 80, frames), all rows of one length.
            source_noise: phases and noise of each row.
            fade_in: silence and fade the first 40 ms (an utterance's beginning).

        Returns:
            float32 (rows, 480 · frames) in [-0.99, 0.99].
        """
        waveform = self.decode(mel, self.make_source(mel, source_noise))
        if fade_in:
            length = min(waveform.shape[1], len(self.fade_in))
            waveform[:, :length] *= self.fade_in[:length]
        return waveform

    def make_source(self, mel: Tensor, source_noise: SourceNoise) -> Tensor:
        """The excitation: harmonics of F0 where voiced, noise elsewhere; (rows, 1, samples)."""
        f0 = self.track_f0(mel)
        return self.excite(f0, count_cycles(f0), source_noise)

    def track_f0(self, mel: Tensor) -> Tensor:
        """F0 of every sample in Hz: (rows, 1, samples)."""
        return self.f0_predictor(mel).repeat_interleave(SAMPLES_PER_FRAME, dim=1)[:, None]

    def excite(self, f0: Tensor, cycles: Tensor, source_noise: SourceNoise) -> Tensor:
        """The excitation of a pitch; `cycles` as `count_cycles` gives them."""
        sines = SINE_AMPLITUDE * torch.sin(2 * math.pi * cycles + source_noise.phases)
        is_voiced = (f0 > VOICED_THRESHOLD_HZ).float()
        noise_std = is_voiced * NOISE_STD + (1 - is_voiced) * SINE_AMPLITUDE / 3
        mixed = self.source_mix((sines * is_voiced).transpose(1, 2)).transpose(1, 2)
        return torch.tanh(mixed + self.source_mix.weight.norm() * noise_std * source_noise.noise)

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel and source to waveform, without the fade-in."""
        spectrum = torch.stft(source[:, 0], FFT_SIZE, FFT_HOP, FFT_SIZE, window=self.window, return_complex=True)
        spectrum = torch.cat((spectrum.real, spectrum.imag), dim=1)  # (rows, 18, samples / 4 + 1)
        x = self.conv_in(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu_(x, LEAKY_SLOPE))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            x.add_(self.source_resblocks[i](self.source_downs[i](spectrum)))
            first, *others = self.resblocks[i * len(RESBLOCK_KERNELS) : (i + 1) * len(RESBLOCK_KERNELS)]
            total = first(x)
            for block in others:
                total.add_(block(x))
            x = total.div_(len(RESBLOCK_KERNELS))
        x = self.conv_out(F.leaky_relu(x))
        magnitude = x[:, : FFT_SIZE // 2 + 1].exp().clip(max=1e2)
        phase = torch.sin(x[:, FFT_SIZE // 2 + 1 :])
        waveform = torch.istft(torch.polar(magnitude, phase), FFT_SIZE, FFT_HOP, FFT_SIZE, window=self.window)
        return waveform.clamp(-AUDIO_LIMIT, AUDIO_LIMIT)


def count_cycles(f0: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """Cycles of F0 and its harmonics up to each sample, modulo one: (rows, 9, samples).

    Args:
        f0: Hz, (rows, 1, samples).
        start: (rows, 9, 1) before the first sample.
    """
    harmonics = torch.arange(1, NUM_HARMONICS + 2, device=f0.device, dtype=torch.float32)[:, None]
    return (torch.cumsum(f0 * harmonics / SAMPLE_RATE, dim=-1) + start) % 1
