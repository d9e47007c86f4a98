"""Conditionals from an array are those that upstream prepares from a file, and bad references are refused."""

from __future__ import annotations

import logging
import shutil
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from engine.conditioning import (
    SILENCE_PEAK,
    Conditioner,
    builtin_conditionals,
    conditionals_key,
    prepare_reference,
)
from engine.errors import SpeechError
from engine.models import get_model
from engine.types import Conditionals, FloatArray, VoicePrompt
from engine.upstream import chatterbox
from tests.engine.conftest import Checkpoint, Upstream

TOLERANCE = 1e-4
UPSTREAM_CLASS = {
    "original": ("tts", "ChatterboxTTS"),
    "multilingual": ("mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("tts_turbo", "ChatterboxTurboTTS"),
    "nano": ("tts_turbo", "ChatterboxTurboTTS"),
}
Loaded = Callable[[str], Conditioner]


def _voice(duration_s: float, sample_rate: int, seed: int = 0, level: float = 0.3) -> FloatArray:
    """Something like a voice: harmonics of a wandering pitch, in syllables, over a little noise."""
    source = np.random.default_rng(seed)
    time_s = np.arange(round(duration_s * sample_rate)) / sample_rate
    pitch_hz = 140 + 30 * np.sin(2 * np.pi * 0.7 * time_s) + 10 * np.sin(2 * np.pi * 2.3 * time_s)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / sample_rate
    tone = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 3.1 * time_s)
    return (level * 0.5 * (tone * syllables + 0.05 * source.standard_normal(time_s.size))).astype(np.float32)


@pytest.fixture(scope="session")
def conditioner(tiny_checkpoint: Checkpoint) -> Loaded:
    """model name → the conditioner of its tiny checkpoint."""
    return cache(lambda model: Conditioner.load(get_model(model), tiny_checkpoint(model), "print"))


def _upstream_conditionals(tiny_upstream: Upstream, model: str, path: Path) -> Any:
    """What upstream's own `prepare_conditionals` makes of a file with the same weights."""
    module, name = UPSTREAM_CLASS[model]
    models = tiny_upstream(model)
    upstream = getattr(chatterbox(module), name)(models.t3, models.s3gen, models.voice_encoder, None, "cpu")
    if hasattr(upstream, "norm_loudness"):
        # numpy 2 makes float64 of float32 times a float64 scalar, which upstream's tokenizer then refuses
        normalise = upstream.norm_loudness
        upstream.norm_loudness = lambda audio, rate: normalise(audio, rate).astype(np.float32)
    with torch.inference_mode():  # upstream keeps resamplers, and one first used in this mode works in no other
        upstream.prepare_conditionals(path)
    return upstream.conds


def _assert_equal(ours: Conditionals, theirs: Any) -> None:
    np.testing.assert_array_equal(ours.t3_prompt_tokens, theirs.t3.cond_prompt_speech_tokens[0])
    np.testing.assert_array_equal(ours.s3_prompt_tokens, theirs.gen["prompt_token"][0])
    assert int(theirs.gen["prompt_token_len"]) == ours.s3_prompt_tokens.size
    np.testing.assert_allclose(ours.speaker_embedding, theirs.t3.speaker_emb[0], atol=TOLERANCE)
    np.testing.assert_allclose(ours.s3_prompt_mel, theirs.gen["prompt_feat"][0], atol=TOLERANCE)
    np.testing.assert_allclose(ours.s3_embedding, theirs.gen["embedding"][0].detach(), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("model", "duration_s", "sample_rate"),
    [
        ("original", 1.2, 24_000),
        ("original", 4.0, 8_000),
        ("original", 7.3, 22_050),
        ("original", 12.0, 48_000),
        ("multilingual", 3.33, 44_100),
        ("multilingual", 20.0, 16_000),
        ("turbo", 5.1, 96_000),
        ("turbo", 7.3, 24_000),
        ("turbo", 20.0, 44_100),
        ("nano", 10.01, 16_000),
    ],
)
def test_an_arrays_conditionals_are_those_upstream_prepares_from_its_file(
    model: str, duration_s: float, sample_rate: int, conditioner: Loaded, tiny_upstream: Upstream, tmp_path: Path
) -> None:
    audio = _voice(duration_s, sample_rate)
    soundfile.write(tmp_path / "voice.wav", audio, sample_rate, subtype="FLOAT")
    ours = conditioner(model).embed(VoicePrompt(audio, sample_rate))
    _assert_equal(ours, _upstream_conditionals(tiny_upstream, model, tmp_path / "voice.wav"))


