"""S3Gen gives upstream's mel and waveform for the same noise, and each row of a batch what it gives alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import noise
from engine.random_checkpoint import UpstreamModels
from engine.s3gen.flow import FlowRequest, FlowVoice
from engine.s3gen.renderer import MAX_PADDING, Pass, Renderer, group_by_length
from engine.s3gen.streaming import SEAM_SAMPLES, StreamedPass
from engine.s3gen.vocoder import NUM_HARMONICS, SAMPLES_PER_FRAME, SINE_AMPLITUDE, SourceNoise
from tests.engine.conftest import Checkpoint, Upstream
from tests.engine.support import load_our_renderer

TOLERANCE = 1e-3
SAMPLES_PER_TOKEN = 960
FAMILIES = pytest.mark.parametrize("model", ["turbo", "original"])  # mean flow in 2 steps; 10 Euler steps with CFG

LoadRenderer = Callable[[str], Renderer]


@pytest.fixture(scope="module")
def renderer(tiny_checkpoint: Checkpoint) -> LoadRenderer:
    """model name → renderer of its tiny checkpoint; Nano and the other multilingual have no S3Gen of their own."""
    return functools.cache(lambda model: load_our_renderer(tiny_checkpoint(model), model))


def make_voice(num_tokens: int, num_mel_frames: int, seed: int = 0) -> FlowVoice:
    source = torch.Generator().manual_seed(seed)
    return FlowVoice(
        tokens=torch.randint(6561, (num_tokens,), generator=source),
        mel=torch.randn(num_mel_frames, 80, generator=source) * 2 - 5,
        embedding=torch.randn(192, generator=source),
    )


def make_tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(6561, (length,), generator=torch.Generator().manual_seed(100 + seed))


def make_request(num_prompt: int, num_tokens: int, *, odd: bool = False, seed: int = 0) -> FlowRequest:
    """A request whose prompt has 2P mel frames, or 2P + 1."""
    voice = make_voice(num_prompt, 2 * num_prompt + odd, seed)
    z = noise.normal(seed, noise.STREAM_FLOW, (80, 2 * (num_prompt + num_tokens)), "cpu")
    return FlowRequest(voice, make_tokens(num_tokens, seed), z)


def make_mel(num_frames: int, seed: int = 0, num_rows: int = 1) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, 80, num_frames, generator=source) * 2 - 5


def upstream_ref(voice: FlowVoice) -> dict[str, Any]:
    return {
        "prompt_token": voice.tokens[None],
        "prompt_token_len": torch.tensor([len(voice.tokens)]),
        "prompt_feat": voice.mel[None],
        "prompt_feat_len": None,
        "embedding": voice.embedding[None],
    }


def upstream_mel(upstream: UpstreamModels, request: FlowRequest, patch: pytest.MonkeyPatch) -> Tensor:
    """(80, frames) by upstream, its noise replaced by the request's."""
    num_new = 2 * len(request.tokens)
    patch.setattr(torch, "randn_like", lambda *_, **__: request.noise[None].clone())
    patch.setattr(torch, "randn", lambda *_, **__: request.noise[None, :, -num_new:].clone())
    mel = upstream.s3gen.flow_inference(request.tokens[None], ref_dict=upstream_ref(request.voice), finalize=True)
    patch.undo()
    return mel[0]


# ------------------------------------------------------------------------------------------- flow


