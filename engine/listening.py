"""What a recording says, as S3 speech tokens: of any length, in bounded memory, and given up at any moment.

Upstream's tokenizer hears at most 30 s at once. It takes longer recordings apart itself, but all windows in one
batch, and where a last window is shorter than half an overlap it loses up to two seconds of tokens. Here the
windows are the same, so the tokens are, and none is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.models import SPEECH_TOKEN_RATE
from engine.types import FloatArray, IntArray

FRAMES_PER_TOKEN = 4
WINDOW_TOKENS = 30 * SPEECH_TOKEN_RATE
OVERLAP_TOKENS = 4 * SPEECH_TOKEN_RATE
"""Windows and overlap of s3tokenizer's `_quantize_mixed_batch`; of an overlap each side keeps its half."""

WINDOWS_AT_ONCE = {"cuda": 8}
"""Windows of a batch by kind of device, elsewhere one: a processor is busy with one."""

HOP = 160
"""Samples per frame at 16 kHz."""

_NUM_FFT = 400
_BLOCK_FRAMES = 20_000  # of the spectrogram at once: 32 MB


class Listener:
    """Upstream's S3Tokenizer, driven in windows. May be called from several threads at once.

    Args:
        tokenizer: upstream's module in eval mode, its filters and window filled in.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._device = tokenizer.device

    def tokens(self, audio_16k: FloatArray, check: Callable[[], None] = lambda: None) -> IntArray:
        """Tokens of a recording, 25 per second.

        Args:
            audio_16k: float32 (T,) at 16 kHz, 201 samples or more.
            check: called between batches; what it raises ends the work.

        Returns:
            int32 (ceil(T // 160 / 4),), each below 6561.
        """
        with torch.inference_mode():
            mel = self.log_mel(torch.from_numpy(audio_16k).to(self._device))
            windows = plan_windows(-(-mel.shape[1] // FRAMES_PER_TOKEN))
            heard: list[IntArray] = []
            for batch in _batches(windows, WINDOWS_AT_ONCE.get(self._device.type, 1)):
                check()
                heard += self._quantize(mel, batch)
        return merge(windows, heard)

    def log_mel(self, audio: Tensor) -> Tensor:
        """(T,) → (128, T // 160), relative to the loudest place of all the recording.

        The tokenizer's own `log_mel_spectrogram` in blocks: the complex spectrogram of an hour does not fit.
        """
        padded = torch.nn.functional.pad(audio[None], (_NUM_FFT // 2, _NUM_FFT // 2), mode="reflect")[0]
        num_frames = len(audio) // HOP
        blocks = []
        for first in range(0, num_frames, _BLOCK_FRAMES):
            count = min(_BLOCK_FRAMES, num_frames - first)
            stretch = padded[first * HOP : (first + count - 1) * HOP + _NUM_FFT]
            spectrum = torch.stft(
                stretch, _NUM_FFT, HOP, window=self._tokenizer.window, center=False, return_complex=True
            )
            blocks.append(torch.clamp(self._tokenizer._mel_filters @ spectrum.abs() ** 2, min=1e-10).log10())
        mel = torch.cat(blocks, dim=1)
        return (torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0

    def _quantize(self, mel: Tensor, windows: Sequence[range]) -> Iterator[IntArray]:
        cuts = [mel[:, w.start * FRAMES_PER_TOKEN : w.stop * FRAMES_PER_TOKEN].T for w in windows]
        lengths = torch.tensor([len(cut) for cut in cuts], dtype=torch.int32, device=mel.device)
        padded = torch.nn.utils.rnn.pad_sequence(cuts, batch_first=True).transpose(1, 2)  # (windows, 128, frames)
        codes, _ = self._tokenizer.quantize(padded, lengths)
        for row, window in zip(codes.cpu().numpy(), windows, strict=True):
            yield row[: len(window)].astype(np.int32)


def plan_windows(num_tokens: int) -> list[range]:
    """The stretches of tokens that are heard at once: whole windows, and a last one that reaches the end."""
    stride = WINDOW_TOKENS - OVERLAP_TOKENS
    starts = range(0, max(1, num_tokens - OVERLAP_TOKENS), stride)
    return [range(start, min(start + WINDOW_TOKENS, num_tokens)) for start in starts]


def merge(windows: Sequence[range], heard: Sequence[IntArray]) -> IntArray:
    """The windows' tokens as one row: of an overlap the first half is the earlier window's, the second the later's."""
    half = OVERLAP_TOKENS // 2
    last = len(windows) - 1
    kept = [
        tokens[half if index else 0 : len(tokens) - half if index < last else None]
        for index, tokens in enumerate(heard)
    ]
    return np.concatenate(kept)


def _batches(windows: Sequence[range], size: int) -> Iterator[Sequence[range]]:
    for first in range(0, len(windows), size):
        yield windows[first : first + size]
