"""All audio carries the mark, nothing else about it changes, and what cannot be marked is an error."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from engine.audio import watermark
from engine.audio.mastering import FORMATS, encode, resample
from engine.audio.watermark import BLOCK_S, CONTEXT_S, EARLY_RUN_S, OVERLAP_S, Watermarker, is_verifiable
from engine.draft import DraftEngine
from engine.errors import SpeechError
from engine.types import EngineConfig, FloatArray, SpeechRequest
from engine.upstream import chatterbox

RATE_HZ = 24_000
ROUNDING = 2e-6
"""Between a stream's marking and the whole's, in audio that is nowhere quite silent: measured 3e-7."""

IN_SILENCE = 1e-3
"""The same beside digital silence, where the networks see what the resampler rounds: measured 5e-4."""

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


@pytest.fixture(scope="module")
def long_speech(speech: FloatArray) -> FloatArray:
    return np.resize(speech, 65 * RATE_HZ)


@pytest.fixture(scope="module")
def long_marked(watermarker: Watermarker, long_speech: FloatArray) -> FloatArray:
    return watermarker.mark(long_speech, RATE_HZ)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_cuts_the_bits_are_those_of_the_whole(
    watermarker: Watermarker, long_speech: FloatArray, long_marked: FloatArray, seed: int
) -> None:
    cuts = np.sort(np.random.default_rng(seed).integers(0, long_speech.size, 3 ** (seed + 1)))
    marking = watermarker.start(RATE_HZ)
    given = [marking.push(part) for part in np.split(long_speech, cuts)]
    rest, is_found = marking.finish()
    assert np.array_equal(np.concatenate([*given, rest]), long_marked) and is_found


CUTS = ("0.05", "0.3", "1.0", "growing")


def _pieces(audio: FloatArray, cuts: str, rate_hz: int = RATE_HZ) -> list[FloatArray]:
    """Audio in pieces of so many seconds, or in growing ones; before them nothing and a single sample."""
    sizes_s = [0.01 * 1.5**n for n in range(20)] if cuts == "growing" else [float(cuts)] * 2_000
    ends = np.cumsum([0, 1, *(round(size_s * rate_hz) for size_s in sizes_s)])
    return np.split(audio, ends[ends < audio.size])


def _streamed(
    watermarker: Watermarker, pieces: Sequence[FloatArray], rate_hz: int = RATE_HZ
) -> tuple[list[FloatArray], bool]:
    """What an early marking gives for each piece, then the rest, and whether it found the mark."""
    marking = watermarker.start(rate_hz, early=True)
    given = [marking.push(piece) for piece in pieces]
    rest, is_found = marking.finish()
    return [*given, rest], is_found


@pytest.mark.parametrize("cuts", CUTS)
def test_a_stream_holds_back_no_more_than_a_third_of_a_second(
    watermarker: Watermarker, speech: FloatArray, cuts: str
) -> None:
    pieces = _pieces(speech[: 3 * RATE_HZ], cuts)
    given, _ = _streamed(watermarker, pieces)
    held_s = np.cumsum([a.size - b.size for a, b in zip(pieces, given[:-1], strict=True)]) / RATE_HZ
    assert held_s.min() >= 0 and held_s.max() <= CONTEXT_S + EARLY_RUN_S
    assert sum(part.size for part in given) == 3 * RATE_HZ


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("rate_hz", [8_000, 24_000, 44_100])
def test_a_stream_is_marked_as_the_whole_is(
    watermarker: Watermarker, speech: FloatArray, rate_hz: int, cuts: str
) -> None:
    clean = resample(speech, RATE_HZ, rate_hz)[: 3 * rate_hz]
    room = np.random.default_rng(0).normal(0, 1e-4, clean.size).astype(np.float32)
    for audio, tolerance in ((clean, IN_SILENCE), (clean + room, ROUNDING)):
        given, is_found = _streamed(watermarker, _pieces(audio, cuts, rate_hz), rate_hz)
        assert is_found and np.abs(np.concatenate(given) - watermarker.mark(audio, rate_hz)).max() < tolerance


def test_a_long_stream_is_marked_as_the_whole_is(
    watermarker: Watermarker, long_speech: FloatArray, long_marked: FloatArray
) -> None:
    given, is_found = _streamed(watermarker, _pieces(long_speech, "1.0"))
    assert is_found and np.abs(np.concatenate(given) - long_marked).max() < IN_SILENCE


@pytest.mark.parametrize("cuts", CUTS)
def test_a_stream_has_no_jump_where_its_runs_meet(watermarker: Watermarker, cuts: str) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 200 * np.arange(RATE_HZ * 4) / RATE_HZ)).astype(np.float32)
    given, _ = _streamed(watermarker, _pieces(tone, cuts))
    bends = np.abs(np.diff(np.concatenate(given), 2))
    near = np.zeros(bends.size, bool)
    for seam in np.cumsum([part.size for part in given])[:-1]:
        near[seam - 2 : seam + RATE_HZ // 50] = True
    assert bends[near].max() <= bends[~near].max() * 1.01


@pytest.mark.parametrize("cuts", CUTS)
def test_the_mark_is_found_by_both_detectors_in_every_second_of_a_stream(
    watermarker: Watermarker, upstream: object, speech: FloatArray, cuts: str
) -> None:
    joined = np.concatenate(_streamed(watermarker, _pieces(speech[: 4 * RATE_HZ], cuts))[0])
    seconds = [joined[start : start + RATE_HZ] for start in range(0, joined.size - RATE_HZ, RATE_HZ // 2)]
    for stretch in [joined, *seconds]:
        assert watermarker.verify(stretch, RATE_HZ)
        assert float(upstream.get_watermark(stretch, RATE_HZ, round=False)) > 0.9  # type: ignore[attr-defined]


@pytest.mark.parametrize("cuts", CUTS)
def test_a_stream_that_begins_with_silence_is_marked_where_it_speaks(
    watermarker: Watermarker, speech: FloatArray, cuts: str
) -> None:
    audio = np.concatenate([np.zeros(2 * RATE_HZ, np.float32), speech[: 2 * RATE_HZ]])
    given, is_found = _streamed(watermarker, _pieces(audio, cuts))
    joined = np.concatenate(given)
    assert is_found and watermarker.verify(joined[2 * RATE_HZ : 3 * RATE_HZ], RATE_HZ)
    assert np.abs(joined - watermarker.mark(audio, RATE_HZ)).max() < IN_SILENCE
    assert np.abs(joined[: 2 * RATE_HZ]).max() < 1e-3


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("num_samples", [0, 1, 719, 6_000, 11_999])
def test_what_is_too_short_to_verify_comes_out_marked_and_is_not_said_to_be_found(
    watermarker: Watermarker, speech: FloatArray, num_samples: int, early: bool
) -> None:
    audio = speech[:num_samples]
    marking = watermarker.start(RATE_HZ, early=early)
    parts = [marking.push(piece) for piece in np.array_split(audio, 3)]
    rest, is_found = marking.finish()
    joined = np.concatenate([*parts, rest])
    assert not is_found and joined.shape == audio.shape and joined.dtype == np.float32
    assert np.abs(joined - watermarker.mark(audio, RATE_HZ)).max(initial=0.0) < IN_SILENCE


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_push_that_is_not_finite_is_refused_when_it_comes(
    watermarker: Watermarker, speech: FloatArray, value: float, early: bool
) -> None:
    marking = watermarker.start(RATE_HZ, early=early)
    marking.push(speech[:1000])
    with pytest.raises(SpeechError) as caught:
        marking.push(np.array([0.1, value], np.float32))
    assert caught.value.code == "generation_failed"


class _Unmarking(Watermarker):
    """Its mark comes out as nothing."""

    def _mark_block(self, block: FloatArray, sample_rate: int) -> FloatArray:
        return block.copy()


@pytest.mark.parametrize("early", [False, True])
def test_pieces_that_lose_their_mark_are_an_error_at_the_end(speech: FloatArray, early: bool) -> None:
    marking = _Unmarking.load().start(RATE_HZ, early=early)
    marking.push(speech)
    with pytest.raises(SpeechError) as caught:
        marking.finish()
    assert caught.value.code == "watermark_unavailable"


def test_a_long_stream_that_lost_its_mark_goes_no_further(long_speech: FloatArray) -> None:
    marking = _Unmarking.load().start(RATE_HZ, early=True)
    with pytest.raises(SpeechError) as caught:
        marking.push(long_speech)
    assert caught.value.code == "watermark_unavailable"


class _Idle(_Unmarking):
    """Changes nothing, and finds the mark in all that it is shown."""

    sizes: tuple[int, ...] = ()

    def _detect(self, block: FloatArray, sample_rate: int) -> float:
        self.sizes += (block.size,)
        return 1.0


@pytest.mark.parametrize("early", [False, True])
def test_what_is_kept_does_not_grow_with_the_utterance(speech: FloatArray, early: bool) -> None:
    marking = _Idle.load().start(RATE_HZ, early=early)
    piece = speech[: RATE_HZ // 3]
    tracemalloc.start()
    kept = []
    for _ in range(3 * 60 * 10):  # 10 minutes
        marking.push(piece)
        kept.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    num_blocks = 1 if early else 2
    longest = (BLOCK_S + 3 * OVERLAP_S) * RATE_HZ * 4
    assert max(kept) < (num_blocks + 0.2) * longest
    assert max(kept[:540]) == pytest.approx(max(kept[-540:]), rel=0.05)


@pytest.mark.parametrize("early", [False, True])
def test_what_is_given_out_is_all_of_what_came_in_order(early: bool) -> None:
    audio = np.random.default_rng(0).uniform(-1, 1, 100 * RATE_HZ).astype(np.float32)
    marking = _Idle.load().start(RATE_HZ, early=early)
    given = [marking.push(piece) for piece in _pieces(audio, "growing")]
    assert np.allclose(np.concatenate([*given, marking.finish()[0]]), audio, atol=1e-6)


@pytest.mark.parametrize("cuts", CUTS)
def test_what_is_searched_does_not_depend_on_the_cuts(cuts: str) -> None:
    whole, in_pieces = _Idle.load(), _Idle.load()
    audio = np.full(100 * RATE_HZ, 0.1, np.float32)
    whole.verify(audio, RATE_HZ)
    _streamed(in_pieces, _pieces(audio, cuts))
    assert in_pieces.sizes == whole.sizes and max(whole.sizes) <= (BLOCK_S + 2 * OVERLAP_S) * RATE_HZ


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
