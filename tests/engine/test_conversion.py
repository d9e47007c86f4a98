"""Speech to speech: upstream's tokens and waveform on a short clip, and a recording of any length comes out whole."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Conditionals, ConversionRequest, Engine, SpeechError, SpeechRequest, VoicePrompt, noise
from engine.audio.assembly import CROSSFADE_S, EDGE_FADE_S, Stretch, crossfade
from engine.conditioning import resample
from engine.conversion import (
    MAX_PIECE_TOKENS,
    MIN_LAST_TOKENS,
    MIN_PIECE_TOKENS,
    NEIGHBOUR_TOKENS,
    find_cuts,
    loudness_db,
    split,
)
from engine.listening import Listener, merge, plan_windows
from engine.s3gen.renderer import Pass, Renderer
from engine.s3gen.vocoder import SourceNoise
from engine.scheduler import in_turns
from engine.types import FloatArray
from engine.upstream import chatterbox
from tests.engine.conftest import Checkpoint, Upstream
from tests.engine.support import load_our_renderer
from tests.engine.synthetic_voices import sung_vowel
from tests.engine.test_engine import config, prompt, wait_until_idle

TOLERANCE = 1e-3
RATE = 24_000
TOKEN = 960  # samples
EDGE = round(EDGE_FADE_S * RATE)
LONG_S = 95.0


@pytest.fixture(scope="module")
def turbo(tiny_checkpoint: Checkpoint) -> Iterator[Engine]:
    with Engine.load(config(tiny_checkpoint("turbo"))) as engine:
        yield engine


@pytest.fixture(scope="module")
def long_recording() -> FloatArray:
    """95 s at 24 kHz: syllables on a wandering pitch, a pause now and then, never the same second twice."""
    noise_ = np.random.default_rng(1).normal(0, 0.02, round(LONG_S * RATE))
    time_s = np.arange(noise_.size) / RATE
    pitch_hz = 140 + 30 * np.sin(2 * np.pi * 0.07 * time_s) + 10 * np.sin(2 * np.pi * 0.9 * time_s)
    tone = np.sin(2 * np.pi * np.cumsum(pitch_hz) / RATE) * (0.55 + 0.45 * np.sin(2 * np.pi * 3.1 * time_s))
    pauses = np.sin(2 * np.pi * time_s / 4.3) > 0.95
    return (0.4 * np.where(pauses, 0.0, tone + noise_)).astype(np.float32)


def convert(engine: Engine, audio: FloatArray, **changes: Any) -> Any:
    fields: dict[str, Any] = {"audio": audio, "sample_rate": RATE, "seed": 5}
    return engine.submit_conversion(ConversionRequest(**(fields | changes)))


# ------------------------------------------------------------------------------------------- parity


class _Unmarked:
    """Stands for upstream's watermarker: ours is tested elsewhere."""

    def apply_watermark(self, wav: Any, sample_rate: int) -> Any:
        return wav


def upstream_conversion(
    upstream: Any, renderer: Renderer, path: Path, target: Path | None, seed: int, patch: pytest.MonkeyPatch
) -> tuple[FloatArray, list[int]]:
    """Upstream's ChatterboxVC.generate, its noise and its vocoder's source replaced by those of our seed."""
    module, s3gen = chatterbox("vc"), upstream.s3gen
    heard: list[int] = []

    def flow_inference(speech_tokens: Any, **arguments: Any) -> Any:
        heard.extend(speech_tokens[0].tolist())
        num_new = 2 * len(heard)
        num_frames = 2 * arguments["ref_dict"]["prompt_token"].shape[1] + num_new
        z = noise.normal(seed, noise.STREAM_FLOW, (80, num_frames), "cpu")
        with pytest.MonkeyPatch.context() as drawn:
            drawn.setattr(torch, "randn_like", lambda *_, **__: z[None].clone())
            drawn.setattr(torch, "randn", lambda *_, **__: z[None, :, -num_new:].clone())
            return type(s3gen).flow_inference(s3gen, speech_tokens, **arguments)

    def hift_inference(mel: Any, _: Any) -> Any:
        source = renderer.vocoder.make_source(mel, SourceNoise.from_seed(seed, mel.shape[2], mel.device))
        return s3gen.mel2wav.inference(mel, cache_source=source)

    patch.setattr(module.perth, "PerthImplicitWatermarker", _Unmarked)
    patch.setattr(s3gen, "flow_inference", flow_inference, raising=False)
    patch.setattr(s3gen, "hift_inference", hift_inference, raising=False)
    converter = module.ChatterboxVC(s3gen, "cpu", dict(upstream.conds.gen))
    waveform = converter.generate(str(path), None if target is None else str(target))
    patch.undo()
    return waveform[0].numpy(), heard