def test_the_mean_of_two_channels_is_what_upstream_hears_of_a_stereo_file(
    conditioner: Loaded, tiny_upstream: Upstream, tmp_path: Path
) -> None:
    stereo = np.stack([_voice(3.0, 32_000, seed=1), _voice(3.0, 32_000, seed=2, level=0.1)], axis=1)
    soundfile.write(tmp_path / "voice.wav", stereo, 32_000, subtype="FLOAT")
    ours = conditioner("original").embed(VoicePrompt(stereo.mean(axis=1), 32_000))
    _assert_equal(ours, _upstream_conditionals(tiny_upstream, "original", tmp_path / "voice.wav"))


def test_every_family_hears_as_much_of_a_long_prompt_as_upstream_lets_it(conditioner: Loaded) -> None:
    prompt = VoicePrompt(_voice(20.0, 24_000), 24_000)
    original, turbo = conditioner("original").embed(prompt), conditioner("turbo").embed(prompt)
    assert (original.t3_prompt_tokens.size, turbo.t3_prompt_tokens.size) == (150, 375)
    for conditionals in (original, turbo):
        assert conditionals.s3_prompt_mel.shape == (500, 80)
        assert conditionals.s3_prompt_tokens.size == 250


def test_a_prompt_of_an_odd_number_of_frames_keeps_half_of_them_as_tokens(conditioner: Loaded) -> None:
    conditionals = conditioner("original").embed(VoicePrompt(_voice(7.3, 24_000), 24_000))
    assert conditionals.s3_prompt_mel.shape == (365, 80)
    assert conditionals.s3_prompt_tokens.size == 182


def test_the_test_voice_tells_the_networks_apart(conditioner: Loaded) -> None:
    """Parity of constants would prove nothing: tokens vary, and another voice has other embeddings."""
    first, second = (conditioner("original").embed(VoicePrompt(_voice(4.0, 24_000, seed), 24_000)) for seed in (1, 2))
    assert len(set(first.s3_prompt_tokens.tolist())) > 20
    assert np.abs(first.s3_embedding - second.s3_embedding).max() > 10 * TOLERANCE
    assert np.abs(first.s3_prompt_mel - second.s3_prompt_mel).max() > 10 * TOLERANCE


