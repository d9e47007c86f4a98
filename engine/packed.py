"""Matrices in float16 for decoding on an x86 CPU.

Decoding a few rows is bound by reading the weights. FBGEMM's kernels, which torch brings for dynamic
quantisation, keep them in half the bytes and multiply in float32, several rows in one sweep; of bfloat16
and float16, float16 has eight times the precision at the same size, and weights lie well inside its range.

Packing is slow (some 60 ns of CPU time per weight, seconds for a model), so this is chosen by a setting and
never by itself: it pays in a process that goes on to speak minutes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A projection with float16 weights in FBGEMM's layout, float32 in and out.

    Args:
        layer: whose weight and bias are packed; it is not kept.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(layer.weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def pack_linears(module: nn.Module, num_threads: int) -> None:
    """Replace every `nn.Linear` inside a module, a few at a time, so that little stands in memory twice."""
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    with ThreadPoolExecutor(num_threads) as pool:  # packing is single-threaded, and leaves the interpreter free

        def pack(place: tuple[nn.Module, str, nn.Linear]) -> None:
            parent, name, linear = place
            setattr(parent, name, PackedLinear(linear))

        for _ in pool.map(pack, places):
            pass
