"""Counter-based random numbers: a pure function of (seed, counters), on any device, in any batch.

The global generator of torch gives a request other numbers when something runs beside it, and each
device has a generator of its own. Here every number is the hash of a seed and its place (step, token
id, sample index), so a seed means the same whatever the batch, the device and the order of work.

The hash is the 32-bit finaliser "lowbias32" by Chris Wellons (public domain,
https://nullprogram.com/blog/2018/07/31/), applied in int64 arithmetic, which every torch device has;
a product's low 32 bits survive the wrap of int64.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9

# Streams keep the numbers of one seed apart by what they are for.
STREAM_SAMPLING = 1
STREAM_FLOW = 2
STREAM_SOURCE_PHASE = 3
STREAM_SOURCE_NOISE = 4


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed from a parent seed and labels (a chunk's text, its occurrence, an attempt)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *labels):
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def split_seed(seed: int) -> tuple[int, int]:
    """A seed's low and high 32 bits, as the hash takes them."""
    return seed & _MASK, (seed >> 32) & _MASK


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on int64 tensors that hold 32-bit values."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _hash(seed_low: Tensor, seed_high: Tensor, stream: int, counter: Tensor, index: Tensor) -> Tensor:
    key = _mix(seed_low ^ ((stream * _GOLDEN) & _MASK))
    key = _mix(key ^ seed_high)
    key = _mix((key + counter * _GOLDEN) & _MASK)
    return _mix(_mix((index * _GOLDEN) & _MASK) ^ key)


def uniform(seed_low: Tensor, seed_high: Tensor, stream: int, counter: Tensor, index: Tensor) -> Tensor:
    """Numbers in the open interval (0, 1), float32.

    Args:
        seed_low, seed_high, counter, index: int64 tensors of 32-bit values that broadcast together.
        stream: one of the STREAM_ constants.
    """
    bits = _hash(seed_low, seed_high, stream, counter, index) >> 9
    # 23 bits and a half step: exact in float32, never 0 and never 1.
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def gumbel(seed_low: Tensor, seed_high: Tensor, step: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for sampling by argmax (the Gumbel-max trick, Gumbel 1954)."""
    return -torch.log(-torch.log(uniform(seed_low, seed_high, STREAM_SAMPLING, step, token_ids)))


def normal(seed: int, stream: int, shape: tuple[int, ...], device: torch.device | str, offset: int = 0) -> Tensor:
    """Standard normal numbers, float32, by Box and Muller (1958).

    The last dimension counts time: element (…, t) depends on (seed, stream, row, offset + t) only, so
    a longer or later window of the same rows continues the same noise.

    Args:
        seed: the request's or chunk's seed.
        stream: one of the STREAM_ constants.
        shape: (…, T).
        offset: time index of the first element.
    """
    low, high = (torch.tensor(part, dtype=torch.int64, device=device) for part in split_seed(seed))
    num_rows = math.prod(shape[:-1])
    rows = torch.arange(num_rows, dtype=torch.int64, device=device)[:, None]
    times = torch.arange(offset, offset + shape[-1], dtype=torch.int64, device=device)[None, :]
    u1 = uniform(low, high, stream, rows, 2 * times)
    u2 = uniform(low, high, stream, rows, 2 * times + 1)
    return (torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(2.0 * math.pi * u2)).reshape(shape)
