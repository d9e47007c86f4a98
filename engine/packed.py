"""Matrices laid out for an x86 CPU.

`torch.nn.functional.linear` hands float32 products to a general BLAS, which is at its best with large
square ones. oneDNN, which torch brings along, lays a weight out once for its kernels and then multiplies
a handful of rows (decoding), or some hundreds (prefill, the flow), 1.5 to 2 times as fast, in the same
float32. Laying out costs about as much as reading the weights.

Decoding a few rows is bound by reading the weights, so half the bytes are up to half the time: there T3's
matrices are kept in float16 and multiplied in float32 (`engine.kernels`).
"""

from __future__ import annotations

import functools
import platform
import threading
from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import X86, HalfMatrix, as_tiles, host_vectors, product, tiles_shape
from engine.keymap import Key


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
    """A projection with float16 weights, float32 in and out. Its parameters have the kernels' layout, so that they are
    filled from the weight file in one pass (`half_keys`).

    Args:
        layer: a projection on the meta device, for its sizes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self._vectors = layer.out_features, host_vectors()
        shape = tiles_shape(layer.out_features, layer.in_features, self._vectors)
        self.tiles = nn.Parameter(torch.empty(shape, dtype=torch.float16, device="meta"), requires_grad=False)
        num_biases = shape[0] * shape[2]
        if "bias" in dict(layer.named_parameters()):
            self.bias = nn.Parameter(torch.empty(num_biases, device="meta"), requires_grad=False)
        else:  # no file will fill it
            self.register_buffer("bias", torch.zeros(num_biases, device="cpu"), persistent=False)

    @functools.cached_property
    def _matrix(self) -> HalfMatrix:
        return HalfMatrix(self.tiles.detach(), self.bias.detach(), self.out_features, self._vectors)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self._matrix)

    def fit_weight(self, weight: Tensor) -> Tensor:
        """A weight (outputs, inputs) in the layout of `tiles`."""
        return as_tiles(weight, self._vectors)

    def fit_bias(self, bias: Tensor) -> Tensor:
        """A bias (outputs,) in the layout of `bias`."""
        return F.pad(bias, (0, self.bias.shape[0] - bias.shape[0]))


def half_keys(model: nn.Module, keys: Iterable[Key]) -> Iterator[Key]:
    """The same keys for a model some of whose projections have become `HalfLinear`s."""
    halves = {name: part for name, part in model.named_modules() if isinstance(part, HalfLinear)}
    for key in keys:
        name, _, part = key.ours.rpartition(".")
        half = halves.get(name)
        if half is None:
            yield key
        elif part == "weight":
            yield key._replace(ours=f"{name}.tiles", fit=half.fit_weight)
        else:
            yield key._replace(fit=half.fit_bias)


def can_pack() -> bool:
    """Whether this machine and this build of torch have oneDNN's layouts."""
    is_x86 = platform.machine().lower() in X86
    return is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where the `nn.Linear`s inside a module are: the parent and the name there."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name


def halve_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside a module on the meta device by a `HalfLinear`, to be filled."""
    for parent, name in list(_linears(module)):
        setattr(parent, name, HalfLinear(getattr(parent, name)))


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside a module by a `PackedLinear`, a few at a time, so that little stands in memory
    twice."""
    places = deque(_linears(module))

    def replace_some() -> None:
        while True:
            try:
                parent, name = places.popleft()
            except IndexError:
                return
            setattr(parent, name, PackedLinear(getattr(parent, name)))

    workers = [threading.Thread(target=replace_some) for _ in range(torch.get_num_threads())]
    for worker in workers:  # packing is single-threaded, and leaves the interpreter free
        worker.start()
    for worker in workers:
        worker.join()
