"""What tests of T3 and S3Gen share: our modules loaded from a folder, upstream's driven beside them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import noise
from engine.models import START_TEXT_TOKEN, STOP_TEXT_TOKEN, get_model
from engine.random_checkpoint import UpstreamModels, t3_config
from engine.s3gen.renderer import Renderer, load_renderer
from engine.t3.decoder import DecodedRow, Decoder, DecodeRequest, VoicePrefix
from engine.t3.model import T3, load_t3
from engine.t3.sampling import SamplingSettings
from engine.types import IntArray
from engine.upstream import chatterbox

CPU = torch.device("cpu")
NO_TOP_K = 1 << 30
EXAGGERATION = 0.7

GREEDY = {  # how a family is made to take the best token, as far as its filters come after the penalty
    "llama": SamplingSettings(
        temperature=0.8, top_p=1e-6, repetition_penalty=1.2, top_k=NO_TOP_K, min_p=0.05, cfg_weight=0.5
    ),
    "gpt2": SamplingSettings(temperature=0.8, top_p=0.95, repetition_penalty=1.2, top_k=1, min_p=0.0, cfg_weight=0.0),
}


def load_our_t3(folder: Path, model: str) -> T3:
    return load_t3(folder / get_model(model).t3_file, CPU, torch.float32)


def load_our_renderer(folder: Path, model: str, max_frames: int = 4000) -> Renderer:
    return load_renderer(
        get_model(model),
        folder / get_model(model).s3gen_file,
        CPU,
        torch.float32,
        autocast=contextlib.nullcontext,
        exact=contextlib.nullcontext,
        max_frames=max_frames,
    )


def defaults(model: str, **changes: Any) -> SamplingSettings:
    """The model's own sampling."""
    values = get_model(model).sampling
    settings = SamplingSettings(
        temperature=values.temperature,
        top_p=values.top_p,
        repetition_penalty=values.repetition_penalty,
        top_k=values.top_k or NO_TOP_K,
        min_p=values.min_p or 0.0,
        cfg_weight=values.cfg_weight or 0.0,
    )
    return dataclasses.replace(settings, **changes)


def text_tokens(t3: T3, length: int, seed: int = 0) -> IntArray:
    """Random text of so many tokens; llama models have their start and stop around it."""
    vocab_size = t3.text_embedding.num_embeddings
    text = np.random.default_rng(seed).integers(START_TEXT_TOKEN + 1, vocab_size, length)
    if t3.uses_guidance:
        text = np.concatenate(([START_TEXT_TOKEN], text, [STOP_TEXT_TOKEN]))
    return text.astype(np.int32)


def make_decoder(t3: T3, num_rows: int = 4, length: int = 640, max_new_tokens: int = 64) -> Decoder:
    return Decoder(t3, num_rows=num_rows, length=length, max_new_tokens=max_new_tokens)


def random_prefix(decoder: Decoder, num_prompt_tokens: int = 30, seed: int = 0) -> VoicePrefix:
    """A voice's prefix from random conditionals."""
    source = torch.Generator().manual_seed(seed)
    speaker = torch.nn.functional.normalize(torch.rand(256, generator=source), dim=0)
    prompt = torch.randint(6561, (num_prompt_tokens,), generator=source)
    return decoder.compute_prefix(speaker, prompt, EXAGGERATION if decoder.model.uses_guidance else None)


def decode(decoder: Decoder, *requests: DecodeRequest) -> list[DecodedRow]:
    """Decode the requests together until all have ended, and free their rows."""
    handles = [decoder.admit(request) for request in requests]
    assert None not in handles, "fewer rows than requests"
    return finish(decoder, *(handle for handle in handles if handle is not None))


def finish(decoder: Decoder, *handles: int, stride: int = 8) -> list[DecodedRow]:
    """Step until these chunks have ended, then free their rows."""
    rows = decoder.read()
    while not all(rows[handle].has_ended for handle in handles):
        decoder.step(stride)
        rows = decoder.read()
    for handle in handles:
        decoder.release(handle)
    return [rows[handle] for handle in handles]


# ---------------------------------------------------------------------------------------- upstream's side


