"""Arrays as safetensors with a note about them: conditionals as bytes, exact or compact.

Compact is for what is kept by the thousand. Integers take the smallest type that holds them, which loses
nothing. The mel, nine tenths of the bytes, takes 16 bits on an even grid: as many as float16, whose steps
are coarsest where the mel is quietest. On random weights the waveform, with peaks of
0.15, then differs by 1.5e-4 at most, and with float16 by 9e-4. Embeddings stay as they are; they are 1 % of the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GRID_TOP = 65_535
_FINEST_STEP = 2.0**-15
"""Log-mels lie within ±16: multiples of it up to there are exact in float32."""


def to_bytes(arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> bytes:
    """Equal arrays and notes give equal bytes."""
    from safetensors.numpy import save

    # One entry: safetensors writes several in an order of its own.
    return save(
        {name: np.asarray(array) for name, array in arrays.items()}, {"about": json.dumps(about, sort_keys=True)}
    )


def from_bytes(data: bytes) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """The arrays and the note of `to_bytes`.

    Raises:
        ValueError: when the data is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        header_length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + header_length])["__metadata__"]["about"])
        if not isinstance(about, dict):
            raise ValueError(f"expected an object, got {about!r}")
        return load(data), about
    except (SafetensorError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"damaged conditionals: {error}") from error


def on_grid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest values of a grid that 16 bits can count; what lies on it stays as it is."""
    return from_grid(*to_grid(values))


def to_grid(values: NDArray[np.float32]) -> tuple[NDArray[np.uint16], float, float]:
    """Steps (same shape) above the lowest grid value, that value, and the step: a power of two, so that all
    grid values are exact in float32."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    step = max(2.0 ** math.ceil(math.log2(max(high - low, 1e-30) / (_GRID_TOP - 1))), _FINEST_STEP)
    base = math.floor(low / step) * step
    return np.rint((values.astype(np.float64) - base) / step).astype(np.uint16), base, step


def from_grid(steps: NDArray[np.uint16], base: float, step: float) -> NDArray[np.float32]:
    """The values that `to_grid` took."""
    return (steps.astype(np.float64) * step + base).astype(np.float32)


def narrow(integers: NDArray) -> NDArray:
    """The same integers in the smallest type that holds them all."""
    if not integers.size:
        return integers.astype(np.uint8)
    return integers.astype(np.promote_types(np.min_scalar_type(integers.min()), np.min_scalar_type(integers.max())))
