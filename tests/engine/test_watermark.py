"""All audio carries the mark, nothing else about it changes, and what cannot be marked is an error."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from engine.audio import watermark
from engine.audio.mastering import FORMATS, encode, resample
from engine.audio.watermark import BLOCK_S, OVERLAP_S, Watermarker, is_verifiable
from engine.draft import DraftEngine
from engine.errors import SpeechError
from engine.types import EngineConfig, FloatArray, SpeechRequest
from engine.upstream import chatterbox

RATE_HZ = 24_000
TEXT = "The quick brown fox jumps over the lazy dog. Is it so? One hundred and two thieves fished for cheap juice."


@pytest.fixture(scope="module")
def watermarker() -> Watermarker:
    return Watermarker.load()


@pytest.fixture(scope="module")
def speech() -> Iterator[FloatArray]:
    engine = DraftEngine.load(EngineConfig(model="draft", watermark=False))
    yield engine.speak(SpeechRequest(text=TEXT)).waveform
    engine.close()


@pytest.fixture(scope="module")
def upstream() -> object:
    chatterbox()  # makes torchaudio importable, which perth imports
    return importlib.import_module("perth").PerthImplicitWatermarker()


@pytest.mark.parametrize("rate_hz", [16_000, 24_000, 32_000, 48_000])
def test_the_mark_is_what_upstream_puts_in(
    watermarker: Watermarker, upstream: object, speech: FloatArray, rate_hz: int
) -> None:
    audio = resample(speech, RATE_HZ, rate_hz)
    theirs = upstream.apply_watermark(audio, rate_hz)  # type: ignore[attr-defined]
    ours = watermarker.mark(audio, rate_hz)
    inside = slice(0, theirs.size - rate_hz // 10)  # upstream drops the last frame's remainder
    assert np.abs(theirs[inside] - ours[inside]).max() < 1e-4


def test_the_mark_is_found_by_both_detectors_and_not_before(
    watermarker: Watermarker, upstream: object, speech: FloatArray
) -> None:
    marked = watermarker.mark(speech, RATE_HZ)
    assert watermarker.verify(marked, RATE_HZ) and not watermarker.verify(speech, RATE_HZ)
    assert float(upstream.get_watermark(marked, RATE_HZ, round=False)) > 0.9  # type: ignore[attr-defined]
    assert float(upstream.get_watermark(speech, RATE_HZ, round=False)) < 0.2  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audio_that_is_not_finite_never_leaves_unverified(
    watermarker: Watermarker, speech: FloatArray, value: float
) -> None:
    broken = speech.copy()
    broken[1000] = value
    with pytest.raises(SpeechError) as caught:
        watermarker.apply(broken, RATE_HZ)
    assert caught.value.code == "generation_failed"


def _signals() -> dict[str, FloatArray]:
    random = np.random.default_rng(0)
    time_s = np.arange(RATE_HZ * 2) / RATE_HZ
    return {
        "white noise": random.uniform(-1, 1, time_s.size).astype(np.float32),
        "tone": (0.3 * np.sin(2 * np.pi * 440 * time_s)).astype(np.float32),
        "mostly silence": np.where(time_s < 0.4, random.standard_normal(time_s.size) * 0.1, 0).astype(np.float32),
        "whisper quiet": (random.standard_normal(time_s.size) * 5e-4).astype(np.float32),
    }


@pytest.mark.parametrize("kind", _signals())
def test_audio_that_is_not_speech_is_marked_and_verified_too(watermarker: Watermarker, kind: str) -> None:
    _, verified = watermarker.apply(_signals()[kind], RATE_HZ)
    assert verified


@pytest.mark.parametrize("num_samples", [0, 1, 100, 719, 1_000, 2_048, 7_201, 12_000, 50_001])
def test_marked_audio_has_the_length_it_had(watermarker: Watermarker, speech: FloatArray, num_samples: int) -> None:
    audio = np.resize(speech, num_samples)
    marked, verified = watermarker.apply(audio, RATE_HZ)
    assert marked.shape == audio.shape and marked.dtype == np.float32 and np.isfinite(marked).all()
    assert verified == is_verifiable(marked, RATE_HZ)


def test_marking_does_not_write_to_its_input(watermarker: Watermarker, speech: FloatArray) -> None:
    audio = speech.copy()
    audio.setflags(write=False)
    watermarker.mark(audio, RATE_HZ)
    assert np.array_equal(audio, speech)


def test_marked_audio_stays_within_full_scale(watermarker: Watermarker, speech: FloatArray) -> None:
    loud = speech / np.abs(speech).max()
    assert np.abs(watermarker.mark(loud, RATE_HZ)).max() <= 1.0


def test_silence_is_marked_but_not_said_to_be_verified(watermarker: Watermarker) -> None:
    marked, verified = watermarker.apply(np.zeros(RATE_HZ * 2, np.float32), RATE_HZ)
    assert not verified and np.abs(marked).max() < 1e-4


@pytest.mark.parametrize("seconds", [BLOCK_S, BLOCK_S + OVERLAP_S, BLOCK_S + 2 * OVERLAP_S + 0.01, 2.5 * BLOCK_S])
def test_blocks_join_as_if_all_had_been_marked_at_once(
    watermarker: Watermarker, speech: FloatArray, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = np.resize(speech, round(seconds * RATE_HZ))
    in_blocks = watermarker.mark(audio, RATE_HZ)
    monkeypatch.setattr(watermark, "BLOCK_S", 1e6)
    at_once = watermarker.mark(audio, RATE_HZ)
    assert np.abs(in_blocks - at_once).max() < 2e-3
    assert watermarker.verify(in_blocks, RATE_HZ)


def test_a_long_pause_in_long_audio_does_not_fail_the_rest(watermarker: Watermarker, speech: FloatArray) -> None:
    audio = np.concatenate([speech, np.zeros(round(2 * BLOCK_S * RATE_HZ), np.float32), speech])
    assert watermarker.apply(audio, RATE_HZ)[1]


def test_one_unmarked_block_fails_long_audio(watermarker: Watermarker, speech: FloatArray) -> None:
    half = np.resize(speech, round((BLOCK_S + 2) * RATE_HZ))
    assert not watermarker.verify(np.concatenate([watermarker.mark(half, RATE_HZ), half]), RATE_HZ)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rate_hz", [8_000, 24_000, 48_000])
def test_the_mark_survives_delivery_in_every_format(
    watermarker: Watermarker, speech: FloatArray, name: str, rate_hz: int
) -> None:
    marked = resample(watermarker.mark(speech, RATE_HZ), RATE_HZ, rate_hz)
    delivered, _ = soundfile.read(io.BytesIO(encode(marked, rate_hz, name)), dtype="float32")
    assert watermarker.verify(delivered, rate_hz)


def test_threads_do_not_disturb_each_other(watermarker: Watermarker, speech: FloatArray) -> None:
    parts = [speech[start : start + RATE_HZ] for start in range(0, RATE_HZ * 4, 6_000)]
    alone = [watermarker.mark(part, RATE_HZ) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: watermarker.mark(part, RATE_HZ), parts))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_audio_that_loses_its_mark_is_an_error(speech: FloatArray) -> None:
    class Forgetful(Watermarker):
        def mark(self, waveform: FloatArray, sample_rate: int) -> FloatArray:
            return waveform.copy()

    with pytest.raises(SpeechError) as caught:
        Forgetful.load().apply(speech, RATE_HZ)
    assert caught.value.code == "watermark_unavailable"


def test_loading_fails_closed_when_perth_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "perth", None)
    _assert_unavailable()


def test_loading_fails_closed_when_the_weights_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watermark, "perth_weights", lambda: tmp_path)
    _assert_unavailable()


def test_loading_fails_closed_when_perth_is_another_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "perth").mkdir()
    (tmp_path / "perth" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("perth", "_perth_implicit")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    _assert_unavailable()


def test_loading_imports_nothing_that_takes_seconds() -> None:
    program = (
        "import sys; from engine.audio.watermark import Watermarker; Watermarker.load(); "
        "print(sorted({'librosa', 'numba', 'scipy.signal', 'pkg_resources', 'torchaudio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("error", [RuntimeError("not a checkpoint"), OSError("gone"), KeyError("model"), EOFError()])
def test_loading_fails_closed_when_the_weights_are_damaged(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", broken)
    _assert_unavailable()


def _assert_unavailable() -> None:
    with pytest.raises(SpeechError) as caught:
        Watermarker.load()
    assert caught.value.code == "watermark_unavailable"


def test_loading_and_marking_print_nothing(capfd: pytest.CaptureFixture[str], speech: FloatArray) -> None:
    Watermarker.load().apply(speech, RATE_HZ)
    assert capfd.readouterr() == ("", "")


def test_marking_leaves_no_mode_behind(watermarker: Watermarker, speech: FloatArray) -> None:
    watermarker.mark(speech, RATE_HZ)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
