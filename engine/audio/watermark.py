"""The Perth watermark: put into all audio that leaves, and looked for again before it does.

perth's own class resamples, measures and rebuilds the whole spectrum in one go. Here the same trained
networks are driven block by block (an hour of audio takes no more memory than half a minute) and only
the band that carries the mark is changed, by a gain per bin; phases are never taken apart.

Audio is marked as it is made: in blocks, the same bits as the whole at once, or early, for a stream.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
import yaml
from torch import nn

from engine.audio.mastering import resample
from engine.errors import SpeechError
from engine.types import FloatArray
from engine.upstream import perth_network, perth_weights

MIN_VERIFIABLE_S = 0.5
"""On less the detector is unsure (0.05 to 0.96 on 0.1 s of marked speech; above 0.9 from 0.3 s on)."""

MIN_VERIFIABLE_RMS = 1e-4
"""-80 dBFS; the detector answers NaN on digital silence."""

DETECTED = 0.5
"""perth rounds its detector's confidence, 0 to 1, here. Unmarked speech gives about 0.05, marked 1.0."""

BLOCK_S = 30.0
OVERLAP_S = 1.0
"""Blocks share this much. The networks see 0.2 s to each side, so the middle half of an overlap comes
out the same in both blocks; there one fades into the other."""

CONTEXT_S = 0.25
"""What a stream is marked with to each side of what is given out. 0.21 s bear on a sample (of 10 ms frames 15
to each side in the networks, of 64 ms windows half before and half after them); beyond come the resampler's
filter and the fade between two runs."""

EARLY_FADE_S = 0.02
"""Two runs over a stream share this much. They differ by rounding only, so that any fade will do."""

EARLY_RUN_S = 0.1
"""A stream is run over when so much is new: each run costs its contexts' 0.5 s too."""

_NUM_SPARE = 1 << 15  # samples: 1.4 s at 24 kHz

_HEADROOM_DB = 15.0  # of perth's normalised magnitudes: perth.perth_net_implicit.utils.normalize


