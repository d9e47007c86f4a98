"""Speech tokens to waveforms, in batches: the flow, then the vocoder.

A pass is one stretch of tokens in one voice. Passes are grouped so that little is padded; within a
group the masks are exact, so grouping changes nothing but the last bits. The vocoder's convolutions are
not causal, so it takes passes of exactly one length together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from engine import noise
from engine.keymap import load_keys, matrix_dtype, shapes_of
from engine.models import ModelSpec
from engine.packed import can_pack, pack_linears
from engine.s3gen.flow import FRAMES_PER_TOKEN, Flow, FlowRequest, FlowVoice
from engine.s3gen.keys import build_flow, build_vocoder, flow_keys, vocoder_keys
from engine.s3gen.streaming import StreamedPass
from engine.s3gen.vocoder import SourceNoise, Vocoder
from engine.types import Conditionals, IntArray
from engine.weights import WeightFile, without_weights

_Result = TypeVar("_Result")

MAX_PADDING = 0.15
"""Passes share a batch while the shortest is at most this much shorter than the longest."""


@dataclass(frozen=True)
class Pass:
    """One stretch of speech.

    Args:
        voice: the speaker, on the device.
        tokens: int32 (N,) speech tokens below 6561, N ≥ 1.
        seed: of the flow's noise and the vocoder's source.
    """

    voice: FlowVoice
    tokens: IntArray
    seed: int

    @property
    def num_frames(self) -> int:
        """Mel frames of the whole pass, the voice's prompt included."""
        return FRAMES_PER_TOKEN * (len(self.voice.tokens) + len(self.tokens))


@dataclass(frozen=True)
class Stretch:
    """The next of a pass that is heard while it grows.

    Args:
        so_far: the pass with all tokens that there are.
        heard: what was spoken of it.
        is_last: whether no more tokens follow.
    """

    so_far: Pass
    heard: StreamedPass
    is_last: bool


def flow_voice(conditionals: Conditionals, device: torch.device) -> FlowVoice:
    """Put what S3Gen needs of a voice on the device."""
    return FlowVoice(
        tokens=torch.tensor(conditionals.s3_prompt_tokens, dtype=torch.int64, device=device),
        mel=torch.tensor(conditionals.s3_prompt_mel, device=device),
        embedding=torch.tensor(conditionals.s3_embedding, device=device),
    )


class Renderer:
    """The two models of S3Gen that speak. Not thread-safe: one thread owns it.

    Args:
        flow, vocoder: loaded.
        autocast: context for the flow.
        exact: context for the vocoder, which must stay in plain float32.
        max_frames: most frames of a batch, padding included.
    """

    def __init__(
        self,
        flow: Flow,
        vocoder: Vocoder,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        exact: Callable[[], AbstractContextManager[object]],
        max_frames: int,
    ) -> None:
        self.flow, self.vocoder = flow, vocoder
        device = flow.token_embedding.weight.device
        # A stream of its own: on a GPU the renderer runs beside decoding, not between its steps.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._autocast, self._exact = autocast, exact
        self.max_frames = max_frames

    @torch.inference_mode()
    def render(self, passes: Sequence[Pass]) -> list[Tensor]:
        """Speak.

        Returns:
            Per pass float32 (samples,) on the device: 960 per token, 480 less when the prompt has an odd number of
            mel frames.
        """
        return self._on_stream(lambda: self._render(passes))

    @torch.inference_mode()
    def render_on(self, stretches: Sequence[Stretch]) -> list[tuple[Tensor, StreamedPass]]:
        """Speak what is new of passes whose tokens are still coming.

        Returns:
            Per pass float32 (samples,) on the device, behind what was spoken of it before; and its state then.
        """
        return self._on_stream(lambda: self._render_on(stretches))

    def _on_stream(self, render: Callable[[], _Result]) -> _Result:
        if self._stream is None:
            return render()
        self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))  # for the voices' tensors
        with torch.cuda.stream(self._stream):
            waveforms = render()
        self._stream.synchronize()  # whoever takes the audio may be on any stream
        return waveforms

    def _render_on(self, stretches: Sequence[Stretch]) -> list[tuple[Tensor, StreamedPass]]:
        mels: dict[int, Tensor] = {}
        passes = [stretch.so_far for stretch in stretches]
        for group in group_by_length([p.num_frames for p in passes], self.max_frames):
            mels.update(zip(group, self._make_mels([passes[i] for i in group]), strict=True))
        with self._exact():
            return [
                stretch.heard.speak(self.vocoder, mels[i], is_last=stretch.is_last)
                for i, stretch in enumerate(stretches)
            ]

    def _render(self, passes: Sequence[Pass]) -> list[Tensor]:
        waveforms: dict[int, Tensor] = {}
        for group in group_by_length([p.num_frames for p in passes], self.max_frames):
            mels = self._make_mels([passes[i] for i in group])
            for same in _group_equal([mel.shape[1] for mel in mels]):
                spoken = self._speak([mels[i] for i in same], [passes[group[i]] for i in same])
                waveforms.update(zip((group[i] for i in same), spoken, strict=True))
        return [waveforms[i] for i in range(len(passes))]

    def _make_mels(self, passes: Sequence[Pass]) -> list[Tensor]:
        device = passes[0].voice.mel.device
        requests = [
            FlowRequest(
                voice=p.voice,
                tokens=torch.tensor(p.tokens, dtype=torch.int64, device=device),
                noise=noise.normal(p.seed, noise.STREAM_FLOW, (80, p.num_frames), device),
            )
            for p in passes
        ]
        with self._autocast():
            return self.flow(requests)

    def _speak(self, mels: Sequence[Tensor], passes: Sequence[Pass]) -> Tensor:
        sources = [SourceNoise.from_seed(p.seed, mels[0].shape[1], mels[0].device) for p in passes]
        source = SourceNoise(torch.cat([s.phases for s in sources]), torch.cat([s.noise for s in sources]))
        with self._exact():
            return self.vocoder(torch.stack(list(mels)), source)


def group_by_length(lengths: Sequence[int], max_total: int) -> Iterator[list[int]]:
    """Indexes in groups of similar length: little padding, and at most `max_total` frames padded (or one pass)."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[group[0]] if group else 0
        if group and (lengths[index] < longest * (1 - MAX_PADDING) or longest * (len(group) + 1) > max_total):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _group_equal(lengths: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return list(groups.values())


def load_renderer(
    spec: ModelSpec,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    exact: Callable[[], AbstractContextManager[object]],
    max_frames: int,
    pack: bool = True,
) -> Renderer:
    """Load the flow and the vocoder from upstream's S3Gen file; the conditioning parts stay unread.

    Args:
        dtype: of the flow's matrices; norms and the vocoder are float32.
        pack: lay the flow's matrices out for the CPU; it then stays on it.

    Raises:
        SpeechError: weights_missing when the file does not fit.
    """
    with WeightFile(path) as weights:
        shapes = shapes_of(weights)
        with without_weights():
            flow, vocoder = build_flow(spec, shapes), build_vocoder(shapes)
        load_keys(flow, weights, flow_keys(shapes), device=device, dtype_for=matrix_dtype(flow, dtype))
        load_keys(vocoder, weights, vocoder_keys(vocoder), device=device)
    vocoder.finish_loading(device)
    if pack and device.type == "cpu" and dtype == torch.float32 and can_pack():
        pack_linears(flow)
    return Renderer(flow, vocoder, autocast=autocast, exact=exact, max_frames=max_frames)