def test_a_prompts_loudness_is_measured_without_touching_the_processs_warnings(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Two voices at once would put the filters back in the wrong order, and all warnings would be off for good."""
    measure, filters, seen = pyloudnorm.Meter.integrated_loudness, list(warnings.filters), []

    def watched(*arguments: Any) -> Any:
        seen.append(list(warnings.filters))
        return measure(*arguments)

    monkeypatch.setattr(pyloudnorm.Meter, "integrated_loudness", watched)
    for level in (0.3, 0.003):
        prepare_reference(VoicePrompt(_voice(6.0, 24_000, level=level), 24_000), get_model("turbo"))
    below_the_gate = np.zeros(6 * 24_000, np.float32)
    below_the_gate[1000] = 2 * SILENCE_PEAK
    prepare_reference(VoicePrompt(below_the_gate, 24_000), get_model("turbo"))
    assert seen == [filters] * 3
    assert not list(recwarn)


def test_turbo_takes_a_prompt_at_the_same_loudness_however_loud_it_was_recorded() -> None:
    loud, quiet = (
        prepare_reference(VoicePrompt(_voice(6.0, 24_000, level=level), 24_000), get_model("turbo"))
        for level in (0.9, 0.02)
    )
    np.testing.assert_allclose(loud.audio_24k, quiet.audio_24k, atol=1e-4)
    untouched = prepare_reference(VoicePrompt(_voice(6.0, 24_000), 24_000), get_model("original"))
    np.testing.assert_array_equal(untouched.audio_24k, _voice(6.0, 24_000))


@pytest.mark.parametrize(
    ("model", "duration_s"), [("original", 0.3), ("original", 0.99), ("turbo", 5.0), ("nano", 3.0)]
)
def test_a_reference_that_is_too_short_is_refused(model: str, duration_s: float) -> None:
    with pytest.raises(SpeechError) as caught:
        prepare_reference(VoicePrompt(_voice(duration_s, 16_000), 16_000), get_model(model))
    assert caught.value.code == "reference_too_short"
    assert f"more than {get_model(model).min_reference_s:g} s" in caught.value.message


@pytest.mark.parametrize("offset", [0.0, 0.25])
@pytest.mark.parametrize("model", ["original", "turbo"])
def test_a_silent_reference_is_refused_whatever_its_offset(model: str, offset: float) -> None:
    audio = _voice(6.0, 16_000)
    audio = offset + audio / np.abs(audio).max() * SILENCE_PEAK / 2
    with pytest.raises(SpeechError) as caught:
        prepare_reference(VoicePrompt(audio, 16_000), get_model(model))
    assert caught.value.code == "reference_silent"


def test_a_voice_beside_silence_gives_finite_conditionals(conditioner: Loaded) -> None:
    audio = np.zeros(6 * 24_000, np.float32)
    audio[100_000:101_000] = _voice(1.0, 24_000)[:1000]
    conditionals = conditioner("turbo").embed(VoicePrompt(audio, 24_000))
    for name in ("speaker_embedding", "s3_prompt_mel", "s3_embedding"):
        assert np.isfinite(getattr(conditionals, name)).all(), name


def test_embedding_prints_and_logs_nothing_and_leaves_the_prompt_alone(
    conditioner: Loaded, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    prompt = VoicePrompt(_voice(12.34, 24_000, level=4.0).clip(-1, 1), 24_000)
    before = prompt.audio.copy()
    conditioner("turbo")
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        conditioner("turbo").embed(prompt)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    np.testing.assert_array_equal(prompt.audio, before)


def test_prompts_embedded_at_the_same_time_give_what_each_gives_alone(conditioner: Loaded) -> None:
    shared = conditioner("original")
    prompts = [VoicePrompt(_voice(2.0 + index / 3, 24_000, index), 24_000) for index in range(4)]
    alone = [shared.embed(prompt) for prompt in prompts]
    together: dict[int, Conditionals] = {}
    threads = [
        threading.Thread(target=lambda i=index: together.update({i: shared.embed(prompts[i])})) for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, conditionals in enumerate(alone):
        for name in ("speaker_embedding", "t3_prompt_tokens", "s3_prompt_tokens", "s3_prompt_mel", "s3_embedding"):
            np.testing.assert_array_equal(getattr(together[index], name), getattr(conditionals, name), name)


def test_keys_tell_prompts_and_checkpoints_apart_and_are_known_before_embedding(conditioner: Loaded) -> None:
    prompt, other = (VoicePrompt(_voice(2.0, 24_000, seed), 24_000) for seed in (1, 2))
    spec = get_model("original")
    keys = {
        conditionals_key(prompt, spec, "print"),
        conditionals_key(other, spec, "print"),
        conditionals_key(prompt, spec, "another print"),
        conditionals_key(prompt, get_model("multilingual"), "print"),
    }
    assert len(keys) == 4
    conditionals = conditioner("original").embed(prompt)
    assert conditionals.key == conditioner("original").key(prompt) == conditionals_key(prompt, spec, "print")
    assert conditionals.model_key == "original/print/1"


def test_loading_leaves_nothing_on_the_meta_device_and_matches_the_file(
    conditioner: Loaded, tiny_upstream: Upstream
) -> None:
    networks, upstream = conditioner("original")._networks, tiny_upstream("original")
    for ours, theirs in (
        (networks.tokenizer, upstream.s3gen.tokenizer),
        (networks.speaker_encoder, upstream.s3gen.speaker_encoder),
        (networks.voice_encoder, upstream.voice_encoder),
    ):
        state = ours.state_dict()
        assert state.keys() == theirs.state_dict().keys()
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)
    assert torch.equal(networks.tokenizer.encoder.freqs_cis, upstream.s3gen.tokenizer.encoder.freqs_cis)


def test_a_file_without_the_speaker_encoder_is_named(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, spec = tiny_checkpoint("original"), get_model("original")
    state = load_file(folder / spec.s3gen_file)
    save_file(
        {name: tensor for name, tensor in state.items() if name.startswith("tokenizer.")}, tmp_path / spec.s3gen_file
    )
    shutil.copy(folder / spec.voice_encoder_file, tmp_path)
    with pytest.raises(SpeechError, match=r"s3gen\.safetensors.*speaker_encoder") as caught:
        Conditioner.load(spec, tmp_path, "print")
    assert caught.value.code == "weights_missing"


@pytest.mark.parametrize("model", ["original", "multilingual", "turbo", "nano"])
def test_the_built_in_voice_is_upstreams(model: str, tiny_checkpoint: Checkpoint, tiny_upstream: Upstream) -> None:
    ours = builtin_conditionals(tiny_checkpoint(model), get_model(model), "print")
    assert ours is not None
    _assert_equal(ours, tiny_upstream(model).conds)
    assert ours.model_key == f"{get_model(model).family}/print/1"


def test_a_checkpoint_without_a_built_in_voice_has_none(tmp_path: Path) -> None:
    assert builtin_conditionals(tmp_path, get_model("turbo"), "print") is None


@pytest.mark.parametrize("content", [{"t3": {}, "gen": {}}, {"t3": None}, [1]])
def test_a_damaged_built_in_voice_is_named(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "conds.pt")
    with pytest.raises(SpeechError, match=r"conds\.pt") as caught:
        builtin_conditionals(tmp_path, get_model("turbo"), "print")
    assert caught.value.code == "weights_missing"
