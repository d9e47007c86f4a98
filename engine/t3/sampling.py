"""From logits to tokens, for all rows at once, on the device.

Upstream runs Hugging Face's warpers one row at a time and draws from the global generator. Here every
row brings its own settings as tensors and its own numbers as a hash of (seed, step, token id), so that
a row's tokens do not depend on its neighbours, and nothing waits for the host.

The order of the filters is each family's own: repetition penalty, temperature, min-p, top-p for llama
models; temperature, top-k, top-p, repetition penalty for gpt2 ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import noise


@dataclass(frozen=True)
class SamplingSettings:
    """A request's sampling, with every default filled in."""

    temperature: float
    top_p: float
    repetition_penalty: float
    top_k: int
    min_p: float
    cfg_weight: float


@dataclass
class SamplingRows:
    """The settings of all rows, one element each."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    seed_low: Tensor
    seed_high: Tensor

    @classmethod
    def allocate(cls, num_rows: int, device: torch.device) -> SamplingRows:
        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        return cls(
            temperature=full(1.0),
            top_p=full(1.0),
            top_k=full(1, torch.int64),
            min_p=full(0.0),
            repetition_penalty=full(1.0),
            seed_low=full(0, torch.int64),
            seed_high=full(0, torch.int64),
        )

    def set(self, row: int, settings: SamplingSettings, seed: int) -> None:
        self.temperature[row] = settings.temperature
        self.top_p[row] = settings.top_p
        self.top_k[row] = settings.top_k
        self.min_p[row] = settings.min_p
        self.repetition_penalty[row] = settings.repetition_penalty
        self.seed_low[row], self.seed_high[row] = noise.split_seed(seed)

    def first(self, num_rows: int) -> SamplingRows:
        """A view of the first rows."""
        return SamplingRows(**{name: tensor[:num_rows] for name, tensor in vars(self).items()})


def _penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019): seen tokens' logits shrink by the factor."""
    penalised = torch.where(logits < 0, logits * penalty[:, None], logits / penalty[:, None])
    return torch.where(seen, penalised, logits)


def sample(
    logits: Tensor, rows: SamplingRows, seen: Tensor, steps: Tensor, *, penalty_first: bool, num_candidates: int
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: float32 (rows, vocabulary).
        rows: settings of the same rows.
        seen: bool (rows, vocabulary), tokens that the repetition penalty counts.
        steps: int64 (rows,), how many tokens each row has drawn.
        penalty_first: llama order rather than gpt2 order.
        num_candidates: keep and sort so many of the best tokens, at least every row's top_k and the whole
            vocabulary where a row filters by top_p alone; 0 when no row uses top_k or top_p.

    Returns:
        int64 (rows,).
    """
    if penalty_first:
        logits = _penalise(logits, seen, rows.repetition_penalty)
    logits = logits / rows.temperature[:, None]
    if num_candidates:
        values, ids = logits.topk(num_candidates, dim=-1)
        values = values.masked_fill(torch.arange(num_candidates, device=ids.device) >= rows.top_k[:, None], -torch.inf)
    else:
        values, ids = logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    # p < min_p · p_max, in logarithms: the normaliser cancels.
    values = values.masked_fill(values < values.amax(-1, keepdim=True) + rows.min_p.log()[:, None], -torch.inf)
    if num_candidates:
        values = _keep_nucleus(values, rows.top_p)
    if not penalty_first:
        values = _penalise(values, seen.gather(1, ids), rows.repetition_penalty)
    scores = values + noise.gumbel(rows.seed_low[:, None], rows.seed_high[:, None], steps[:, None], ids)
    return ids.gather(1, scores.argmax(-1, keepdim=True))[:, 0]


def _keep_nucleus(values: Tensor, top_p: Tensor) -> Tensor:
    """Top-p (Holtzman et al. 2020) on logits sorted downwards: the fewest that reach top_p stay."""
    probabilities = values.softmax(-1)
    above = probabilities.cumsum(-1) - probabilities
    is_dropped = (above >= top_p[:, None]) & (top_p < 1.0)[:, None]
    is_dropped[:, 0] = False
    return values.masked_fill(is_dropped, -torch.inf)


def candidates_needed(settings: list[SamplingSettings], vocab_size: int) -> int:
    """`num_candidates` for rows with these settings: one that filters nothing keeps everything beside one that does."""
    if all(s.top_k >= vocab_size and s.top_p >= 1.0 for s in settings):
        return 0
    return max(min(s.top_k, vocab_size) for s in settings)