@pytest.mark.parametrize(
    ("model", "num_prompt", "num_tokens", "odd"),
    [
        *(
            (model, *case)
            for model in ("turbo", "original")
            for case in [(50, 40, False), (21, 33, True), (3, 1, False), (8, 70, True)]
        ),
        ("multilingual", 21, 33, True),
        ("nano", 21, 33, True),
    ],
)
@torch.inference_mode()
def test_mel_is_upstreams_given_the_same_noise(
    model: str,
    num_prompt: int,
    num_tokens: int,
    odd: bool,
    renderer: LoadRenderer,
    tiny_upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = make_request(num_prompt, num_tokens, odd=odd)
    (ours,) = renderer(model).flow([request])
    theirs = upstream_mel(tiny_upstream(model), request, monkeypatch)
    assert ours.shape == (80, 2 * num_tokens - odd)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@FAMILIES
@torch.inference_mode()
def test_each_row_of_a_padded_batch_is_what_it_is_alone(model: str, renderer: LoadRenderer) -> None:
    """Prompts and texts of different lengths, even and odd, so that the new frames begin anywhere."""
    flow = renderer(model).flow
    requests = [
        make_request(40, 30, seed=0),
        make_request(12, 31, odd=True, seed=1),
        make_request(55, 4, odd=True, seed=2),
        make_request(5, 70, seed=3),
        make_request(5, 1, seed=4),
    ]
    for mel, request in zip(flow(requests), requests, strict=True):
        (alone,) = flow([request])
        assert mel.shape == alone.shape
        torch.testing.assert_close(mel, alone, rtol=0, atol=TOLERANCE)


@FAMILIES
@torch.inference_mode()
def test_nothing_of_a_longer_neighbour_or_the_padding_reaches_a_row(model: str, renderer: LoadRenderer) -> None:
    """Loud neighbours of one length: whatever leaked from them or with them would differ between the two."""
    flow = renderer(model).flow
    short = make_request(10, 12)
    loud, louder = make_request(15, 20, seed=1), make_request(15, 20, seed=2)
    louder = dataclasses.replace(louder, noise=louder.noise * 50)
    torch.testing.assert_close(flow([short, loud])[0], flow([short, louder])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(flow([louder, short])[1], flow([short])[0], rtol=0, atol=TOLERANCE)


@FAMILIES
@torch.inference_mode()
def test_the_tokens_the_voice_and_the_noise_each_shape_the_mel(model: str, renderer: LoadRenderer) -> None:
    flow = renderer(model).flow
    request = make_request(10, 12)
    voice, other = request.voice, make_voice(10, 20, seed=9)
    variants = [
        dataclasses.replace(request, tokens=make_tokens(12, seed=9)),
        dataclasses.replace(request, noise=-request.noise),
        *(
            dataclasses.replace(request, voice=dataclasses.replace(voice, **{part: getattr(other, part)}))
            for part in ("tokens", "mel", "embedding")
        ),
    ]
    (plain,) = flow([request])
    for variant in variants:
        assert (flow([variant])[0] - plain).abs().max() > 10 * TOLERANCE


# ------------------------------------------------------------------------------------------- vocoder


@FAMILIES
@pytest.mark.parametrize("num_frames", [1, 7, 80])
@torch.inference_mode()
def test_waveform_is_upstreams_given_the_same_source(
    model: str, num_frames: int, renderer: LoadRenderer, tiny_upstream: Upstream
) -> None:
    vocoder, mel = renderer(model).vocoder, make_mel(num_frames)
    source = vocoder.make_source(mel, SourceNoise.from_seed(3, num_frames, torch.device("cpu")))
    ours = vocoder.decode(mel, source)
    theirs, _ = tiny_upstream(model).s3gen.mel2wav.inference(mel, cache_source=source)
    assert ours.shape == (1, num_frames * SAMPLES_PER_FRAME)
    assert theirs.std() > 0.003, "a test of nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_pitch_is_upstreams(renderer: LoadRenderer, tiny_upstream: Upstream) -> None:
    mel = make_mel(40)
    theirs = tiny_upstream("original").s3gen.mel2wav.f0_predictor(mel)
    assert theirs.std() > 1.0, "a test of nothing"
    torch.testing.assert_close(renderer("original").vocoder.f0_predictor(mel), theirs, rtol=1e-5, atol=TOLERANCE)


@torch.inference_mode()
def test_source_is_upstreams_given_the_same_pitch_phases_and_noise(
    renderer: LoadRenderer, tiny_upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream draws one noise per harmonic and mixes them: the same mix, as one signal of unit variance, is ours."""
    vocoder, mel2wav = renderer("original").vocoder, tiny_upstream("original").s3gen.mel2wav
    f0 = torch.tensor([[120.0, 0.0, 9.9, 10.1, 440.0] * 8])  # with a voice and without, to both sides of the threshold
    num_frames = f0.shape[1]
    drawn = torch.randn(1, NUM_HARMONICS + 1, num_frames * SAMPLES_PER_FRAME)
    phases = SourceNoise.from_seed(3, num_frames, torch.device("cpu")).phases
    weights = vocoder.source_mix.weight  # (1, harmonics)
    monkeypatch.setattr(type(vocoder.f0_predictor), "forward", lambda *_: f0)
    ours = vocoder.make_source(make_mel(num_frames), SourceNoise(phases, (weights @ drawn) / weights.norm()))
    monkeypatch.setattr(torch, "randn_like", lambda like: drawn if like.shape == drawn.shape else like)
    monkeypatch.setattr(torch.distributions.Uniform, "sample", lambda *_, **__: phases.clone())
    theirs = mel2wav.m_source(mel2wav.f0_upsamp(f0[:, None]).transpose(1, 2))[0].transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_sound_without_a_voice_is_noise_alone(renderer: LoadRenderer) -> None:
    vocoder = copy.deepcopy(renderer("original").vocoder)
    for parameter in vocoder.f0_predictor.out.parameters():
        parameter.zero_()
    mel, drawn = make_mel(50), SourceNoise.from_seed(1, 50, torch.device("cpu"))
    noiseless = vocoder.make_source(mel, SourceNoise(drawn.phases, torch.zeros_like(drawn.noise)))
    assert noiseless.std() < 1e-6
    expected_std = SINE_AMPLITUDE / 3 * vocoder.source_mix.weight.norm()
    assert vocoder.make_source(mel, drawn).atanh().std() == pytest.approx(expected_std.item(), rel=0.02)


def test_source_noise_is_standard_normal_with_phases_all_around_and_the_first_at_zero() -> None:
    drawn = [SourceNoise.from_seed(seed, 20, torch.device("cpu")) for seed in range(200)]
    phases = torch.stack([source.phases[0, :, 0] for source in drawn])  # (seeds, harmonics)
    assert phases.shape == (200, NUM_HARMONICS + 1)
    assert (phases[:, 0] == 0).all()
    assert phases[:, 1:].abs().max() <= math.pi
    assert abs(phases[:, 1:].mean()) < 4 * math.pi / math.sqrt(3 * 1600)
    assert abs(phases[:, 1:].std() - math.pi / math.sqrt(3)) < 0.1
    assert abs(torch.cat([source.noise for source in drawn]).std() - 1) < 0.01


def test_a_later_piece_of_an_utterance_continues_its_source_noise() -> None:
    whole = SourceNoise.from_seed(5, 30, torch.device("cpu"))
    piece = SourceNoise.from_seed(5, 10, torch.device("cpu"), first_frame=20)
    assert torch.equal(piece.noise, whole.noise[:, :, 20 * SAMPLES_PER_FRAME :])
    assert torch.equal(piece.phases, whole.phases)


@pytest.mark.parametrize("num_frames", [1, 2, 30])
@torch.inference_mode()
def test_an_utterance_fades_in_as_upstreams_does(
    num_frames: int, renderer: LoadRenderer, tiny_upstream: Upstream
) -> None:
    vocoder, mel = renderer("turbo").vocoder, make_mel(num_frames)
    source = SourceNoise.from_seed(3, num_frames, torch.device("cpu"))
    plain, faded = vocoder(mel, source, fade_in=False), vocoder(mel, source)
    expected = plain.clone()
    trim_fade = tiny_upstream("turbo").s3gen.trim_fade[: expected.shape[1]]
    expected[:, : len(trim_fade)] *= trim_fade
    torch.testing.assert_close(faded, expected, rtol=0, atol=1e-6)
    assert not faded[:, :480].any()


@torch.inference_mode()
def test_utterances_of_one_length_are_spoken_together_as_alone(renderer: LoadRenderer) -> None:
    vocoder, mel = renderer("turbo").vocoder, make_mel(25, num_rows=3)
    sources = [SourceNoise.from_seed(seed, 25, torch.device("cpu")) for seed in (1, 2, 3)]
    together = vocoder(mel, SourceNoise(torch.cat([s.phases for s in sources]), torch.cat([s.noise for s in sources])))
    for row, source in enumerate(sources):
        torch.testing.assert_close(together[row], vocoder(mel[row, None], source)[0], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_audio_stays_below_full_scale_however_loud_the_mel(renderer: LoadRenderer) -> None:
    waveform = renderer("turbo").vocoder(make_mel(10) * 20, SourceNoise.from_seed(1, 10, torch.device("cpu")))
    assert torch.isfinite(waveform).all()
    assert 0.5 < waveform.abs().max() <= 0.99


@torch.inference_mode()
def test_a_new_rendering_begins_where_the_old_one_would_have_gone_on(renderer: LoadRenderer) -> None:
    """However much the mel has changed: there is no step at a seam, and 20 ms later the new one is heard alone."""
    vocoder = renderer("turbo").vocoder
    before, after = make_mel(60, seed=1)[0], make_mel(90, seed=2)[0]
    _, heard = StreamedPass(5).speak(vocoder, before, is_last=False)
    assert heard.tail is not None
    faded, _ = heard.speak(vocoder, after, is_last=True)
    alone, _ = dataclasses.replace(heard, tail=torch.zeros_like(heard.tail)).speak(vocoder, after, is_last=True)
    assert abs(float(faded[0] - heard.tail[0])) < 0.01 * float(heard.tail.abs().max())
    assert torch.equal(faded[SEAM_SAMPLES:], alone[SEAM_SAMPLES:])
    assert not torch.equal(faded[:SEAM_SAMPLES], alone[:SEAM_SAMPLES])


# ------------------------------------------------------------------------------------------- renderer


def make_pass(num_prompt: int, num_tokens: int, *, odd: bool = False, seed: int = 0) -> Pass:
    voice = make_voice(num_prompt, 2 * num_prompt + odd, seed)
    return Pass(voice, make_tokens(num_tokens, seed).numpy().astype(np.int32), seed)


@FAMILIES
def test_passes_rendered_together_are_what_they_are_alone_and_in_their_order(
    model: str, renderer: LoadRenderer
) -> None:
    ours = renderer(model)
    passes = [
        make_pass(20, 5, seed=1),
        make_pass(20, 30, seed=2),
        make_pass(22, 28, odd=True, seed=3),
        make_pass(20, 5, seed=4),
        make_pass(3, 1, seed=5),
        make_pass(21, 29, odd=True, seed=6),
    ]
    together = ours.render(passes)
    for one, waveform in zip(passes, together, strict=True):
        is_odd = len(one.voice.mel) % 2
        assert waveform.shape == (SAMPLES_PER_TOKEN * len(one.tokens) - SAMPLES_PER_FRAME * is_odd,)
        torch.testing.assert_close(waveform, ours.render([one])[0], rtol=0, atol=TOLERANCE)


@FAMILIES
def test_the_same_pass_gives_the_same_waveform_bit_for_bit_and_another_seed_another(
    model: str, renderer: LoadRenderer
) -> None:
    ours, one = renderer(model), make_pass(10, 10, seed=2**40)
    (first,) = ours.render([one])
    ours.render([make_pass(12, 8, seed=1), make_pass(5, 5, seed=2)])
    assert torch.equal(ours.render([one])[0], first)
    assert not torch.equal(ours.render([dataclasses.replace(one, seed=1)])[0], first)


@pytest.mark.parametrize("model", ["turbo", "nano", "original", "multilingual"])
def test_a_rendered_pass_is_upstreams_utterance_given_the_same_noise_and_source(
    model: str, renderer: LoadRenderer, tiny_upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, upstream, one = renderer(model), tiny_upstream(model), make_pass(20, 24, seed=77)
    (waveform,) = ours.render([one])
    z = noise.normal(one.seed, noise.STREAM_FLOW, (80, one.num_frames), "cpu")
    request = FlowRequest(one.voice, torch.from_numpy(one.tokens).long(), z)
    with torch.inference_mode():
        mel = upstream_mel(upstream, request, monkeypatch)[None]
        source = ours.vocoder.make_source(mel, SourceNoise.from_seed(one.seed, mel.shape[2], mel.device))
        theirs, _ = upstream.s3gen.mel2wav.inference(mel, cache_source=source)
        theirs[:, : len(upstream.s3gen.trim_fade)] *= upstream.s3gen.trim_fade
    torch.testing.assert_close(waveform, theirs[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("max_frames", [1, 120, 10_000])
def test_the_budget_of_a_batch_changes_nothing_that_is_heard(max_frames: int, tiny_checkpoint: Checkpoint) -> None:
    passes = [make_pass(10, num_tokens, seed=num_tokens) for num_tokens in (6, 7, 20, 6)]
    ours = load_our_renderer(tiny_checkpoint("turbo"), "turbo", max_frames)
    for one, waveform in zip(passes, ours.render(passes), strict=True):
        torch.testing.assert_close(waveform, ours.render([one])[0], rtol=0, atol=TOLERANCE)


def test_nothing_to_render_is_nothing(renderer: LoadRenderer) -> None:
    assert renderer("turbo").render([]) == []


lengths = st.lists(st.integers(1, 1000), max_size=60)


def cost(group: Sequence[int], of: Sequence[int]) -> int:
    """Frames of a batch, padding included."""
    return len(group) * max(of[i] for i in group)


@given(of=lengths, budget=st.integers(1, 5000))
@settings(deadline=None)
def test_groups_hold_every_pass_once(of: list[int], budget: int) -> None:
    groups = list(group_by_length(of, budget))
    assert sorted(index for group in groups for index in group) == list(range(len(of)))
    assert all(groups)


@given(of=lengths, budget=st.integers(1, 5000))
@settings(deadline=None)
def test_groups_respect_the_budget_unless_one_pass_alone_exceeds_it(of: list[int], budget: int) -> None:
    for group in group_by_length(of, budget):
        assert len(group) == 1 or cost(group, of) <= budget


@given(of=lengths, budget=st.integers(1, 5000))
@settings(deadline=None)
def test_groups_pad_no_more_than_the_bound(of: list[int], budget: int) -> None:
    for group in group_by_length(of, budget):
        longest, shortest = max(of[i] for i in group), min(of[i] for i in group)
        assert shortest >= longest * (1 - MAX_PADDING)


@given(count=st.integers(1, 40), length=st.integers(1, 300))
@settings(deadline=None)
def test_equal_passes_share_as_few_batches_as_the_budget_allows(count: int, length: int) -> None:
    per_group = max(1, 1000 // length)
    assert len(list(group_by_length([length] * count, 1000))) == math.ceil(count / per_group)
