"""The Perth watermark: put into all audio that leaves, and looked for again before it does.

perth's own class resamples, measures and rebuilds the whole spectrum in one go. Here the same trained
networks are driven block by block (an hour of audio takes no more memory than half a minute) and only
the band that carries the mark is changed, by a gain per bin; phases are never taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    def load(cls, device: str = "cpu") -> Watermarker:
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

    def apply(self, waveform: FloatArray, sample_rate: int) -> tuple[FloatArray, bool]:
        """Mark audio and verify the mark.

        Returns:
            The marked waveform, and whether the mark was found in it. False only for audio that cannot
            be verified (shorter than 0.5 s, or silent): it is marked all the same.

        Raises:
            SpeechError: watermark_unavailable when verifiable audio does not carry the mark afterwards,
                generation_failed for audio that is not finite, in which no mark could be found.
        """
        if not np.isfinite(waveform).all():
            raise SpeechError("generation_failed", "the audio holds NaN or infinity")
        marked = self.mark(waveform, sample_rate)
        if not is_verifiable(marked, sample_rate):
            return marked, False
        if not self.verify(marked, sample_rate):
            raise SpeechError("watermark_unavailable", "the watermark could not be found in the audio after marking")
        return marked, True

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
        for start, stop, num_fade in _blocks(waveform.size, sample_rate):
            _fade_in(marked, start, self._mark_block(waveform[start:stop], sample_rate), num_fade)
        return np.clip(marked, -1.0, 1.0, out=marked)

    def verify(self, waveform: FloatArray, sample_rate: int) -> bool:
        """Whether the mark is found in every verifiable block; False where there is none."""
        blocks = (waveform[start:stop] for start, stop, _ in _blocks(waveform.size, sample_rate))
        found = [self._detect(block, sample_rate) > DETECTED for block in blocks if is_verifiable(block, sample_rate)]
        return bool(found) and all(found)

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


def _blocks(num_samples: int, sample_rate: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, how many samples it shares with the block before). The last takes a short rest along."""
    step, overlap = round(BLOCK_S * sample_rate), round(OVERLAP_S * sample_rate)
    start = 0
    while start < num_samples:
        rest = num_samples - start
        stop = num_samples if rest <= step + 2 * overlap else start + step + overlap
        yield start, stop, overlap if start else 0
        if stop == num_samples:
            return
        start += step


def _fade_in(target: FloatArray, start: int, block: FloatArray, num_shared: int) -> None:
    """Write a block; over the middle half of what it shares, fade from the block before."""
    quarter = num_shared // 4
    fade = np.clip((np.arange(num_shared, dtype=np.float32) - quarter) / max(num_shared - 2 * quarter, 1), 0.0, 1.0)
    shared = slice(start, start + num_shared)
    target[shared] = target[shared] * (1 - fade) + block[:num_shared] * fade
    target[shared.stop : start + block.size] = block[num_shared:]


def _fit(signal: FloatArray, size: int) -> FloatArray:
    """Cut, or padded with zeros, to a length."""
    return signal[:size] if signal.size >= size else np.pad(signal, (0, size - signal.size))