class Watermarker:
    """Marks audio and verifies the mark. Holds weights only: safe to use from several threads.

    Args:
        networks: perth's encoder and decoder, in eval mode, on their device.
        settings: perth's PerthConfig, which they were trained with.
    """

    def __init__(self, networks: nn.ModuleDict, settings: Any) -> None:
        self._encoder, self._decoder = networks["encoder"], networks["decoder"]
        self._rate: int = settings.sample_rate
        self._floor: float = settings.stft_magnitude_min
        self._min_db: float = 20 * np.log10(settings.stft_magnitude_min)
        self._subband = int(self._encoder.subband)  # type: ignore[arg-type]
        self._device = next(networks.parameters()).device
        window = torch.hann_window(settings.window_size, device=self._device)
        self._stft = {
            "n_fft": settings.n_fft,
            "hop_length": settings.hop_size,
            "win_length": settings.window_size,
            "window": window,
        }

    @classmethod
    def load(cls, device: str = "cpu") -> Self:
        """Load perth's packaged network.

        Raises:
            SpeechError: watermark_unavailable, for any way in which it can be missing or broken.
        """
        folder = perth_weights()
        try:  # a file missing, cut off, of another version: all of it means that nothing can be marked
            networks, settings = _load_networks(folder)
            return cls(networks.to(device).eval().requires_grad_(False), settings)
        except SpeechError:
            raise
        except Exception as error:
            raise SpeechError("watermark_unavailable", f"perth's network cannot be loaded: {error}") from error

    def start(self, sample_rate: int, *, early: bool = False) -> Marking:
        """Begin to mark audio that comes in pieces.

        Args:
            sample_rate: Hz; below 4 kHz there would be no room for the mark.
            early: give out all but the last 0.25 to 0.35 s of what was pushed. It differs from `mark` of the whole
                by rounding only (3e-7; 5e-4 beside digital silence, where the networks see what the resampler
                rounds), and takes up to six times the work, in runs of 0.1 s. Otherwise what is given out is
                `mark` of the whole bit for bit, 32 s late at most.
        """
        return Marking(self._renderer(sample_rate, early=early), self._search(sample_rate))

    def apply(self, waveform: FloatArray, sample_rate: int) -> tuple[FloatArray, bool]:
        """Mark audio and verify the mark.

        Returns:
            The marked waveform, and whether the mark was found in it. False only for audio that cannot
            be verified (shorter than 0.5 s, or silent): it is marked all the same.

        Raises:
            SpeechError: watermark_unavailable when verifiable audio does not carry the mark afterwards,
                generation_failed for audio that is not finite, in which no mark could be found.
        """
        _check_finite(waveform)
        marked = self.mark(waveform, sample_rate)
        search = self._search(sample_rate)
        search.push(marked)
        search.finish()
        search.check()
        return marked, search.num_found > 0

    def mark(self, waveform: FloatArray, sample_rate: int) -> FloatArray:
        """Put the watermark into audio.

        Args:
            waveform: float32 (T,) in [-1, 1].
            sample_rate: Hz; below 4 kHz there would be no room for the mark.

        Returns:
            float32 (T,), of the same length, in [-1, 1].
        """
        assert waveform.ndim == 1, waveform.shape
        marked = np.empty(waveform.size, np.float32)
        renderer = self._renderer(sample_rate, early=False)
        position = 0
        for piece in itertools.chain(renderer.push(waveform), renderer.finish()):
            marked[position : position + piece.size] = piece
            position += piece.size
        assert position == marked.size, (position, marked.size)
        return marked

    def verify(self, waveform: FloatArray, sample_rate: int) -> bool:
        """Whether the mark is found in every verifiable block; False where there is none."""
        search = self._search(sample_rate)
        search.push(waveform)
        search.finish()
        return search.num_found > 0 and search.num_missed == 0

    def _renderer(self, sample_rate: int, *, early: bool) -> _Renderer:
        render = functools.partial(self._mark_block, sample_rate=sample_rate)
        if early:
            return _EarlyRenderer(render, sample_rate, self._grid(sample_rate))
        return _BlockRenderer(render, sample_rate)

    def _grid(self, sample_rate: int) -> int:
        """The fewest samples that are a whole number of the networks' frames, and of samples at their rate."""
        num_frames_per_s = self._rate // self._stft["hop_length"]
        return sample_rate // math.gcd(sample_rate, num_frames_per_s)

    def _search(self, sample_rate: int) -> _Search:
        return _Search(functools.partial(self._detect, sample_rate=sample_rate), sample_rate)

    @torch.inference_mode()
    def _mark_block(self, block: FloatArray, sample_rate: int) -> FloatArray:
        signal = self._to_signal(block, sample_rate)
        spectrum = self._spectrum(signal)
        magnitudes = self._magnitudes(spectrum)
        band = slice(0, self._subband)
        encoded, _ = self._encoder(magnitudes[None])
        change = (encoded[0, band] - magnitudes[band]) * self._span_db  # dB
        spectrum[band] *= 10.0 ** (change / 20)
        marked = torch.istft(spectrum, **self._stft, length=len(signal)).cpu().numpy()
        return _fit(resample(marked, self._rate, sample_rate), block.size)

    @torch.inference_mode()
    def _detect(self, block: FloatArray, sample_rate: int) -> float:
        """Confidence from 0 to 1 that the block is marked; NaN on silence."""
        magnitudes = self._magnitudes(self._spectrum(self._to_signal(block, sample_rate)))
        return float(self._decoder(magnitudes[None])[0].clip(0.0, 1.0))

    def _to_signal(self, block: FloatArray, sample_rate: int) -> torch.Tensor:
        """At perth's rate, padded to what its spectrogram can reflect at the edges."""
        signal = resample(np.asarray(block, np.float32), sample_rate, self._rate)
        return torch.from_numpy(_fit(signal, max(signal.size, self._stft["n_fft"]))).to(self._device)

    def _spectrum(self, signal: torch.Tensor) -> torch.Tensor:
        """Complex (bins, frames), as perth's Spectrogram gives it."""
        return torch.stft(signal, **self._stft, center=True, pad_mode="reflect", return_complex=True)

    def _magnitudes(self, spectrum: torch.Tensor) -> torch.Tensor:
        """perth's normalised log magnitudes, about 0 to 1."""
        decibels = 20 * spectrum.abs().clip(min=self._floor).log10()
        return (decibels - self._min_db) / self._span_db

    @property
    def _span_db(self) -> float:
        return _HEADROOM_DB - self._min_db


