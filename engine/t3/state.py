"""The decoder's rows as tensors, and the step that moves them on.

Everything that changes from token to token lies on the device in buffers of fixed shape, so the step is
one function that runs eagerly on a CPU and is captured as a CUDA graph as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models import START_SPEECH_TOKEN, STOP_SPEECH_TOKEN
from engine.t3.backbone import KVCache, Window
from engine.t3.model import T3
from engine.t3.sampling import SamplingRows, SamplingSettings, sample


class RowState:
    """All that changes from step to step, on the device. Rows that are not in use have ended."""

    def __init__(self, num_rows: int, max_new_tokens: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.positions = zeros(num_rows)
        self.steps = zeros(num_rows)
        self.token = zeros(num_rows)
        self.max_new = zeros(num_rows)
        self.has_ended = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.is_broken = zeros(num_rows, dtype=torch.bool)
        self.seen = zeros(num_rows, vocab_size, dtype=torch.bool)
        self.tokens = zeros(num_rows, max_new_tokens + 1)
        self.sampling = SamplingRows.allocate(num_rows, device)
        self.cfg_weight = zeros(num_rows, dtype=torch.float32)
        # Row r takes its unconditional logits from row partner[r] and its token from row leader[r].
        self.partner = torch.arange(num_rows, device=device)
        self.leader = torch.arange(num_rows, device=device)

    def reset(self, row: int, position: int, settings: SamplingSettings, seed: int, max_new: int) -> None:
        """Make a row ready for its first step; it stands still until `start`."""
        self.positions[row] = position
        self.steps[row] = 0
        self.token[row] = START_SPEECH_TOKEN
        self.max_new[row] = max_new
        self.has_ended[row] = True
        self.is_broken[row] = False
        self.seen[row] = False
        self.seen[row, START_SPEECH_TOKEN] = True
        self.sampling.set(row, settings, seed)

    def pair(self, lead: int, count: int, cfg_weight: float) -> None:
        """Let a chunk's rows work together: the last is the unconditional one."""
        rows = slice(lead, lead + count)
        self.leader[rows] = lead
        self.partner[rows] = lead + count - 1
        self.cfg_weight[rows] = cfg_weight if count == 2 else 0.0

    def move(self, source: int, target: int) -> None:
        """Copy a row; `pair` sets what depends on its place."""
        for tensor in self._tensors():
            tensor[target] = tensor[source]
        self.has_ended[source] = True

    def snapshot(self) -> list[Tensor]:
        """Copies of all tensors, for `restore`."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, snapshot: list[Tensor]) -> None:
        for tensor, copy in zip(self._tensors(), snapshot, strict=True):
            tensor.copy_(copy)

    def _tensors(self) -> list[Tensor]:
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return own + list(vars(self.sampling).values())


def decode_step(model: T3, cache: KVCache, state: RowState, *, num_rows: int, length: int, num_candidates: int) -> None:
    """One token for each of the first rows; everything happens in place.

    Args:
        num_rows: how many rows, from row 0.
        length: positions that attention reads; at least every row's position + 1.
        num_candidates: see `sample`.
    """
    positions, steps = state.positions[:num_rows], state.steps[:num_rows]
    hidden = model.backbone(
        model.embed_speech(state.token[:num_rows], steps),
        cache,
        Window(slice(0, num_rows), length, positions[:, None]),
    )
    logits = model.logits(hidden[:, 0])  # (rows, vocabulary)
    if model.uses_guidance:
        logits = logits + state.cfg_weight[:num_rows, None] * (logits - logits[state.partner[:num_rows]])
    seen = state.seen[:num_rows]
    token = sample(
        logits,
        state.sampling.first(num_rows),
        seen,
        steps,
        penalty_first=model.uses_guidance,
        num_candidates=num_candidates,
    )
    _advance(model, state, num_rows, token[state.leader[:num_rows]], torch.isfinite(logits).all(-1))


def _advance(model: T3, state: RowState, num_rows: int, token: Tensor, is_finite: Tensor) -> None:
    """Record the tokens and move on the rows that have not ended; the others, joining ones too, keep what they have."""
    steps, seen, has_ended = state.steps[:num_rows], state.seen[:num_rows], state.has_ended[:num_rows]
    is_moving = ~has_ended
    if not model.uses_guidance:
        # Upstream's gpt2 loop counts the start token for its first step only.
        seen[:, START_SPEECH_TOKEN] &= (steps > 0) | has_ended
    seen.scatter_(1, token[:, None], seen.gather(1, token[:, None]) | is_moving[:, None])
    state.tokens[:num_rows].scatter_(1, steps[:, None], token[:, None])
    state.is_broken[:num_rows] |= ~is_finite & is_moving
    steps += is_moving
    state.token[:num_rows] = torch.where(is_moving, token, state.token[:num_rows])
    has_ended |= (token == STOP_SPEECH_TOKEN) | (steps >= state.max_new[:num_rows]) | state.is_broken[:num_rows]
    state.positions[:num_rows] += ~has_ended  # an ended row stays at its last position, inside the cache
