"""The Perth watermark: put into all audio that leaves, and looked for again before it does.

perth's own class resamples, measures and rebuilds the whole spectrum in one go. Here the same trained
networks are driven block by block (an hour of audio takes no more memory than half a minute) and only
the band that carries the mark is changed, by a gain per bin; phases are never taken apart.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.audio.mastering import resample
from engine.errors import SpeechError
from engine.types import FloatArray
from engine.upstream import perth

if TYPE_CHECKING:
    import torch

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
        net: perth's PerthNet, loaded and in eval mode, on its device.
    """

    def __init__(self, net: Any) -> None:
        self._net = net
        self._rate: int = net.hp.sample_rate
        self._min_db: float = 20 * np.log10(net.hp.stft_magnitude_min)

    @classmethod
    def load(cls, device: str = "cpu") -> Watermarker:
        """Load perth's packaged network.

        Raises:
            SpeechError: watermark_unavailable, for any way in which it can be missing or broken.
        """
        package = perth()
        try:  # a file missing, cut off, of another version: all of it means that nothing can be marked
            net = _load_net(Path(package.__file__).parent / "perth_net" / "pretrained" / "implicit")
            return cls(net.to(device).eval())
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

    def _mark_block(self, block: FloatArray, sample_rate: int) -> FloatArray:
        import torch

        with torch.inference_mode():
            signal = self._to_signal(block, sample_rate)
            spectrum = self._net.ap.spectrogram(signal)  # (bins, frames) complex
            magnitudes = self._magnitudes(spectrum)
            band = slice(0, self._net.subband)
            encoded, _ = self._net.encoder(magnitudes[None])
            change = (encoded[0, band] - magnitudes[band]) * self._span_db  # dB
            spectrum[band] *= 10.0 ** (change / 20)
            marked = self._net.ap.inv_spectrogram(spectrum, len(signal)).cpu().numpy()
        return _fit(resample(marked, self._rate, sample_rate), block.size)

    def _detect(self, block: FloatArray, sample_rate: int) -> float:
        """Confidence from 0 to 1 that the block is marked; NaN on silence."""
        import torch

        with torch.inference_mode():
            magnitudes = self._magnitudes(self._net.ap.spectrogram(self._to_signal(block, sample_rate)))
            return float(self._net.decoder(magnitudes[None])[0].clip(0.0, 1.0))

    def _to_signal(self, block: FloatArray, sample_rate: int) -> torch.Tensor:
        """At perth's rate, padded to what its spectrogram can reflect at the edges."""
        import torch

        signal = resample(np.asarray(block, np.float32), sample_rate, self._rate)
        return torch.from_numpy(_fit(signal, max(signal.size, self._net.hp.n_fft))).to(self._net.device)

    def _magnitudes(self, spectrum: torch.Tensor) -> torch.Tensor:
        """perth's normalised log magnitudes, about 0 to 1."""
        decibels = 20 * spectrum.abs().clip(min=self._net.hp.stft_magnitude_min).log10()
        return (decibels - self._min_db) / self._span_db

    @property
    def _span_db(self) -> float:
        return _HEADROOM_DB - self._min_db


def is_verifiable(waveform: FloatArray, sample_rate: int) -> bool:
    """Whether the detector has enough to go by: 0.5 s, and not silence."""
    if waveform.size < MIN_VERIFIABLE_S * sample_rate:
        return False
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))) > MIN_VERIFIABLE_RMS


def _load_net(folder: Path) -> Any:
    """PerthNet as packaged. Its own loader prints to stdout, which belongs to the worker."""
    import torch
    import yaml

    config = importlib.import_module("perth.perth_net.perth_net_implicit.config")
    model = importlib.import_module("perth.perth_net.perth_net_implicit.model.perth_net")
    net = model.PerthNet(config.PerthConfig(**yaml.safe_load((folder / "hparams.yaml").read_text("utf-8"))))
    newest = max(folder.glob("*.pth.tar"), key=lambda path: path.name)
    net.load_state_dict(torch.load(newest, map_location="cpu", weights_only=True)["model"])
    return net


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