class Marking:
    """One utterance on its way through the watermark: pieces of any size go in, marked audio comes out.

    Holds a block of what came in and a block of what went out (to verify it), however long the utterance
    is. Not for several threads at a time; after an error it is of no more use.

    Args:
        renderer: makes marked audio of what is pushed.
        search: looks for the mark in what the renderer made.
    """

    def __init__(self, renderer: _Renderer, search: _Search) -> None:
        self._renderer, self._search = renderer, search

    def push(self, waveform: FloatArray) -> FloatArray:
        """Add audio.

        Args:
            waveform: float32 (n,) in [-1, 1]; n may be 0.

        Returns:
            float32 (m,): the marked audio that is final now, which follows what was given out before.

        Raises:
            SpeechError: generation_failed for audio that is not finite; watermark_unavailable as soon as 30 s
                turn out not to carry the mark.
        """
        _check_finite(waveform)
        return self._searched(self._renderer.push(waveform))

    def finish(self) -> tuple[FloatArray, bool]:
        """End the utterance.

        Returns:
            float32 (m,): the rest of the marked audio. And whether the mark was found: False only where nothing
            could be verified, because it was shorter than 0.5 s or silent.

        Raises:
            SpeechError: watermark_unavailable when verifiable audio does not carry the mark.
        """
        rest = self._searched(self._renderer.finish())
        self._search.finish()
        self._search.check()
        return rest, self._search.num_found > 0

    def _searched(self, pieces: Iterable[FloatArray]) -> FloatArray:
        marked = np.concatenate([np.zeros(0, np.float32), *pieces])
        self._search.push(marked)
        self._search.check()
        return marked


class _Search:
    """Looks for the mark in audio that comes in pieces, by the same blocks whatever the pieces are.

    Args:
        detect: block (n,) → confidence from 0 to 1 that it is marked.
    """

    def __init__(self, detect: Callable[[FloatArray], float], sample_rate: int) -> None:
        self._detect, self._rate = detect, sample_rate
        self._blocks = _Blocks(sample_rate)
        self.num_found = 0
        self.num_missed = 0

    def push(self, waveform: FloatArray) -> None:
        self._look_at(self._blocks.push(waveform))

    def finish(self) -> None:
        self._look_at(self._blocks.finish())

    def check(self) -> None:
        """Let nothing pass that lacks the mark.

        Raises:
            SpeechError: watermark_unavailable when a verifiable block did not carry it.
        """
        if self.num_missed:
            raise SpeechError("watermark_unavailable", "the watermark could not be found in the audio after marking")

    def _look_at(self, blocks: Iterable[FloatArray]) -> None:
        for block in blocks:
            if is_verifiable(block, self._rate):
                is_found = self._detect(block) > DETECTED  # never with NaN
                self.num_found += is_found
                self.num_missed += not is_found


class _Renderer(Protocol):
    """Marks audio that comes in pieces; the pieces it gives follow each other and are final."""

    def push(self, waveform: FloatArray) -> Iterator[FloatArray]: ...

    def finish(self) -> Iterator[FloatArray]: ...


class _BlockRenderer:
    """Block by block: the same bits whatever the pieces are.

    Args:
        render: unmarked audio (n,) → marked (n,).
    """

    def __init__(self, render: Callable[[FloatArray], FloatArray], sample_rate: int) -> None:
        self._render = render
        self._blocks = _Blocks(sample_rate)
        self._seam = _Seam(round(OVERLAP_S * sample_rate))

    def push(self, waveform: FloatArray) -> Iterator[FloatArray]:
        for block in self._blocks.push(waveform):
            yield self._seam.join(self._render(block))

    def finish(self) -> Iterator[FloatArray]:
        for block in self._blocks.finish():
            yield self._seam.join(self._render(block), is_last=True)


class _EarlyRenderer:
    """All but the last 0.25 s as soon as 0.1 s more has come, each run with 0.25 s of context to each side.

    Args:
        render: unmarked audio (n,) → marked (n,).
        grid: runs begin a multiple of so many samples apart, so that the networks see the same frames.
    """

    def __init__(self, render: Callable[[FloatArray], FloatArray], sample_rate: int, grid: int) -> None:
        self._render, self._grid = render, grid
        self._num_context, self._num_worth = round(CONTEXT_S * sample_rate), round(EARLY_RUN_S * sample_rate)
        self._num_most = round(BLOCK_S * sample_rate)
        self._held = _Held()
        self._num_given = 0  # of those held: left context
        self._seam = _Seam(round(EARLY_FADE_S * sample_rate))

    def push(self, waveform: FloatArray) -> Iterator[FloatArray]:
        for start in range(0, waveform.size, self._num_most):
            self._held.append(waveform[start : start + self._num_most])
            if self._held.size - self._num_context >= self._num_given + self._num_worth:
                yield self._run()

    def finish(self) -> Iterator[FloatArray]:
        if self._held.size > self._num_given:
            yield self._seam.join(self._render(self._held.samples)[self._num_given :], is_last=True)

    def _run(self) -> FloatArray:
        ready = self._held.size - self._num_context
        marked = self._render(self._held.samples)[self._num_given : ready + self._seam.num_shared]
        begin = max(0, ready - self._num_context) // self._grid * self._grid
        self._held.drop(begin)
        self._num_given = ready - begin
        return self._seam.join(marked)


