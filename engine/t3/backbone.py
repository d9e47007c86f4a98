"""The two transformer backbones of T3 over one static KV cache.

Upstream decodes through Hugging Face models whose cache grows by concatenation. Here the buffers are
fixed: every row has its own position, a new token is written in place, and a mask says what a row may
see. Rows of any length share one pass, nothing is reshaped, and the same code runs eagerly on a CPU
and captured in a CUDA graph.

Weights are upstream's, with projections that read the same input fused at load (`backbone_keys`).
Norms, softmax and the residual stream stay float32; the matrices and the cache may be bf16 on CUDA, and float16
on an x86 CPU, where decoding reads them with kernels of our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import DecodeAttention, attend
from engine.keymap import Key

HEAD_DIM = 64
"""Channels per attention head, in every family member."""


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of a backbone, as read from its weights.

    Args:
        kind: "gpt2" or "llama".
        num_layers, width, ffn_width: as usual.
        max_positions: rows of the learned positions (gpt2), or the longest sequence we allow (llama).
    """

    kind: str
    num_layers: int
    width: int
    ffn_width: int
    max_positions: int

    @property
    def num_heads(self) -> int:
        return self.width // HEAD_DIM


class KVCache:
    """Keys and values of all layers for a fixed number of rows and positions.

    `keys[layer]` and `values[layer]` are (rows, heads, positions, head_dim).
    """

    def __init__(self, shape: BackboneShape, num_rows: int, length: int, device: torch.device, dtype: torch.dtype):
        size = (shape.num_layers, num_rows, shape.num_heads, length, HEAD_DIM)
        # Zeros, not empty: masked positions are multiplied by zero weights, and 0 × NaN is NaN.
        self.keys, self.values = _zeros(size, device, dtype), _zeros(size, device, dtype)
        self.num_rows, self.length = num_rows, length
        self._is_read_in_place = device.type == "cpu" and dtype == torch.float16

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: Window, mask: Tensor) -> Tensor:
        """Write a layer's new keys and values and attend to what each row sees: a decoding step on a CPU reads a
        float16 cache where it lies, all else goes through torch's operator.

        Args:
            query, key, value: float32 (rows, heads, n, head_dim).
            mask: bool (rows, 1, n, window's length).

        Returns:
            (rows, n, width).
        """
        keys, values = self.keys[layer], self.values[layer]
        if self._is_read_in_place and isinstance(window.rows, slice) and query.shape[2] == 1:
            rows, positions = window.rows, window.positions[:, 0]
            step = DecodeAttention(query, key, value, keys[rows], values[rows], positions)
            # Room for every position there is: rows that ended, or whose text is not read yet, take part in a step with
            # positions of their own, which may lie beyond the window of those that run.
            return attend(step, self.length)[:, None]
        seen = window.update(keys, key), window.update(values, value)
        if self._is_read_in_place:
            seen = seen[0].float(), seen[1].float()
        attended = F.scaled_dot_product_attention(query.to(seen[0].dtype), *seen, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)

    @staticmethod
    def num_bytes_per_position(shape: BackboneShape, dtype: torch.dtype) -> int:
        return 2 * shape.num_layers * shape.width * dtype.itemsize

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (layers, heads, positions, head_dim) each, at the start of a row."""
        self.keys[:, row, :, : keys.shape[2]] = keys
        self.values[:, row, :, : values.shape[2]] = values

    def clear(self, row: int) -> None:
        """Make a row as it was at first: whatever is not finite would reach the next chunk through masked positions."""
        self.keys[:, row].zero_()
        self.values[:, row].zero_()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first positions to another row."""
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]


