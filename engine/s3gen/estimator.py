"""The flow's estimator: the velocity that carries noise to a mel spectrogram.

Upstream's `ConditionalDecoder` (a causal U-Net whose single level keeps the length) without its masks
where nothing is padded, without the host sync in each block, and with query, key and value in one
product. Activations are (rows, frames, channels). Padding lies on the right, where the convolutions
never look: only attention needs a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import attend_fully, can_compile

NUM_HEADS = 8
INNER_WIDTH = 512
"""8 heads of 64 channels, whatever the model's width."""
TIME_WIDTH = 320
NUM_MELS = 80
MIN_KERNEL_FRAMES = 32
"""Below, there is nothing to gain."""


def time_features(t: Tensor) -> Tensor:
    """Sinusoidal features of a flow time in [0, 1], float32 (…, 320), at a scale of 1000 (Matcha-TTS)."""
    half = TIME_WIDTH // 2
    rates = torch.exp(torch.arange(half, device=t.device).float() * -(math.log(10_000) / (half - 1)))
    angles = 1000.0 * t[..., None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class CausalConv(nn.Module):
    """A three-frame convolution that looks back only."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_width, out_width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Block(nn.Module):
    """Causal convolution, norm, Mish."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv = CausalConv(in_width, out_width)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x)))


class ResnetBlock(nn.Module):
    """Two blocks with the time added between them, around a 1×1 shortcut."""

    def __init__(self, in_width: int, out_width: int, time_width: int) -> None:
        super().__init__()
        self.time = nn.Linear(time_width, out_width)
        self.block1 = Block(in_width, out_width)
        self.block2 = Block(out_width, out_width)
        self.shortcut = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`time`: (1 or rows, time width) after Mish."""
        y = self.block1(x) + self.time(time)[:, None]
        return self.block2(y) + self.shortcut(x)


@dataclass(frozen=True)
class SeenFrames:
    """What attention may look at: all frames of a row that are not padding.

    Args:
        mask: bool (rows, 1, 1, frames); None when there is no padding.
        lengths: int64 (rows,) frames of each row, for the CPU's own kernel; None where it does not run.
    """

    mask: Tensor | None
    lengths: Tensor | None

    @classmethod
    def of(cls, x: Tensor, is_real: Tensor | None) -> SeenFrames:
        """For a batch (rows, frames, …) padded on the right."""
        mask = None if is_real is None else is_real[:, None, None]
        if x.device.type != "cpu" or x.shape[1] < MIN_KERNEL_FRAMES or not can_compile():
            return cls(mask, None)
        return cls(mask, torch.full((len(x),), x.shape[1]) if is_real is None else is_real.sum(-1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(rows, heads, frames, 64) each, to (rows, frames, heads × 64)."""
        if self.lengths is not None and query.dtype == torch.float32:
            return attend_fully(query, key, value, self.lengths)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return attended.transpose(1, 2).flatten(2)


class TransformerBlock(nn.Module):
    """Pre-norm attention over all frames, then a GELU feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * INNER_WIDTH, bias=False)
        self.out = nn.Linear(INNER_WIDTH, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: SeenFrames) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, NUM_HEADS, -1))
        x = x + self.out(seen.attend(*qkv.permute(2, 0, 3, 1, 4)))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Stage(nn.Module):
    """A resnet block and its transformer blocks."""

    def __init__(self, in_width: int, width: int, time_width: int, num_blocks: int) -> None:
        super().__init__()
        self.resnet = ResnetBlock(in_width, width, time_width)
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(num_blocks))

    def forward(self, x: Tensor, time: Tensor, seen: SeenFrames) -> Tensor:
        x = self.resnet(x, time)
        for block in self.blocks:
            x = block(x, seen)
        return x


class Estimator(nn.Module):
    """Velocity of the flow at a time.

    Args:
        width: channels of every stage.
        num_mid_stages, num_blocks: depth.
        meanflow: the time is a pair (start, end), mixed by one more layer.
    """

    def __init__(self, width: int, num_mid_stages: int, num_blocks: int, *, meanflow: bool) -> None:
        super().__init__()
        time_width = 4 * width
        self.time_in = nn.Linear(TIME_WIDTH, time_width)
        self.time_out = nn.Linear(time_width, time_width)
        self.time_mix = nn.Linear(2 * time_width, time_width, bias=False) if meanflow else None
        self.down = Stage(4 * NUM_MELS, width, time_width, num_blocks)
        self.down_conv = CausalConv(width, width)
        self.mid = nn.ModuleList(Stage(width, width, time_width, num_blocks) for _ in range(num_mid_stages))
        self.up = Stage(2 * width, width, time_width, num_blocks)
        self.up_conv = CausalConv(width, width)
        self.final = Block(width, width)
        self.out = nn.Linear(width, NUM_MELS)

    def embed_time(self, start: Tensor, end: Tensor) -> Tensor:
        """Flow times, (1,) each, to (1, time width), Mish applied (every resnet block begins with it)."""

        def embed(t: Tensor) -> Tensor:
            return self.time_out(F.silu(self.time_in(time_features(t))))

        time = embed(start)
        if self.time_mix is not None:
            time = self.time_mix(torch.cat((time, embed(end)), dim=-1))
        return F.mish(time)

    def forward(self, x: Tensor, context: Tensor, time: Tensor, is_real: Tensor | None) -> Tensor:
        """One evaluation.

        Args:
            x: (rows, frames, 80) the current state.
            context: (rows, frames, 240) mean, speaker and prompt, see `Flow`.
            time: from `embed_time`.
            is_real: bool (rows, frames), False on padding; None when there is none.

        Returns:
            (rows, frames, 80); padding holds numbers that mean nothing.
        """
        seen = SeenFrames.of(x, is_real)
        skip = self.down(torch.cat((x, context), dim=-1), time, seen)
        y = self.down_conv(skip)
        for stage in self.mid:
            y = stage(y, time, seen)
        y = self.up(torch.cat((y, skip), dim=-1), time, seen)
        return self.out(self.final(self.up_conv(y)))