class _Seam:
    """Joins stretches each of which begins with what the one before ended with.

    Args:
        num_shared: so many samples are in both. Over their middle half one fades into the other.
    """

    def __init__(self, num_shared: int) -> None:
        self.num_shared = num_shared
        quarter = num_shared // 4
        ramp = (np.arange(num_shared, dtype=np.float32) - quarter) / max(num_shared - 2 * quarter, 1)
        self._fade = np.clip(ramp, 0.0, 1.0)
        self._end: FloatArray | None = None

    def join(self, stretch: FloatArray, *, is_last: bool = False) -> FloatArray:
        """What is final, in [-1, 1]: all but what the next stretch begins with."""
        joined = stretch.copy()
        if self._end is not None:
            joined[: self.num_shared] = self._end * (1 - self._fade) + stretch[: self.num_shared] * self._fade
        num_final = joined.size if is_last else joined.size - self.num_shared
        self._end = joined[num_final:].copy()  # as a view it would keep all of the stretch
        return np.clip(joined[:num_final], -1.0, 1.0)


class _Blocks:
    """Cuts audio that comes in pieces into blocks of 30 s, each with the 1 s that it shares with the next.

    The last takes a short rest along. A block is a view: use it before the next is asked for.
    """

    def __init__(self, sample_rate: int) -> None:
        self._step, self._overlap = round(BLOCK_S * sample_rate), round(OVERLAP_S * sample_rate)
        self._held = _Held()

    def push(self, waveform: FloatArray) -> Iterator[FloatArray]:
        num_most = self._step + 2 * self._overlap  # up to here it may be the last block
        while waveform.size:
            num_taken = num_most + 1 - self._held.size
            self._held.append(waveform[:num_taken])
            waveform = waveform[num_taken:]
            if self._held.size > num_most:
                yield self._held.samples[: self._step + self._overlap]
                self._held.drop(self._step)

    def finish(self) -> Iterator[FloatArray]:
        if self._held.size:
            yield self._held.samples


class _Held:
    """Samples that wait. Their array grows by more than is needed: many small pieces cost about what few do."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.float32)
        self.size = 0

    @property
    def samples(self) -> FloatArray:
        return self._room[: self.size]

    def append(self, waveform: FloatArray) -> None:
        size = self.size + waveform.size
        if size > self._room.size:
            room = np.empty(size + _NUM_SPARE, np.float32)
            room[: self.size] = self.samples
            self._room = room
        self._room[self.size : size] = waveform
        self.size = size

    def drop(self, num_samples: int) -> None:
        """The first ones; what is left moves into an array of its own."""
        self._room = self.samples[num_samples:].copy()
        self.size = self._room.size


def is_verifiable(waveform: FloatArray, sample_rate: int) -> bool:
    """Whether the detector has enough to go by: 0.5 s, and not silence."""
    if waveform.size < MIN_VERIFIABLE_S * sample_rate:
        return False
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))) > MIN_VERIFIABLE_RMS


def _load_networks(folder: Path) -> tuple[nn.ModuleDict, Any]:
    """perth's encoder and decoder as packaged, and their settings."""
    settings = perth_network("config").PerthConfig(**yaml.safe_load((folder / "hparams.yaml").read_text("utf-8")))
    if settings.window_fn != "hann":
        raise ValueError(f"its window is {settings.window_fn}, expected hann")
    subband = perth_network("model").compute_subband_freq(settings)
    parts = {
        "encoder": perth_network("model.encoder").Encoder(settings.hidden_size, subband),
        "decoder": perth_network("model.decoder").Decoder(settings.hidden_size, subband),
    }
    networks = nn.ModuleDict(parts)
    newest = max(folder.glob("*.pth.tar"), key=lambda path: path.name)
    state = torch.load(newest, map_location="cpu", weights_only=True)["model"]
    networks.load_state_dict({key: value for key, value in state.items() if key.partition(".")[0] in parts})
    return networks, settings


def _check_finite(waveform: FloatArray) -> None:
    assert waveform.ndim == 1, waveform.shape
    if not np.isfinite(waveform).all():
        raise SpeechError("generation_failed", "the audio holds NaN or infinity")


def _fit(signal: FloatArray, size: int) -> FloatArray:
    """Cut, or padded with zeros, to a length."""
    return signal[:size] if signal.size >= size else np.pad(signal, (0, size - signal.size))
