"""T3 over our static cache gives upstream's logits and upstream's tokens, for every family member."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.models import MODELS, START_SPEECH_TOKEN, get_model
from engine.random_checkpoint import UpstreamModels, build_upstream_t3, t3_config
from engine.random_checkpoint.values import random_state
from engine.t3.backbone import KVCache, Window
from engine.t3.decoder import DecodeRequest, VoicePrefix
from engine.t3.model import T3
from engine.types import IntArray
from engine.upstream import chatterbox
from tests.engine.conftest import Checkpoint, Upstream
from tests.engine.support import (
    CPU,
    GREEDY,
    decode,
    defaults,
    draw_with_our_noise,
    load_our_t3,
    make_decoder,
    text_tokens,
    upstream_cond,
    upstream_decode,
    upstream_logits,
    upstream_prefix,
)

TOLERANCE = 1e-3
NUM_TOKENS = 50
SEED = 2**40 + 11
WILD = {"temperature": 1.3, "repetition_penalty": 2.0, "top_p": 0.7}

Pair = tuple[T3, UpstreamModels]
models = pytest.mark.parametrize("model", MODELS)


def _shallow_nano() -> torch.nn.Module:
    """Upstream's T3 at Nano's own width and number of heads, two layers deep."""
    configs = chatterbox("models.t3.llama_configs").LLAMA_CONFIGS
    config = t3_config("nano")
    config.llama_config_name = "GPT2_small_shallow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs, "GPT2_small_shallow", configs["GPT2_small"] | {"n_layer": 2, "vocab_size": 64})
        return chatterbox("models.t3.t3").T3(config)


@pytest.fixture(scope="module")
def t3_pair(
    tiny_checkpoint: Checkpoint, tiny_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pair]:
    """model name → our T3 and upstream's, of the same weights.

    Tiny Nano and tiny multilingual v3 are Turbo and v2 under other file names: here Nano has its true width and
    v3 other weights, and S3Gen is left out.
    """

    def write_and_load(folder: Path, model: str, t3: torch.nn.Module, like: str) -> Pair:
        t3.load_state_dict(random_state(t3, seed=3))
        save_file(t3.state_dict(), folder / get_model(model).t3_file)
        return load_our_t3(folder, model), UpstreamModels(t3.eval(), None, None, tiny_upstream(like).conds)

    @functools.cache
    def load(model: str) -> Pair:
        folder = tmp_path_factory.mktemp(model)
        if model == "nano":
            return write_and_load(folder, model, _shallow_nano(), "turbo")
        if model == "multilingual-v3":
            return write_and_load(folder, model, build_upstream_t3(model), "multilingual")
        return load_our_t3(tiny_checkpoint(model), model), tiny_upstream(model)

    return load


def input_embeddings(t3: T3, text: IntArray, speech: IntArray) -> Tensor:
    """All that follows the voice, (rows, text and speech, width); a second row for guidance where there is one."""
    tokens = torch.from_numpy(text.astype(np.int64))
    rows = [t3.embed_text(tokens)]
    if t3.uses_guidance:
        rows.append(t3.embed_text(tokens, is_unconditional=True))
    spoken = torch.from_numpy(np.concatenate(([START_SPEECH_TOKEN], speech)).astype(np.int64))
    later = t3.embed_speech(spoken, torch.arange(len(spoken))).transpose(0, 1)  # (1, speech + 1, width)
    return torch.cat((torch.cat(rows), later.expand(len(rows), -1, -1)), dim=1)


def make_cache(t3: T3, prefixes: list[VoicePrefix], length: int) -> KVCache:
    """One row for each prefix."""
    cache = KVCache(t3.shape, len(prefixes), length, CPU, torch.float32)
    for row, prefix in enumerate(prefixes):
        cache.write(row, prefix.keys, prefix.values)
    return cache


@torch.inference_mode()
def our_logits(t3: T3, prefix: VoicePrefix, text: IntArray, speech: IntArray) -> Tensor:
    """Teacher-forced logits in one pass, (rows, speech + 1, vocabulary)."""
    x = input_embeddings(t3, text, speech)
    end = prefix.length + x.shape[1]
    positions = torch.arange(prefix.length, end).expand(len(x), -1)
    cache = make_cache(t3, [prefix] * len(x), end + 7)
    hidden = t3.backbone(x, cache, Window(slice(0, len(x)), end, positions))
    return t3.logits(hidden[:, -len(speech) - 1 :])


def random_speech(length: int, seed: int = 1) -> IntArray:
    return np.random.default_rng(seed).integers(0, 6561, length).astype(np.int32)


@models
@pytest.mark.parametrize(("num_text", "num_speech", "num_prompt"), [(1, 1, 20), (24, 60, 150), (130, 9, 77)])
def test_teacher_forced_logits_are_upstreams_in_the_conditional_and_the_unconditional_row(
    model: str, num_text: int, num_speech: int, num_prompt: int, t3_pair: Callable[[str], Pair]
) -> None:
    t3, upstream = t3_pair(model)
    text, speech = text_tokens(t3, num_text), random_speech(num_speech)
    prefix = upstream_prefix(make_decoder(t3), upstream, num_prompt)
    ours = our_logits(t3, prefix, text, speech)
    theirs = upstream_logits(upstream, upstream_cond(upstream, num_prompt), text, speech)
    assert theirs.shape == (2 if t3.uses_guidance else 1, num_speech + 1, t3.speech_vocab_size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model", ["turbo", "original"])
@torch.inference_mode()
def test_rows_at_different_positions_step_together_and_each_gives_upstreams_logits(
    model: str, t3_pair: Callable[[str], Pair]
) -> None:
    t3, upstream = t3_pair(model)
    decoder, num_speech = make_decoder(t3), 5
    cases = [(text_tokens(t3, 3), 150), (text_tokens(t3, 40, seed=5), 20), (text_tokens(t3, 90, seed=6), 80)]
    prefixes = [upstream_prefix(decoder, upstream, num_prompt) for _, num_prompt in cases]
    inputs = [input_embeddings(t3, text, random_speech(num_speech, i))[:1] for i, (text, _) in enumerate(cases)]
    cache = make_cache(t3, prefixes, 320)
    starts = []
    for row, (prefix, x) in enumerate(zip(prefixes, inputs, strict=True)):
        start = prefix.length + x.shape[1] - num_speech - 1
        window = Window(slice(row, row + 1), start, torch.arange(prefix.length, start)[None])
        t3.backbone(x[:, : -num_speech - 1], cache, window)
        starts.append(start)
    logits = []
    for step in range(num_speech + 1):
        x = torch.cat([x[:, x.shape[1] - num_speech - 1 + step, None] for x in inputs])
        positions = torch.tensor(starts)[:, None] + step
        logits.append(t3.logits(t3.backbone(x, cache, Window(slice(0, 3), 320, positions))))
    ours = torch.cat(logits, dim=1)
    for row, (text, num_prompt) in enumerate(cases):
        theirs = upstream_logits(upstream, upstream_cond(upstream, num_prompt), text, random_speech(num_speech, row))
        torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("model", "num_text"), [*((model, 4) for model in MODELS), ("turbo", 70), ("original", 70)])
def test_greedy_tokens_are_upstreams(model: str, num_text: int, t3_pair: Callable[[str], Pair]) -> None:
    t3, upstream = t3_pair(model)
    decoder, settings = make_decoder(t3, num_rows=2), GREEDY[t3.shape.kind]
    text = text_tokens(t3, num_text)
    request = DecodeRequest(upstream_prefix(decoder, upstream), text, settings, SEED, NUM_TOKENS)
    (ours,) = decode(decoder, request)
    theirs = upstream_decode(upstream, upstream_cond(upstream), text, settings, NUM_TOKENS)
    assert len(set(theirs)) > 5, "a test of nothing"
    assert ours.tokens.tolist() == theirs


@pytest.mark.parametrize(
    ("model", "changes"), [*((model, {}) for model in MODELS), ("turbo", WILD), ("original", WILD)]
)
def test_sampled_tokens_are_those_that_upstream_draws_with_the_same_noise(
    model: str, changes: dict[str, float], t3_pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    t3, upstream = t3_pair(model)
    decoder, settings = make_decoder(t3, num_rows=2), defaults(model, **changes)
    text = text_tokens(t3, 12)
    request = DecodeRequest(upstream_prefix(decoder, upstream), text, settings, SEED, 25)
    (ours,) = decode(decoder, request)
    draw_with_our_noise(monkeypatch, SEED)
    theirs = upstream_decode(upstream, upstream_cond(upstream), text, settings, 25)
    assert len(theirs) > 1, "a test of nothing"
    assert ours.tokens.tolist() == theirs


@pytest.mark.parametrize("cfg_weight", [0.0, 0.3, 2.0])
def test_guidance_of_any_weight_is_upstreams_and_without_it_one_row_is_enough(
    cfg_weight: float, t3_pair: Callable[[str], Pair]
) -> None:
    t3, upstream = t3_pair("original")
    decoder, settings = make_decoder(t3, num_rows=2), defaults("original", top_p=1e-6, cfg_weight=cfg_weight)
    assert decoder.rows_for(settings) == (2 if cfg_weight else 1)
    text = text_tokens(t3, 15)
    request = DecodeRequest(upstream_prefix(decoder, upstream), text, settings, SEED, 20)
    (ours,) = decode(decoder, request)
    assert ours.tokens.tolist() == upstream_decode(upstream, upstream_cond(upstream), text, settings, 20)


def test_turbo_counts_the_start_token_for_its_first_step_only_as_upstream_does(
    t3_pair: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start token is the likeliest, so the penalty on it decides: not the first step takes it, but the second."""
    _, upstream = t3_pair("turbo")
    t3 = build_upstream_t3("turbo")
    state = random_state(t3, seed=0)
    state["speech_head.bias"][START_SPEECH_TOKEN] = 40.0
    t3.load_state_dict(state)
    save_file(state, tmp_path / get_model("turbo").t3_file)
    upstream, ours = UpstreamModels(t3.eval(), None, None, upstream.conds), load_our_t3(tmp_path, "turbo")
    settings = defaults("turbo", repetition_penalty=5.0, temperature=2.2, top_p=1.0)
    text, decoder = text_tokens(ours, 6), make_decoder(ours)
    request = DecodeRequest(upstream_prefix(decoder, upstream), text, settings, SEED, 10)
    (row,) = decode(decoder, request)
    draw_with_our_noise(monkeypatch, SEED)
    assert row.tokens.tolist() == upstream_decode(upstream, upstream_cond(upstream), text, settings, 10)
    assert START_SPEECH_TOKEN not in row.tokens[:1]
    assert row.tokens[1] == START_SPEECH_TOKEN


@pytest.mark.parametrize("model", ["turbo", "original"])
def test_the_voice_decides_the_tokens(model: str, t3_pair: Callable[[str], Pair]) -> None:
    """Speaker, prompt and, where there is one, emotion each reach the logits."""
    t3, upstream = t3_pair(model)
    decoder, cond = make_decoder(t3), upstream_cond(upstream)
    speaker, prompt = cond.speaker_emb[0], cond.cond_prompt_speech_tokens[0]
    exaggeration = 0.5 if t3.uses_guidance else None
    prefixes = [
        decoder.compute_prefix(speaker, prompt, exaggeration),
        decoder.compute_prefix(speaker.flip(0), prompt, exaggeration),
        decoder.compute_prefix(speaker, prompt.flip(0), exaggeration),
    ]
    if t3.uses_guidance:
        prefixes.append(decoder.compute_prefix(speaker, prompt, 1.5))
    text = text_tokens(t3, 5)
    logits = [our_logits(t3, prefix, text, random_speech(1)) for prefix in prefixes]
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() > 10 * TOLERANCE
