"""S3Gen's flow: speech tokens and a voice to a mel spectrogram, for several utterances at once.

Attention is bidirectional over the voice's prompt and the new frames, so the prompt is part of every
pass. Rows of one pass may have different prompts and lengths: they are padded on the right and masked
exactly, and each brings its own noise, so that a row's mel does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import SPEECH_VOCAB_SIZE
from engine.s3gen.encoder import WIDTH, TokenEncoder
from engine.s3gen.estimator import NUM_MELS, Estimator

FRAMES_PER_TOKEN = 2
CFG_RATE = 0.7
"""Guidance of the Euler flow (upstream's `inference_cfg_rate`); mean flow was distilled with it."""


@dataclass(frozen=True)
class FlowVoice:
    """What the flow needs of a voice, on the device.

    Args:
        tokens: int64 (P,) of the prompt.
        mel: float32 (F, 80) of the prompt.
        embedding: float32 (192,) x-vector.
    """

    tokens: Tensor
    mel: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class FlowRequest:
    """One utterance.

    Args:
        voice: the speaker.
        tokens: int64 (N,) speech tokens, each below 6561.
        noise: float32 (80, frames), frames = 2·(P + N): the start of the flow, prompt part first.
    """

    voice: FlowVoice
    tokens: Tensor
    noise: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.voice.tokens) + len(self.tokens)


class Flow(nn.Module):
    """Tokens to mel.

    Args:
        encoder, estimator: parts.
        num_steps: Euler steps.
        meanflow: two-step distilled flow without guidance.
    """

    def __init__(self, encoder: TokenEncoder, estimator: Estimator, *, num_steps: int, meanflow: bool) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(SPEECH_VOCAB_SIZE, WIDTH)
        self.speaker = nn.Linear(192, NUM_MELS)
        self.encoder = encoder
        self.estimator = estimator
        self.num_steps = num_steps
        self.meanflow = meanflow

    def forward(self, requests: Sequence[FlowRequest]) -> list[Tensor]:
        """Run a batch.

        Returns:
            Per request float32 (80, frames of the new tokens).
        """
        tokens, lengths = _pad([torch.cat((r.voice.tokens, r.tokens)) for r in requests])
        is_real = None
        if min(lengths) < max(lengths):
            is_real = (
                torch.arange(max(lengths), device=tokens.device) < torch.tensor(lengths, device=tokens.device)[:, None]
            )
        mean = self._encode(tokens, is_real)
        context = torch.cat((mean, self._speakers(requests, mean), _prompts(requests, mean)), dim=-1)
        noise, _ = _pad([r.noise.T for r in requests])
        is_real_frame = None if is_real is None else is_real.repeat_interleave(FRAMES_PER_TOKEN, dim=1)
        mel = self._solve(noise, context, is_real_frame).float()
        return [row[len(r.voice.mel) : FRAMES_PER_TOKEN * r.num_tokens].T for row, r in zip(mel, requests, strict=True)]

    def _encode(self, tokens: Tensor, is_real: Tensor | None) -> Tensor:
        embedded = self.token_embedding(tokens)
        if is_real is not None:
            embedded = embedded * is_real[..., None]
        return self.encoder(embedded, is_real).float()

    def _speakers(self, requests: Sequence[FlowRequest], mean: Tensor) -> Tensor:
        embeddings = F.normalize(torch.stack([r.voice.embedding for r in requests]), dim=1)
        return self.speaker(embeddings).float()[:, None].expand_as(mean)

    def _solve(self, x: Tensor, context: Tensor, is_real: Tensor | None) -> Tensor:
        """Euler steps from noise (t = 0) to mel (t = 1)."""
        times = torch.linspace(0, 1, self.num_steps + 1, device=x.device)
        if not self.meanflow:
            times = 1 - torch.cos(times * 0.5 * math.pi)
            # Guidance: a second half of the batch sees neither mean, speaker nor prompt.
            context = torch.cat((context, torch.zeros_like(context)))
            is_real = None if is_real is None else is_real.repeat(2, 1)
        for start, end in zip(times[:-1], times[1:], strict=True):
            time = self.estimator.embed_time(start[None], end[None])
            if self.meanflow:
                velocity = self.estimator(x, context, time, is_real).float()
            else:
                guided, unguided = self.estimator(x.repeat(2, 1, 1), context, time, is_real).float().chunk(2)
                velocity = (1.0 + CFG_RATE) * guided - CFG_RATE * unguided
            x = x + (end - start) * velocity
        return x


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), [len(row) for row in rows]


def _prompts(requests: Sequence[FlowRequest], like: Tensor) -> Tensor:
    """The prompts' mel where it is known, zeros where it is to be made."""
    prompts = torch.zeros_like(like)
    for row, request in zip(prompts, requests, strict=True):
        row[: len(request.voice.mel)] = request.voice.mel
    return prompts
