"""Rows that join and leave: T3 decoding of many chunks at once over fixed buffers.

A row is one sequence in the cache; a chunk with classifier-free guidance takes two adjacent rows. A
chunk joins when it is admitted (its voice's keys and values are copied in, its text is prefilled) and
leaves when it is released; neither touches its neighbours. The step is one function over tensors that
never change shape (`decode_step`): eager on a CPU, captured on CUDA. The host looks for ended rows every
few steps, not every token; a row that has ended stands still until it is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.models import START_SPEECH_TOKEN, STOP_SPEECH_TOKEN
from engine.t3.backbone import KVCache, Window
from engine.t3.model import T3
from engine.t3.sampling import SamplingRows, SamplingSettings, candidates_needed, sample
from engine.types import IntArray

LENGTH_BUCKET = 128
"""Attention reads the cache in multiples of so many positions."""


@dataclass(frozen=True)
class VoicePrefix:
    """A voice's keys and values, (layers, heads, positions, head_dim) each: computed once, copied into rows."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class DecodeRequest:
    """One chunk to decode.

    Args:
        prefix: the voice.
        text_tokens: int32 (N,), with the family's start and stop tokens.
        settings: sampling.
        seed: of this chunk and attempt.
        max_new_tokens: the row ends there at the latest.
    """

    prefix: VoicePrefix
    text_tokens: IntArray
    settings: SamplingSettings
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class DecodedRow:
    """What a row has given so far.

    Args:
        tokens: int32 (N,), without the stop token.
        has_ended: nothing more will come.
        has_stopped: it ended by the stop token, not by the bound.
        is_broken: its logits were not finite.
    """

    tokens: IntArray
    has_ended: bool
    has_stopped: bool
    is_broken: bool


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
        # Row r takes its unconditional logits from partner[r] and its token from leader[r].
        self.partner = torch.arange(num_rows, device=device)
        self.leader = torch.arange(num_rows, device=device)


def decode_step(
    model: T3, cache: KVCache, state: RowState, *, num_rows: int, length: int, num_candidates: int
) -> None:
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
    """Record the tokens and move on the rows that have not ended."""
    steps, seen, has_ended = state.steps[:num_rows], state.seen[:num_rows], state.has_ended[:num_rows]
    if not model.uses_guidance:
        # Upstream's gpt2 loop counts the start token for its first step only.
        seen[:, START_SPEECH_TOKEN] &= steps > 0
    seen.scatter_(1, token[:, None], True)
    state.tokens[:num_rows].scatter_(1, steps[:, None], token[:, None])
    state.is_broken[:num_rows] |= ~is_finite & ~has_ended
    is_moving = ~has_ended
    steps += is_moving
    state.positions[:num_rows] += is_moving
    state.token[:num_rows] = token
    has_ended |= (token == STOP_SPEECH_TOKEN) | (steps >= state.max_new[:num_rows]) | state.is_broken[:num_rows]