@pytest.mark.parametrize(
    ("model", "duration_s", "sample_rate", "target_s"),
    [
        ("original", 3.0, 24_000, 4.0),
        ("original", 2.37, 22_050, 3.34),  # an odd number of frames in the prompt
        ("original", 4.1, 16_000, None),
        ("multilingual", 2.0, 44_100, None),
        ("turbo", 3.33, 48_000, None),
        ("nano", 2.5, 8_000, None),
    ],
)
def test_a_short_clip_becomes_upstreams_tokens_and_waveform_given_the_same_noise(
    model: str,
    duration_s: float,
    sample_rate: int,
    target_s: float | None,
    tiny_checkpoint: Checkpoint,
    tiny_upstream: Upstream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    audio, folder = sung_vowel(130.0, duration_s, sample_rate), tiny_checkpoint(model)
    soundfile.write(tmp_path / "clip.wav", audio, sample_rate, subtype="FLOAT")
    voice, target = None, None
    if target_s is not None:
        voice, target = VoicePrompt(sung_vowel(220.0, target_s), RATE), tmp_path / "target.wav"
        soundfile.write(target, voice.audio, RATE, subtype="FLOAT")
    passes: list[Pass] = []
    render = Renderer.render
    with Engine.load(config(folder, model)) as engine, monkeypatch.context() as patch:

        def watched(self: Renderer, given: list[Pass]) -> list[torch.Tensor]:
            passes.extend(given)
            return render(self, given)

        patch.setattr(Renderer, "render", watched)
        speech = engine.convert(audio, sample_rate, voice, seed=5)
    (one,) = passes
    theirs, tokens = upstream_conversion(
        tiny_upstream(model), load_our_renderer(folder, model), tmp_path / "clip.wav", target, one.seed, monkeypatch
    )
    assert one.tokens.tolist() == tokens
    assert len(set(tokens)) > 10 and theirs.std() > 0.003, "a test of nothing"
    num_lost = len(tokens) * TOKEN - theirs.size  # 20 ms at the front, where the prompt's frames are odd in number
    assert num_lost == (TOKEN // 2 if target_s == 3.34 else 0)
    ours = speech.waveform[num_lost:]
    assert not speech.waveform[:num_lost].any()
    common = min(ours.size, theirs.size) - EDGE
    assert abs(ours.size - theirs.size) < TOKEN
    np.testing.assert_allclose(ours[:common], theirs[:common], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("duration_s", [0.3, 30.0, 31.0, LONG_S])
def test_a_recordings_tokens_are_those_of_upstreams_tokenizer_at_any_length(
    duration_s: float, tiny_upstream: Upstream, long_recording: FloatArray
) -> None:
    audio = resample(long_recording[: round(duration_s * RATE)], RATE, 16_000)
    tokenizer = tiny_upstream("original").s3gen.tokenizer
    theirs, _ = tokenizer(torch.from_numpy(audio)[None])
    ours = Listener(tokenizer).tokens(audio)
    assert len(set(ours.tolist())) > 5
    np.testing.assert_array_equal(ours, theirs[0])


def test_no_token_is_lost_where_upstreams_last_window_would_be_all_overlap(
    tiny_upstream: Upstream, long_recording: FloatArray
) -> None:
    audio = resample(long_recording[: round(52.5 * RATE)], RATE, 16_000)
    tokenizer = tiny_upstream("original").s3gen.tokenizer
    assert Listener(tokenizer).tokens(audio).size == 1313  # upstream: 1263


# ------------------------------------------------------------------------------------------- cutting


@given(num_tokens=st.integers(1, 10_000))
@settings(deadline=None)
def test_windows_heard_one_after_the_other_give_every_token_once_and_in_order(num_tokens: int) -> None:
    windows = plan_windows(num_tokens)
    assert all(0 < len(window) <= 750 for window in windows)
    merged = merge(windows, [np.array(window, np.int32) for window in windows])
    assert merged.tolist() == list(range(num_tokens))


@given(seed=st.integers(0, 2**32), num_tokens=st.integers(1, 6_000), quiet=st.floats(0, 1))
@settings(deadline=None)
def test_pieces_are_all_of_the_recording_and_none_is_longer_than_s3gen_speaks_well(
    seed: int, num_tokens: int, quiet: float
) -> None:
    source = np.random.default_rng(seed)
    audio = source.normal(0, 0.1, num_tokens * 640) * (source.random(num_tokens).repeat(640) > quiet)
    pieces = split(audio.astype(np.float32), num_tokens)
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == num_tokens
    for piece in pieces:
        assert piece.end - piece.start <= MAX_PIECE_TOKENS
        assert piece.first == max(0, piece.start - NEIGHBOUR_TOKENS)
        assert piece.last == min(num_tokens, piece.end + NEIGHBOUR_TOKENS)
    lengths = [piece.end - piece.start for piece in pieces]
    assert all(length >= MIN_PIECE_TOKENS for length in lengths[:-1])
    assert len(pieces) == 1 or lengths[-1] >= MIN_LAST_TOKENS


def test_a_recording_is_cut_in_the_middle_of_its_pauses() -> None:
    tokens = np.ones(1_500)
    pauses = [(340, 355), (760, 790), (1_180, 1_200)]
    for start, end in pauses:
        tokens[start:end] = 0.0
    audio = np.random.default_rng(0).normal(0, 0.1, tokens.size * 640) * tokens.repeat(640)
    cuts = find_cuts(loudness_db(audio.astype(np.float32), tokens.size))
    assert len(cuts) == len(pauses)
    for cut, (start, end) in zip(cuts, pauses, strict=True):
        assert start + 4 <= cut <= end - 4


def test_a_recording_without_a_pause_is_cut_at_its_quietest_place() -> None:
    tokens = np.ones(600)
    tokens[400:412] = 0.5  # six decibels
    audio = np.random.default_rng(0).normal(0, 0.1, tokens.size * 640) * tokens.repeat(640)
    (cut,) = find_cuts(loudness_db(audio.astype(np.float32), tokens.size))
    assert 403 <= cut <= 409


# ------------------------------------------------------------------------------------------- joining


def overlapping(signals: list[FloatArray], bounds: list[int], reach: int = 9_600) -> list[Stretch]:
    """Stretches of signals (each as long as the whole) between bounds."""
    num_samples = bounds[-1]
    stretches = []
    for signal, (start, end) in zip(signals, itertools.pairwise(bounds), strict=True):
        first, last = max(0, start - reach), min(num_samples, end + reach)
        stretches.append(Stretch(torch.from_numpy(signal[first:last]), first, start, end))
    return stretches


def test_away_from_the_joins_every_sample_is_its_own_stretchs() -> None:
    source = np.random.default_rng(2)
    bounds = [0, 96_000, 200_160, 300_480]
    signals = [source.normal(0, 0.1, bounds[-1]).astype(np.float32) for _ in range(3)]
    whole = crossfade(overlapping(signals, bounds), bounds[-1]).waveform.numpy()
    half = round(CROSSFADE_S * RATE / 2)
    for signal, (start, end) in zip(signals, itertools.pairwise(bounds), strict=True):
        inner = slice(start + half, end - half)
        np.testing.assert_array_equal(whole[inner], signal[inner])


def test_two_renderings_fade_into_each_other_at_the_same_power() -> None:
    source, bounds = np.random.default_rng(3), [0, 96_000, 200_160]
    half = round(CROSSFADE_S * RATE / 2)
    power = 0.0
    for _ in range(50):
        signals = [source.normal(0, 0.1, bounds[-1]).astype(np.float32) for _ in range(2)]
        whole = crossfade(overlapping(signals, bounds), bounds[-1]).waveform.numpy()
        power += float(np.mean(whole[bounds[1] - half : bounds[1] + half] ** 2)) / 50
    assert power == pytest.approx(0.01, rel=0.05)


def test_a_join_of_tones_that_do_not_meet_jumps_no_more_than_the_tones_themselves() -> None:
    time_s, bounds = np.arange(200_160) / RATE, [0, 96_000, 200_160]
    signals = [(0.5 * np.sin(2 * np.pi * 150 * time_s + phase)).astype(np.float32) for phase in (0.3, 2.9)]
    whole = crossfade(overlapping(signals, bounds), bounds[-1]).waveform.numpy()
    assert np.abs(np.diff(whole)).max() < 1.5 * np.abs(np.diff(signals[0])).max()


@pytest.mark.parametrize("num_samples", [199_000, 200_160, 200_400])
def test_the_whole_is_as_long_as_asked_whatever_the_last_token_brings(num_samples: int) -> None:
    signal = np.full(200_160, 0.5, np.float32)
    assembled = crossfade(overlapping([signal, signal], [0, 96_000, 200_160]), num_samples)
    waveform = assembled.waveform.numpy()
    assert waveform.size == num_samples
    assert np.abs(np.diff(waveform)).max() < 0.02, "the end clicks"
    assert assembled.spans_s[-1][1] == pytest.approx(min(num_samples, 200_160) / RATE)


# ------------------------------------------------------------------------------------------- the engine


def test_a_long_recording_comes_out_whole(turbo: Engine, long_recording: FloatArray) -> None:
    speech = turbo.convert(long_recording, RATE, prompt(1), seed=3)
    assert speech.waveform.size == long_recording.size
    assert (speech.seed, speech.model, speech.warnings) == (3, "turbo", ())
    times = [(chunk.start_s, chunk.end_s) for chunk in speech.chunks]
    assert len(times) >= 5
    assert times[0][0] == 0.0 and times[-1][1] == pytest.approx(LONG_S)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(times))
    seconds = speech.waveform.reshape(-1, RATE).std(axis=1)  # heard all through, at the joins as elsewhere
    assert seconds.min() > 0.5 * np.median(seconds) and seconds.max() < 2 * np.median(seconds)
    assert {"queue", "condition", "vocode", "master", "total"} <= set(speech.timings)


def test_the_joins_of_a_long_recording_do_not_click(
    turbo: Engine, long_recording: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renderer that sings one tone, beginning anywhere in its period: pieces never meet by themselves."""

    def render(_: Renderer, passes: list[Pass]) -> list[torch.Tensor]:
        tones = [np.sin(np.arange(len(p.tokens) * TOKEN) * 2 * np.pi * 150 / RATE + p.seed % 7) for p in passes]
        return [torch.from_numpy(0.5 * tone).float() for tone in tones]

    monkeypatch.setattr(Renderer, "render", render)
    speech = turbo.convert(long_recording, RATE, seed=3)
    assert len(speech.chunks) >= 5
    assert np.abs(np.diff(speech.waveform)).max() < 1.5 * 0.5 * 2 * np.pi * 150 / RATE


def test_the_pieces_of_a_long_recording_keep_its_order_and_lose_nothing(
    turbo: Engine, tiny_upstream: Upstream, long_recording: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renderer that writes each token's number as a level: what comes out reads as the recording's tokens."""

    def render(_: Renderer, passes: list[Pass]) -> list[torch.Tensor]:
        return [torch.from_numpy(p.tokens / 6_561).float().repeat_interleave(TOKEN) for p in passes]

    monkeypatch.setattr(Renderer, "render", render)
    speech = turbo.convert(long_recording, RATE, seed=3)
    heard = Listener(tiny_upstream("turbo").s3gen.tokenizer).tokens(resample(long_recording, RATE, 16_000))
    read = np.round(speech.waveform[TOKEN // 2 :: TOKEN] * 6_561).astype(int)
    cuts = [round(chunk.start_s * 25) for chunk in speech.chunks[1:]]
    clear = np.ones(heard.size, bool)
    for cut in cuts:
        clear[cut - 1 : cut + 1] = False  # where two renderings are heard at once
    assert heard.size == read.size and clear.sum() > 2_000
    np.testing.assert_array_equal(read[clear], heard[clear])


@pytest.mark.parametrize(("num_samples", "rate"), [(3_001, 8_000), (44_100, 44_100), (30_011, 22_050), (4_900, 48_000)])
def test_the_result_is_as_long_as_the_recording_to_the_sample(turbo: Engine, num_samples: int, rate: int) -> None:
    audio = sung_vowel(120.0, num_samples / rate + 0.1, rate)[:num_samples]
    speech = turbo.convert(audio, rate)
    assert speech.waveform.size == round(num_samples / rate * RATE)
    assert np.isfinite(speech.waveform).all() and np.abs(speech.waveform).max() > 1e-3


def test_the_same_seed_gives_the_same_audio_and_another_seed_or_voice_another(turbo: Engine) -> None:
    audio = sung_vowel(120.0, 2.0)
    first = turbo.convert(audio, RATE, prompt(1), seed=9)
    turbo.speak(SpeechRequest(text="Something in between.", max_new_tokens=12))
    assert np.array_equal(turbo.convert(audio, RATE, prompt(1), seed=9).waveform, first.waveform)
    assert not np.allclose(turbo.convert(audio, RATE, prompt(1), seed=10).waveform, first.waveform)
    assert not np.allclose(turbo.convert(audio, RATE, prompt(2), seed=9).waveform, first.waveform)
    assert not np.allclose(turbo.convert(audio, RATE, None, seed=9).waveform, first.waveform)
    drawn = turbo.convert(audio, RATE, prompt(1))
    assert np.array_equal(turbo.convert(audio, RATE, prompt(1), seed=drawn.seed).waveform, drawn.waveform)


def test_conversions_and_speech_at_once_each_get_what_they_get_alone(turbo: Engine, long_recording: FloatArray) -> None:
    spoken = SpeechRequest(text="The quick brown fox.", seed=1, top_k=1, max_new_tokens=12)
    short, long = sung_vowel(120.0, 2.0), long_recording[: 50 * RATE]
    alone = [convert(turbo, audio).result().waveform for audio in (short, long)] + [turbo.speak(spoken).waveform]
    together = [convert(turbo, short), convert(turbo, long), turbo.submit(spoken), convert(turbo, short)]
    for waveform, future in zip([*alone, alone[0]], together, strict=True):
        np.testing.assert_allclose(future.result().waveform, waveform, atol=TOLERANCE)


def test_a_target_voice_is_embedded_once_and_its_conditionals_serve_as_well(turbo: Engine) -> None:
    audio, before = sung_vowel(120.0, 1.0), turbo.stats()["conditionals_cache"]["misses"]
    by_prompt = turbo.convert(audio, RATE, prompt(77), seed=1)
    by_conditionals = turbo.convert(audio, RATE, turbo.embed(prompt(77)), seed=1)
    assert np.array_equal(by_prompt.waveform, by_conditionals.waveform)
    assert turbo.stats()["conditionals_cache"]["misses"] == before + 1


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"audio": np.zeros(0, np.float32)}, "reference_unreadable", "audio"),
        ({"audio": np.zeros((2, 9), np.float32)}, "reference_unreadable", "audio"),
        ({"audio": np.full(9_000, np.nan, np.float32)}, "reference_unreadable", "audio"),
        ({"sample_rate": 100}, "reference_unreadable", "sample_rate"),
        ({"audio": sung_vowel(120.0, 1.0)[:2_000]}, "reference_too_short", "audio"),
        ({"audio": np.zeros(48_000, np.float32)}, "reference_silent", "audio"),
        ({"voice": "ann"}, "invalid_request", "voice"),
        ({"voice": prompt(1, 0.5)}, "reference_too_short", "reference_audio"),
        ({"seed": -1}, "invalid_request", "seed"),
        ({"seed": True}, "invalid_request", "seed"),
    ],
)
def test_bad_input_gets_its_code_and_the_next_recording_is_converted(
    turbo: Engine, fields: dict[str, Any], code: str, field: str
) -> None:
    audio = sung_vowel(120.0, 1.0)
    with pytest.raises(SpeechError) as caught:
        convert(turbo, **({"audio": audio} | fields)).result()
    assert (caught.value.code, caught.value.field) == (code, field)
    assert convert(turbo, audio).result().duration_s == 1.0


def broken(good: Conditionals, key: str, **arrays: Any) -> Conditionals:
    names = ("speaker_embedding", "t3_prompt_tokens", "s3_prompt_tokens", "s3_prompt_mel", "s3_embedding")
    fields = {name: getattr(good, name) for name in names} | arrays
    return Conditionals(key=key, model_key=good.model_key, **fields)


def test_a_voice_that_breaks_the_model_fails_its_conversion_alone(turbo: Engine) -> None:
    audio, good = sung_vowel(120.0, 2.0), turbo.embed(prompt(1))
    bad = [
        broken(good, "not numbers", s3_embedding=np.full_like(good.s3_embedding, np.nan)),
        broken(good, "too wide", s3_embedding=np.ones(200, np.float32)),
        broken(good, "no tokens", s3_prompt_tokens=np.full_like(good.s3_prompt_tokens, 9_999)),
    ]
    expected = convert(turbo, audio, voice=good).result().waveform
    futures = [convert(turbo, audio, voice=voice) for voice in (good, *bad, good)]
    for future in futures[1:-1]:
        with pytest.raises(SpeechError) as caught:
            future.result()
        assert caught.value.code == "generation_failed"
    for future in (futures[0], futures[-1]):
        np.testing.assert_allclose(future.result().waveform, expected, atol=TOLERANCE)
    wait_until_idle(turbo)


def test_a_conversion_that_does_not_fit_is_out_of_memory_and_the_next_is_served(
    turbo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = sung_vowel(120.0, 1.0)
    for place in (Renderer, Listener):
        with monkeypatch.context() as patch:

            def no_memory(*_: object) -> None:
                raise torch.OutOfMemoryError("tried to allocate 1 TiB")

            patch.setattr(place, "render" if place is Renderer else "tokens", no_memory)
            with pytest.raises(SpeechError) as caught:
                convert(turbo, audio).result()
            assert caught.value.code == "out_of_memory"
        assert convert(turbo, audio).result().duration_s == 1.0


def test_cancelling_a_conversion_while_it_waits_listens_or_speaks_frees_all_it_holds(
    turbo: Engine, long_recording: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures: list[Any] = []
    rendered = 0
    render, quantize = Renderer.render, Listener._quantize

    def render_and_cancel(self: Renderer, passes: list[Pass]) -> Any:
        nonlocal rendered
        rendered += len(passes)
        futures[0].cancel()
        return render(self, passes)

    monkeypatch.setattr(Renderer, "render", render_and_cancel)
    futures.append(convert(turbo, long_recording))
    with pytest.raises(CancelledError):
        futures[0].result()
    wait_until_idle(turbo)
    assert rendered == 1, "the other pieces were spoken for nobody"

    heard = 0

    def quantize_and_cancel(self: Listener, *arguments: Any) -> Any:
        nonlocal heard
        heard += 1
        futures[1].cancel()
        return quantize(self, *arguments)

    monkeypatch.setattr(Listener, "_quantize", quantize_and_cancel)
    futures.append(convert(turbo, long_recording))
    futures.append(convert(turbo, long_recording))
    futures[2].cancel()
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result()
    assert convert(turbo, long_recording[:RATE]).result().duration_s == 1.0  # heard after all before it
    assert heard == 2, "windows were heard for nobody"
    assert rendered == 2
    wait_until_idle(turbo)


def test_conversions_count_among_the_requests_that_may_wait_and_closing_ends_them(
    tiny_checkpoint: Checkpoint, long_recording: FloatArray
) -> None:
    engine = Engine.load(config(tiny_checkpoint("turbo"), max_queued=2))
    with contextlib.closing(engine):
        futures = [convert(engine, long_recording) for _ in range(2)]
        with pytest.raises(SpeechError, match="wait already") as caught:
            convert(engine, long_recording)
        assert caught.value.code == "out_of_memory"
    for future in futures:
        with pytest.raises(SpeechError) as caught:
            future.result()
        assert caught.value.code == "cancelled"
    with pytest.raises(SpeechError, match="closed"):
        convert(engine, long_recording)


def test_closing_with_draining_finishes_conversions(tiny_checkpoint: Checkpoint) -> None:
    engine = Engine.load(config(tiny_checkpoint("turbo")))
    futures = [convert(engine, sung_vowel(120.0, 1.0)) for _ in range(3)]
    engine.close(drain=True)
    assert all(future.result().duration_s == 1.0 for future in futures)


def test_a_conversion_is_watermarked_and_the_mark_is_found(tiny_checkpoint: Checkpoint) -> None:
    with Engine.load(config(tiny_checkpoint("turbo"), watermark=True)) as engine:
        assert engine.convert(sung_vowel(120.0, 3.0), RATE).watermarked


def test_passes_are_served_in_turns_so_that_a_long_recording_holds_up_nobody() -> None:
    ready = [(1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1)]
    assert in_turns(ready) == [(1, 0), (2, 0), (3, 0), (1, 1), (3, 1), (1, 2)]
    assert in_turns([]) == []
