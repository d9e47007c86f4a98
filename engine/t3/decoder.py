"""Rows that join and leave: T3 decoding of many chunks at once over fixed buffers.

A row is one sequence in the cache; a chunk with classifier-free guidance takes two adjacent rows. A
chunk joins when it is admitted and leaves when it is released; neither touches its neighbours. Joining
copies the voice's keys and values in and prefills the text, together with others that join and in pieces
between decoding steps, so that running rows do not wait long. The host looks for ended rows every few
steps, not every token; a row that has ended stands still until it is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.models import STOP_SPEECH_TOKEN
from engine.t3.backbone import KVCache, Window
from engine.t3.graphs import StepGraphs
from engine.t3.model import T3
from engine.t3.sampling import SamplingSettings, candidates_needed
from engine.t3.state import RowState, decode_step
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


@dataclass
class _Seat:
    """A chunk in its rows.

    Args:
        request: what it decodes.
        row: its first row.
        num_rows: one, or two with guidance.
        position: the host's upper bound of its rows' positions.
        text: float32 (rows, n, width) inputs that are not prefilled yet, None when all are.
    """

    request: DecodeRequest
    row: int
    num_rows: int
    position: int
    text: Tensor | None = field(default=None, repr=False)

    @property
    def rows(self) -> range:
        return range(self.row, self.row + self.num_rows)


class Decoder:
    """The rows of one model. Not thread-safe: one thread owns it.

    Args:
        model: loaded weights.
        num_rows: sequences at once (a chunk with guidance takes two).
        length: cache positions per row.
        max_new_tokens: the most tokens a chunk may ask for.
        cache_dtype: of keys and values.
        prefill_budget: text tokens prefilled at most between two rounds of steps while rows are running.
        use_graphs: capture the step as CUDA graphs (ignored elsewhere).
    """

    def __init__(
        self,
        model: T3,
        *,
        num_rows: int,
        length: int,
        max_new_tokens: int,
        cache_dtype: torch.dtype = torch.float32,
        prefill_budget: int = 256,
        use_graphs: bool = True,
    ) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.prefill_budget = prefill_budget
        self._is_captured = use_graphs and model.device.type == "cuda"
        self._seats: dict[int, _Seat] = {}  # by handle
        self._num_admitted = 0
        self._allocate(num_rows, length, cache_dtype)

    def _allocate(self, num_rows: int, length: int, cache_dtype: torch.dtype) -> None:
        self.cache = KVCache(self.model.shape, num_rows, length, self.model.device, cache_dtype)
        self.state = RowState(num_rows, self.max_new_tokens, self.model.speech_vocab_size, self.model.device)
        self._graphs = StepGraphs(self.state, self._run_step) if self._is_captured else None

    def shrink(self) -> bool:
        """Drop all chunks and go on with half the rows; False, changing nothing, when one chunk is all that fits."""
        fewest = 2 if self.model.uses_guidance else 1
        if self.num_rows <= fewest:
            return False
        num_rows, length, dtype = max(fewest, self.num_rows // 2), self.cache.length, self.cache.keys.dtype
        self._seats = {}
        del self.cache, self.state, self._graphs  # before the new ones are made
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._allocate(num_rows, length, dtype)
        return True

    # ------------------------------------------------------------------------------------ joining

    @torch.inference_mode()
    def compute_prefix(
        self, speaker_embedding: Tensor, prompt_tokens: Tensor, exaggeration: float | None
    ) -> VoicePrefix:
        """Run the voice part once. See `T3.embed_voice` for the arguments."""
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
        return not self._seats

    @property
    def num_rows(self) -> int:
        """Rows there are."""
        return self.cache.num_rows

    @property
    def num_adjacent_free_rows(self) -> int:
        """The most rows that one chunk could be given now, up to two."""
        return next((count for count in (2, 1) if self._find_rows(count) is not None), 0)

    def _find_rows(self, count: int) -> int | None:
        """The first of `count` adjacent free rows, or None. Pairs are aligned, so that they do not break up."""
        taken = {row for seat in self._seats.values() for row in seat.rows}
        for first in range(0, self.cache.num_rows - count + 1, count):
            if taken.isdisjoint(range(first, first + count)):
                return first
        return None

    def length_needed(self, request: DecodeRequest) -> int:
        """Cache positions that a chunk may come to use."""
        return request.prefix.length + len(request.text_tokens) + 1 + request.max_new_tokens

    @torch.inference_mode()
    def admit(self, request: DecodeRequest) -> int | None:
        """Take a chunk in; the next `step` begins with its text.

        Returns:
            A handle for `read` and `release`; None when no row is free.
        """
        assert request.max_new_tokens <= self.max_new_tokens, request.max_new_tokens
        assert self.length_needed(request) <= self.cache.length, (self.length_needed(request), self.cache.length)
        count = self.rows_for(request.settings)
        row = self._find_rows(count)
        if row is None:
            return None
        seat = _Seat(request, row, count, request.prefix.length, self._embed_text(request, count))
        end = seat.position + (0 if seat.text is None else seat.text.shape[1])
        for place in seat.rows:
            self.cache.write(place, request.prefix.keys, request.prefix.values)
            self.state.reset(place, end, request.settings, request.seed, request.max_new_tokens)
        self.state.pair(row, count, request.settings.cfg_weight)
        self._num_admitted += 1
        self._seats[self._num_admitted] = seat
        return self._num_admitted

    def _embed_text(self, request: DecodeRequest, count: int) -> Tensor:
        text = torch.from_numpy(request.text_tokens.astype(np.int64)).to(self.model.device)
        variants = [self.model.embed_text(text, is_unconditional=index == 1) for index in range(count)]
        return torch.cat(variants)

    def _prefill(self) -> None:
        """Prefill joining chunks together: all of their text, or a piece when rows are running meanwhile."""
        joining = [seat for seat in self._seats.values() if seat.text is not None]
        if not joining:
            return
        budget = self.prefill_budget if len(joining) < len(self._seats) else None
        pieces: list[tuple[_Seat, Tensor]] = []
        for seat in joining:
            assert seat.text is not None
            if budget is not None and budget <= 0:
                break
            piece = seat.text[:, :budget]
            budget = None if budget is None else budget - piece.shape[0] * piece.shape[1]
            pieces.append((seat, piece))
        self._run_pieces(pieces)

    def _run_pieces(self, pieces: list[tuple[_Seat, Tensor]]) -> None:
        longest = max(piece.shape[1] for _, piece in pieces)
        device = self.model.device
        x = torch.cat([torch.nn.functional.pad(piece, (0, 0, 0, longest - piece.shape[1])) for _, piece in pieces])
        rows = torch.tensor([row for seat, _ in pieces for row in seat.rows], device=device)
        starts = torch.tensor([seat.position for seat, _ in pieces for _ in seat.rows], device=device)
        # Padding writes beyond a row's end: masked until decoding overwrites it.
        positions = (starts[:, None] + torch.arange(longest, device=device)).clamp(max=self.cache.length - 1)
        length = min(max(seat.position for seat, _ in pieces) + longest, self.cache.length)
        self.model.backbone(x, self.cache, Window(rows, length, positions))
        for seat, piece in pieces:
            assert seat.text is not None
            seat.position += piece.shape[1]
            seat.text = seat.text[:, piece.shape[1] :]
            if not seat.text.shape[1]:
                seat.text = None
                self.state.has_ended[seat.row : seat.row + seat.num_rows] = False

    # ------------------------------------------------------------------------------------ decoding

    @torch.inference_mode()
    def step(self, count: int = 1) -> None:
        """Prefill what has joined, then decode up to `count` tokens for every chunk that is ready."""
        self._prefill()
        self._compact()
        running = [seat for seat in self._seats.values() if seat.text is None]
        if not running:
            return
        num_rows = max(seat.rows.stop for seat in running)
        num_candidates = candidates_needed([seat.request.settings for seat in running], self.model.speech_vocab_size)
        for _ in range(count):
            length = bucket(max(seat.position for seat in running) + 1, self.cache.length)
            (self._graphs or self._run_step)(num_rows, length, num_candidates)
            for seat in running:
                seat.position = min(seat.position + 1, self.cache.length - 1)

    def _run_step(self, num_rows: int, length: int, num_candidates: int) -> None:
        decode_step(self.model, self.cache, self.state, num_rows=num_rows, length=length, num_candidates=num_candidates)

    def _compact(self) -> None:
        """Move the highest chunk down into free rows, so that a step does not compute rows that nobody uses."""
        seat = max(self._seats.values(), key=lambda seat: seat.row, default=None)
        if seat is None or seat.text is not None:
            return
        target = self._find_rows(seat.num_rows)
        if target is None or target > seat.row or self._is_broken(seat):
            return
        for offset, source in enumerate(seat.rows):
            self.cache.move(source, target + offset, seat.position)
            self.state.move(source, target + offset)
        seat.row = target
        self.state.pair(target, seat.num_rows, seat.request.settings.cfg_weight)

    def read(self) -> dict[int, DecodedRow]:
        """What every admitted chunk has given so far; waits for the device once."""
        if not self._seats:
            return {}
        index = torch.tensor([seat.row for seat in self._seats.values()], device=self.model.device)
        state = self.state
        header = torch.stack((state.steps[index], state.has_ended[index].long(), state.is_broken[index].long())).cpu()
        width = int(header[0].max())
        tokens = state.tokens[index, :width].cpu().numpy().astype(np.int32)
        return {
            handle: _decoded_row(tokens[i], *header[:, i].tolist(), is_joining=seat.text is not None)
            for i, (handle, seat) in enumerate(self._seats.items())
        }

    @torch.inference_mode()
    def release(self, handle: int) -> None:
        """Free a chunk's rows."""
        seat = self._seats.pop(handle)
        self.state.has_ended[seat.row : seat.rows.stop] = True
        if seat.text is not None or self._is_broken(seat):  # a chunk that has not run may be broken as well
            for row in seat.rows:
                self.cache.clear(row)

    def _is_broken(self, seat: _Seat) -> bool:
        """Waits for the device."""
        return bool(self.state.is_broken[seat.row : seat.rows.stop].any())


def _decoded_row(tokens: IntArray, num_tokens: int, has_ended: int, is_broken: int, *, is_joining: bool) -> DecodedRow:
    if is_joining:
        return DecodedRow(tokens[:0], has_ended=False, has_stopped=False, is_broken=False)
    has_stopped = num_tokens > 0 and int(tokens[num_tokens - 1]) == STOP_SPEECH_TOKEN
    kept = tokens[: num_tokens - 1 if has_stopped else num_tokens]
    return DecodedRow(kept.copy(), bool(has_ended), has_stopped, bool(is_broken))


def bucket(length: int, most: int) -> int:
    """Cache positions to read for rows of this length."""
    return min(-(-length // LENGTH_BUCKET) * LENGTH_BUCKET, most)
