"""S3Gen's token encoder: speech tokens to the flow's mean, two mel frames per token.

Upstream's `UpsampleConformerEncoder` with two differences that change no number for a single row:
padding is zeroed right after the input layer, so that it cannot leak through the three-token
look-ahead into a row's last tokens, and attention is torch's fused one, the relative position scores
added as a bias.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 512
NUM_HEADS = 8
LOOKAHEAD = 3
"""Tokens to the right that a token sees before the encoder layers."""


def relative_positions(length: int, device: torch.device) -> Tensor:
    """Sinusoids for distances length-1 … -(length-1), float32 (2·length - 1, 512).

    Transformer-XL's relative encoding (Dai et al. 2019) as ESPnet lays it out.
    """
    distances = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)[:, None]
    rates = torch.exp(torch.arange(0, WIDTH, 2, dtype=torch.float32, device=device) * -(math.log(10_000.0) / WIDTH))
    angles = distances * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def _shift_relative(scores: Tensor) -> Tensor:
    """(rows, heads, n, 2n - 1) scores by distance to (rows, heads, n, n) scores by key position."""
    rows, heads, length, width = scores.shape
    padded = F.pad(scores, (1, 0)).view(rows, heads, width + 1, length)
    return padded[:, :, 1:].view(rows, heads, length, width)[..., :length]


class RelativeAttention(nn.Module):
    """Self-attention with relative positions (`rel_selfattn`)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.position = nn.Linear(WIDTH, WIDTH, bias=False)
        self.content_bias = nn.Parameter(torch.empty(NUM_HEADS, WIDTH // NUM_HEADS))
        self.position_bias = nn.Parameter(torch.empty(NUM_HEADS, WIDTH // NUM_HEADS))

    def forward(self, x: Tensor, positions: Tensor, is_real: Tensor | None) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        distance = heads(self.position(positions)[None])  # (1, heads, 2n - 1, head_dim)
        by_distance = (query + self.position_bias[:, None].to(query.dtype)) @ distance.transpose(-2, -1)
        bias = _shift_relative(by_distance) / math.sqrt(query.shape[-1])
        if is_real is not None:
            bias = bias.masked_fill(~is_real[:, None, None], -torch.inf)
        query = query + self.content_bias[:, None].to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(attended.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm attention and SiLU feed-forward."""

    def __init__(self, ffn_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.attention = RelativeAttention()
        self.ffn_norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.up = nn.Linear(WIDTH, ffn_width)
        self.down = nn.Linear(ffn_width, WIDTH)

    def forward(self, x: Tensor, positions: Tensor, is_real: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, is_real)
        return x + self.down(F.silu(self.up(self.ffn_norm(x))))


class InputLayer(nn.Module):
    """Linear, norm, and the scale by sqrt(width) that goes with the position encoding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * math.sqrt(WIDTH)


class TokenEncoder(nn.Module):
    """Tokens at 25 Hz to 80 mel channels at 50 Hz.

    Args:
        num_layers: before the upsampling.
        num_up_layers: after it.
        ffn_width: of the layers.
    """

    def __init__(self, num_layers: int, num_up_layers: int, ffn_width: int) -> None:
        super().__init__()
        self.input = InputLayer()
        self.lookahead = nn.Conv1d(WIDTH, WIDTH, LOOKAHEAD + 1)
        self.lookahead_out = nn.Conv1d(WIDTH, WIDTH, 3)
        self.layers = nn.ModuleList(EncoderLayer(ffn_width) for _ in range(num_layers))
        self.upsample = nn.Conv1d(WIDTH, WIDTH, 5)
        self.up_input = InputLayer()
        self.up_layers = nn.ModuleList(EncoderLayer(ffn_width) for _ in range(num_up_layers))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-5)
        self.out = nn.Linear(WIDTH, 80)

    def forward(self, x: Tensor, is_real: Tensor | None) -> Tensor:
        """Encode embedded tokens.

        Args:
            x: (rows, n, 512) token embeddings.
            is_real: bool (rows, n), False on padding; None when there is none.

        Returns:
            (rows, 2n, 80); padding holds numbers that mean nothing.
        """
        x = self._run(self.input(x), self.layers, is_real, self._look_ahead)
        up = F.interpolate(x.transpose(1, 2), scale_factor=2.0, mode="nearest")
        up = self.upsample(F.pad(up, (4, 0))).transpose(1, 2)
        is_real_up = None if is_real is None else is_real.repeat_interleave(2, dim=1)
        x = self._run(self.up_input(up), self.up_layers, is_real_up)
        return self.out(self.norm(x))

    def _look_ahead(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.lookahead(F.pad(x.transpose(1, 2), (0, LOOKAHEAD))))
        return x + self.lookahead_out(F.pad(y, (2, 0))).transpose(1, 2)

    @staticmethod
    def _run(x: Tensor, layers: nn.ModuleList, is_real: Tensor | None, before: object = None) -> Tensor:
        if is_real is not None:
            x = x * is_real[..., None]
        if callable(before):
            x = before(x)
        positions = relative_positions(x.shape[1], x.device)
        for layer in layers:
            x = layer(x, positions, is_real)
        return x
