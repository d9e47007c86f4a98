"""How upstream's parameters become ours: a list of keys instead of a renamed copy of the weights.

Our modules fuse projections that read the same input and fold what upstream recomputes at every call.
Each part says so with a sequence of `Key`s, and `load_keys` fills the module from the file by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from engine.machine import ask_for_huge_pages
from engine.weights import Combined, WeightFile, load_module


class Key(NamedTuple):
    """One of our parameters.

    Args:
        ours: its name.
        theirs: upstream's tensors that make it.
        how: a key of `COMBINE`; "same" takes one tensor as it is.
        fit: brings what came out into our parameter's layout; a view is enough.
    """

    ours: str
    theirs: tuple[str, ...]
    how: str = "same"
    fit: Callable[[Tensor], Tensor] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether ours is theirs."""
        return self.how == "same" and self.fit is None

    @property
    def combine(self) -> Callable[..., Tensor]:
        """From upstream's tensors to ours."""
        combine, fit = COMBINE[self.how], self.fit
        return combine if fit is None else lambda *parts: fit(combine(*parts))


def _fold_weight_norm(magnitude: Tensor, direction: Tensor) -> Tensor:
    """w = g · v / ‖v‖ over all but the first dimension (Salimans and Kingma 2016)."""
    norm = direction.norm(dim=tuple(range(1, direction.ndim)), keepdim=True)
    return magnitude * direction / norm


def _stack(*parts: Tensor) -> Tensor:
    """One below the other. For a moment only, but memory that is new costs as much as the copying."""
    whole = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device)
    return torch.cat(parts, out=ask_for_huge_pages(whole))


COMBINE: Mapping[str, Callable[..., Tensor]] = {
    "same": lambda tensor: tensor,
    "stack": _stack,
    "transpose": lambda weight: weight.T,
    "squeeze": lambda weight: weight.squeeze(-1),
    "weight_norm": _fold_weight_norm,
}

Module = TypeVar("Module", bound=nn.Module)


def load_keys(
    module: Module,
    weights: WeightFile,
    keys: Iterable[Key],
    *,
    device: torch.device | str,
    dtype_for: Callable[[str], torch.dtype] | None = None,
) -> Module:
    """Fill a module built on the meta device; tensors of the file that no key names stay unread.

    Raises:
        SpeechError: weights_missing, naming what does not fit.
    """
    all_keys = list(keys)
    renamed = {key.theirs[0]: key.ours for key in all_keys if key.is_plain}
    combined = {key.ours: Combined(key.theirs, key.combine) for key in all_keys if not key.is_plain}
    parts = {name for made in combined.values() for name in made.keys}
    return load_module(
        module,
        weights,
        device=device,
        dtype_for=dtype_for,
        rename=lambda name: renamed.get(name, name if name in parts else None),
        combined=combined,
        strict=False,
    )


def matrix_dtype(module: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """dtype for the weights and biases of matrices, convolutions and embeddings; norms stay float32."""
    matrices = {name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Embedding | nn.Conv1d)}
    return lambda name: dtype if name.rpartition(".")[0] in matrices else torch.float32


def shapes_of(weights: WeightFile) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape."""
    return {key: weights.shape(key) for key in weights.keys()}  # noqa: SIM118 - not a mapping
