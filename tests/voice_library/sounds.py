"""Audio for voices: short, different from each other, the same in every process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RATE = 24_000


def sound(seed: int = 0, num_samples: int = 2_400) -> NDArray[np.float32]:
    """Noise, float32 (num_samples,)."""
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)