@dataclass(frozen=True)
class Window:
    """Which part of the cache a pass writes and sees.

    Args:
        rows: a slice of adjacent rows, whose cache is viewed and never copied (decoding), or int64 (rows,)
            indexes of any rows, whose visible cache is gathered (prefill).
        length: positions visible at most (a bucket at least as long as the longest row).
        positions: int64 (rows, n), absolute position of each input.
    """

    rows: slice | Tensor
    length: int
    positions: Tensor

    def update(self, cache: Tensor, new: Tensor) -> Tensor:
        """Write new keys or values, (rows, heads, n, head_dim), into one layer's cache; what the rows see of it."""
        if isinstance(self.rows, slice):
            view = cache[self.rows]
            index = self.positions[:, None, :, None].expand(-1, view.shape[1], -1, HEAD_DIM)
            view.scatter_(2, index, new.to(cache.dtype))
            return view[:, :, : self.length]
        cache[self.rows[:, None], :, self.positions] = new.transpose(1, 2).to(cache.dtype)
        return cache[self.rows, :, : self.length]


_NUMPY_DTYPES: Mapping[torch.dtype, type] = {torch.float32: np.float32, torch.float16: np.float16}


def _zeros(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on a CPU, pages that the system hands out when they are first written (numpy's calloc)."""
    if device.type == "cpu" and dtype in _NUMPY_DTYPES:
        return torch.from_numpy(np.zeros(size, dtype=_NUMPY_DTYPES[dtype]))
    return torch.zeros(size, device=device, dtype=dtype)


class Attention(nn.Module):
    """Causal self-attention of one layer that reads and writes the static cache."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, layer: int, cache: KVCache, window: Window, mask: Tensor, rope: Rope | None) -> Tensor:
        num_rows, num_new, width = x.shape
        qkv = project(x, self.qkv).view(num_rows, num_new, 3, width // HEAD_DIM, HEAD_DIM)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (rows, heads, n, head_dim)
        if rope is not None:
            query, key = rope.rotate(query), rope.rotate(key)
        return project(cache.attend(layer, query, key, value, window, mask), self.out)


def project(x: Tensor, layer: nn.Module) -> Tensor:
    """A projection in the weights' dtype, its result in float32."""
    if isinstance(layer, nn.Linear):
        return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias).float()
    return layer(x)  # a `PackedLinear` or a `HalfLinear`


class Gpt2Layer(nn.Module):
    """Pre-norm block with a GELU (tanh form) feed-forward, as in GPT-2."""

    def __init__(self, shape: BackboneShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-5)
        self.attention = Attention(shape.width, bias=True)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-5)
        self.up = nn.Linear(shape.width, shape.ffn_width)
        self.down = nn.Linear(shape.ffn_width, shape.width)

    def forward(self, x: Tensor, layer: int, cache: KVCache, window: Window, mask: Tensor, rope: Rope | None) -> Tensor:
        x = x + self.attention(self.norm1(x), layer, cache, window, mask, rope)
        return x + project(F.gelu(project(self.norm2(x), self.up), approximate="tanh"), self.down)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-5)


class LlamaLayer(nn.Module):
    """Pre-norm block with a gated SiLU feed-forward, as in Llama."""

    def __init__(self, shape: BackboneShape) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.width)
        self.attention = Attention(shape.width, bias=False)
        self.norm2 = RMSNorm(shape.width)
        self.gate_up = nn.Linear(shape.width, 2 * shape.ffn_width, bias=False)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=False)

    def forward(self, x: Tensor, layer: int, cache: KVCache, window: Window, mask: Tensor, rope: Rope | None) -> Tensor:
        x = x + self.attention(self.norm1(x), layer, cache, window, mask, rope)
        gate, up = project(self.norm2(x), self.gate_up).chunk(2, dim=-1)
        return x + project(F.silu(gate) * up, self.down)