def upstream_cond(upstream: UpstreamModels, num_prompt_tokens: int | None = None) -> Any:
    """A T3Cond of its own (upstream writes into it), with a prompt of so many tokens and `EXAGGERATION`."""
    conds = upstream.conds.t3
    return chatterbox("models.t3.modules.cond_enc").T3Cond(
        speaker_emb=conds.speaker_emb,
        cond_prompt_speech_tokens=conds.cond_prompt_speech_tokens[:, :num_prompt_tokens],
        emotion_adv=EXAGGERATION * torch.ones(1, 1, 1),
    )


def upstream_prefix(decoder: Decoder, upstream: UpstreamModels, num_prompt_tokens: int | None = None) -> VoicePrefix:
    """Our prefix of the voice of `upstream_cond`."""
    cond = upstream_cond(upstream, num_prompt_tokens)
    exaggeration = EXAGGERATION if decoder.model.uses_guidance else None
    return decoder.compute_prefix(cond.speaker_emb[0], cond.cond_prompt_speech_tokens[0], exaggeration)


def without_analyzer(upstream: UpstreamModels) -> Any:
    """Upstream's T3 that does not take itself for multilingual, whose alignment analyzer alters the logits."""
    t3 = copy.copy(upstream.t3)
    if not t3.is_gpt:
        t3.hp = t3_config("original")
    return t3


@torch.inference_mode()
def upstream_logits(upstream: UpstreamModels, cond: Any, text: IntArray, speech: IntArray) -> Tensor:
    """Upstream's teacher-forced logits, (rows, speech + 1, vocabulary); llama has the unconditional row too."""
    t3 = upstream.t3
    num_rows = 1 if t3.is_gpt else 2
    rows = torch.from_numpy(text.astype(np.int64)).expand(num_rows, -1)
    start = torch.full((num_rows, 1), t3.hp.start_speech_token)
    embeds, _ = t3.prepare_input_embeds(t3_cond=cond, text_tokens=rows, speech_tokens=start, cfg_weight=0.5)
    tokens = torch.from_numpy(speech.astype(np.int64))[None]
    if t3.is_gpt:
        later = t3.speech_emb(tokens)
    else:  # its loop puts a second start token in, then the i-th token at position i + 1
        later = t3.speech_emb(torch.cat((start[:1], tokens), dim=1)) + t3.speech_pos_emb.emb.weight[: len(speech) + 1]
    x = torch.cat((embeds, later.expand(num_rows, -1, -1)), dim=1)
    return t3.speech_head(t3.tfmr(inputs_embeds=x).last_hidden_state[:, -len(speech) - 1 :])


def upstream_decode(
    upstream: UpstreamModels, cond: Any, text: IntArray, settings: SamplingSettings, num_tokens: int
) -> list[int]:
    """Upstream's own decoding loop: at most so many tokens, without the stop token."""
    t3 = without_analyzer(upstream)
    tokens = torch.from_numpy(text.astype(np.int64))[None]
    common = {"temperature": settings.temperature, "top_p": settings.top_p}
    common |= {"repetition_penalty": settings.repetition_penalty}
    if t3.is_gpt:
        decoded = t3.inference_turbo(cond, tokens, top_k=settings.top_k, max_gen_len=num_tokens - 1, **common)
    else:
        decoded = t3.inference(
            t3_cond=cond,
            text_tokens=tokens.expand(2, -1),
            max_new_tokens=num_tokens,
            min_p=settings.min_p,
            cfg_weight=settings.cfg_weight,
            **common,
        )
    return [token for token in decoded[0].tolist() if token != t3.hp.stop_speech_token]


def draw_with_our_noise(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Make torch.multinomial draw by our counter-based noise, so that upstream samples the tokens of our seed."""
    num_drawn = 0

    def multinomial(probabilities: Tensor, num_samples: int) -> Tensor:
        nonlocal num_drawn
        assert num_samples == 1
        low, high = (torch.tensor([[part]]) for part in noise.split_seed(seed))
        ids = torch.arange(probabilities.shape[-1])[None]
        scores = probabilities.log() + noise.gumbel(low, high, torch.tensor([[num_drawn]]), ids)
        num_drawn += 1
        return scores.argmax(-1, keepdim=True)

    patch.setattr(torch, "multinomial", multinomial)