class Decoder:
    """The rows of one model. Not thread-safe: one thread owns it.

    Args:
        model: loaded weights.
        num_rows: sequences at once (a chunk with guidance takes two).
        length: cache positions per row.
        max_new_tokens: the most tokens a chunk may ask for.
        cache_dtype: of keys and values.
    """

    def __init__(
        self, model: T3, *, num_rows: int, length: int, max_new_tokens: int, cache_dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.cache = KVCache(model.shape, num_rows, length, model.device, cache_dtype)
        self.state = RowState(num_rows, max_new_tokens, model.speech_vocab_size, model.device)
        self.max_new_tokens = max_new_tokens
        self._requests: dict[int, DecodeRequest] = {}
        self._positions: dict[int, int] = {}  # host's upper bound of each lead row's position

    def compute_prefix(self, speaker_embedding: Tensor, prompt_tokens: Tensor, exaggeration: float | None) -> VoicePrefix:
        """Run the voice part once. See `T3.embed_voice` for the arguments."""
        with torch.inference_mode():
            x = self.model.embed_voice(speaker_embedding, prompt_tokens, exaggeration)
            num_positions = x.shape[1]
            scratch = KVCache(self.model.shape, 1, num_positions, x.device, self.cache.keys.dtype)
            positions = torch.arange(num_positions, device=x.device)[None]
            self.model.backbone(x, scratch, Window(slice(0, 1), num_positions, positions))
            return VoicePrefix(scratch.keys[:, 0], scratch.values[:, 0])

    def rows_for(self, settings: SamplingSettings) -> int:
        """How many rows a chunk takes."""
        return 2 if self.model.uses_guidance and settings.cfg_weight > 0 else 1

    @property
    def is_idle(self) -> bool:
        return not self._requests

    @property
    def num_adjacent_free_rows(self) -> int:
        """The most rows that one chunk could be given now, up to two."""
        return next((count for count in (2, 1) if self._find_rows(count) is not None), 0)

    def _find_rows(self, count: int) -> int | None:
        """The first of `count` adjacent free rows, or None. Pairs are aligned, so that they do not break up."""
        taken = {row for lead in self._requests for row in self._rows_of(lead)}
        for first in range(0, self.cache.num_rows - count + 1, count):
            if taken.isdisjoint(range(first, first + count)):
                return first
        return None

    def _rows_of(self, lead: int) -> range:
        return range(lead, lead + self.rows_for(self._requests[lead].settings))

    def length_needed(self, request: DecodeRequest) -> int:
        """Cache positions that a chunk may come to use."""
        return request.prefix.length + len(request.text_tokens) + 1 + request.max_new_tokens

    @torch.inference_mode()
    def admit(self, request: DecodeRequest) -> int | None:
        """Take a chunk in and prefill its text.

        Returns:
            Its lead row, the handle for `read` and `release`; None when no row is free.
        """
        assert request.max_new_tokens <= self.max_new_tokens, request.max_new_tokens
        assert self.length_needed(request) <= self.cache.length, (self.length_needed(request), self.cache.length)
        count = self.rows_for(request.settings)
        lead = self._find_rows(count)
        if lead is None:
            return None
        self._requests[lead] = request
        rows = slice(lead, lead + count)
        self._positions[lead] = self._prefill(rows, request)
        self._reset_rows(rows, request, self._positions[lead])
        return lead

    def _prefill(self, rows: slice, request: DecodeRequest) -> int:
        """Write the voice and the text into the rows; the next free position."""
        text = torch.from_numpy(request.text_tokens.astype(np.int64)).to(self.model.device)
        variants = [self.model.embed_text(text)]
        if rows.stop - rows.start == 2:
            variants.append(self.model.embed_text(text, is_unconditional=True))
        x = torch.cat(variants)
        start = request.prefix.length
        end = start + x.shape[1]
        for row in range(rows.start, rows.stop):
            self.cache.write(row, request.prefix.keys, request.prefix.values)
        positions = torch.arange(start, end, device=x.device).expand(x.shape[0], -1)
        self.model.backbone(x, self.cache, Window(rows, end, positions))
        return end

    def _reset_rows(self, rows: slice, request: DecodeRequest, position: int) -> None:
        state = self.state
        state.positions[rows] = position
        state.steps[rows] = 0
        state.token[rows] = START_SPEECH_TOKEN
        state.max_new[rows] = request.max_new_tokens
        state.is_broken[rows] = False
        state.seen[rows] = False
        state.seen[rows, START_SPEECH_TOKEN] = True
        state.leader[rows] = rows.start
        state.partner[rows] = rows.stop - 1
        state.cfg_weight[rows] = request.settings.cfg_weight if rows.stop - rows.start == 2 else 0.0
        for row in range(rows.start, rows.stop):
            state.sampling.set(row, request.settings, request.seed)
        state.has_ended[rows] = False

    @torch.inference_mode()
    def step(self, count: int = 1) -> None:
        """Decode up to `count` tokens for every admitted chunk."""
        if not self._requests:
            return
        num_rows = max(self._rows_of(lead).stop for lead in self._requests)
        num_candidates = candidates_needed([r.settings for r in self._requests.values()], self.model.speech_vocab_size)
        for _ in range(count):
            length = _bucket(max(self._positions.values()) + 1, self.cache.length)
            decode_step(
                self.model, self.cache, self.state, num_rows=num_rows, length=length, num_candidates=num_candidates
            )
            for lead in self._positions:
                self._positions[lead] = min(self._positions[lead] + 1, self.cache.length - 1)

    def read(self) -> dict[int, DecodedRow]:
        """What every admitted chunk has given so far; waits for the device once."""
        leads = list(self._requests)
        if not leads:
            return {}
        index = torch.tensor(leads, device=self.model.device)
        state = self.state
        header = torch.stack((state.steps[index], state.has_ended[index].long(), state.is_broken[index].long())).cpu()
        width = int(header[0].max())
        tokens = state.tokens[index, :width].cpu().numpy().astype(np.int32)
        return {lead: _decoded_row(tokens[i], *(int(v) for v in header[:, i])) for i, lead in enumerate(leads)}

    def release(self, lead: int) -> None:
        """Free a chunk's rows."""
        self.state.has_ended[lead : self._rows_of(lead).stop] = True
        del self._requests[lead], self._positions[lead]


def _decoded_row(tokens: IntArray, num_tokens: int, has_ended: int, is_broken: int) -> DecodedRow:
    has_stopped = num_tokens > 0 and tokens[num_tokens - 1] == STOP_SPEECH_TOKEN
    kept = tokens[: num_tokens - 1 if has_stopped else num_tokens]
    return DecodedRow(kept.copy(), bool(has_ended), bool(has_stopped), bool(is_broken))


def _bucket(length: int, most: int) -> int:
    return min(-(-length // LENGTH_BUCKET) * LENGTH_BUCKET, most)