def llama3_inverse_frequencies() -> Tensor:
    """RoPE frequencies, float32 (head_dim / 2,), with Llama 3's long-context scaling.

    Constants are upstream's (theta 500,000, factor 8, low 1, high 4, original context 8192); the
    formula is that of the Llama 3.1 reference code (`apply_scaling`).
    """
    frequencies = 1.0 / 500_000.0 ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    factor, low, high, context = 8.0, 1.0, 4.0, 8192.0
    wavelengths = 2.0 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1.0 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    is_between = (wavelengths <= context / low) & (wavelengths >= context / high)
    return torch.where(is_between, blended, scaled)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) for one pass: cos and sin, (rows, 1, n, head_dim)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, inverse_frequencies: Tensor) -> Rope:
        angles = positions[:, None, :, None].float() * inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos(), angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class Backbone(nn.Module):
    """Embeddings in, final hidden states out, keys and values left in the cache."""

    def __init__(self, shape: BackboneShape) -> None:
        super().__init__()
        self.shape = shape
        is_gpt2 = shape.kind == "gpt2"
        self.layers = nn.ModuleList((Gpt2Layer if is_gpt2 else LlamaLayer)(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.width, eps=1e-5) if is_gpt2 else RMSNorm(shape.width)
        self.positions = nn.Embedding(shape.max_positions, shape.width) if is_gpt2 else None
        self.register_buffer("inverse_frequencies", None, persistent=False)

    def finish_loading(self, device: torch.device) -> None:
        """Compute what no checkpoint holds."""
        if self.shape.kind == "llama":
            self.inverse_frequencies = llama3_inverse_frequencies().to(device)

    def forward(self, x: Tensor, cache: KVCache, window: Window) -> Tensor:
        """Run new inputs of some rows.

        Args:
            x: float32 (rows, n, width) input embeddings.
            cache: read and written in place.
            window: where the inputs stand.

        Returns:
            float32 (rows, n, width), after the final norm.
        """
        assert x.shape[:2] == window.positions.shape, (x.shape, window.positions.shape)
        rope = None
        if self.positions is not None:
            x = x + self.positions(window.positions).float()
        else:
            rope = Rope.at(window.positions, self.inverse_frequencies)
        visible = torch.arange(window.length, device=x.device)
        mask = visible <= window.positions[:, None, :, None]  # (rows, 1, n, length)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, cache, window, mask, rope)
        return self.norm(x)


def backbone_keys(shape: BackboneShape) -> Iterator[Key]:
    """Parameters of `Backbone`. GPT-2 keeps its projections as (in, out) (`Conv1D`), ours are (out, in)."""
    yield from _gpt2_keys(shape) if shape.kind == "gpt2" else _llama_keys(shape)


def _gpt2_keys(shape: BackboneShape) -> Iterator[Key]:
    yield Key("positions.weight", ("tfmr.wpe.weight",))
    norms = {"norm1": "ln_1", "norm2": "ln_2"}
    projections = {
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    for index in range(shape.num_layers):
        for ours, theirs in (norms | projections).items():
            how = "transpose" if ours in projections else "same"
            yield Key(f"layers.{index}.{ours}.weight", (f"tfmr.h.{index}.{theirs}.weight",), how)
            yield Key(f"layers.{index}.{ours}.bias", (f"tfmr.h.{index}.{theirs}.bias",))
    yield Key("norm.weight", ("tfmr.ln_f.weight",))
    yield Key("norm.bias", ("tfmr.ln_f.bias",))


def _llama_keys(shape: BackboneShape) -> Iterator[Key]:
    for index in range(shape.num_layers):
        ours, theirs = f"layers.{index}", f"tfmr.layers.{index}"
        yield Key(f"{ours}.norm1.weight", (f"{theirs}.input_layernorm.weight",))
        yield Key(f"{ours}.norm2.weight", (f"{theirs}.post_attention_layernorm.weight",))
        qkv = tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
        yield Key(f"{ours}.attention.qkv.weight", qkv, "stack")
        yield Key(f"{ours}.attention.out.weight", (f"{theirs}.self_attn.o_proj.weight",))
        gate_up = tuple(f"{theirs}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        yield Key(f"{ours}.gate_up.weight", gate_up, "stack")
        yield Key(f"{ours}.down.weight", (f"{theirs}.mlp.down_proj.weight",))
    yield Key("norm.weight", ("tfmr.norm.weight",))
