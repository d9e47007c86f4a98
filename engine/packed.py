"""Matrices laid out for an x86 CPU.

`torch.nn.functional.linear` hands float32 products to a general BLAS, which is at its best with large
square ones. oneDNN, which torch brings along, lays a weight out once for its kernels and then multiplies
a handful of rows (decoding), or some hundreds (prefill, the flow), 1.5 to 2 times as fast, in the same
float32. Laying out costs about as much as reading the weights.

Decoding a few rows is bound by reading the weights, so half the bytes are up to half the time: there T3's
matrices are kept in float16 and multiplied in float32 (`engine.kernels`).
"""

from __future__ import annotations

import platform
import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.kernels import HalfMatrix, product

X86 = ("x86_64", "amd64")


class PackedLinear(nn.Module):
    """A projection in oneDNN's layout, float32 throughout.

    Args:
        layer: whose weight and bias are laid out; it is not kept.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features = layer.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, self.bias, "none", [], "")


class HalfLinear(nn.Module):
    """A projection with float16 weights, float32 in and out.

    Args:
        layer: whose weight and bias are laid out; it is not kept.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features = layer.out_features
        self.matrix = HalfMatrix.pack(layer.weight.detach(), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.matrix)


def can_pack() -> bool:
    """Whether this machine and this build of torch have oneDNN's layouts."""
    is_x86 = platform.machine().lower() in X86
    return is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every `nn.Linear` inside a module, a few at a time, so that little stands in memory twice."""
    places = deque(
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    )

    def replace_some() -> None:
        while True:
            try:
                parent, name = places.popleft()
            except IndexError:
                return
            setattr(parent, name, make(getattr(parent, name)))

    workers = [threading.Thread(target=replace_some) for _ in range(torch.get_num_threads())]
    for worker in workers:  # packing is single-threaded, and leaves the interpreter free
        worker.start()
    for worker in workers:
        worker.join()
