"""Row t3: text to speech tokens, one chunk and several at once.

Timed is what a chunk costs once its voice is known: our text prefill and steps, looked at as often as the
engine does; upstream's whole `inference`, which runs the voice through the model for every chunk because it
has no way to keep it. What the steps alone cost is a second figure, from the difference between a run for
all tokens and a run for one. Upstream decodes one chunk at a time, so its rate does not grow with the rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.conditioning import builtin_conditionals
from engine.core import STEPS_PER_LOOK
from engine.device import DevicePlan
from engine.intake import UNLIMITED_TOP_K
from engine.models import START_TEXT_TOKEN, STOP_SPEECH_TOKEN, STOP_TEXT_TOKEN, ModelSpec
from engine.t3.decoder import Decoder, DecodeRequest, VoicePrefix
from engine.t3.model import T3, load_t3
from engine.t3.sampling import SamplingSettings
from engine.types import IntArray
from scripts.benchmarks.figures import BenchmarkError, Figure, Runner, Stopwatch, Values, take_turns
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.targets import target
from scripts.benchmarks.upstream import load_modules, quiet
from scripts.benchmarks.weights import random_checkpoint

NUM_TOKENS = 100
NUM_TEXT_TOKENS = 60
MOST_TRIES = 20
"""Random weights say stop about once in 6561 tokens; such a run is not counted, the next seed is taken."""

Once = Callable[[int, int], tuple[float, bool]]
"""(seed, tokens) → seconds, and whether every chunk got all its tokens."""


def measure_t3(options: Options, progress: Callable[[str], None]) -> list[Figure]:
    folder = random_checkpoint(options)
    contenders = options.contenders((1, 64) if options.is_on_gpu else (1, 8))
    load_weights = functools.cache(functools.partial(_load_weights, options, folder))  # shared by numbers of rows

    def load(contender: Contender) -> Runner:
        if contender.side == "upstream":
            return _load_upstream(options, folder)
        return _load_ours(options, folder, contender, *load_weights(contender.dtype, contender.num_threads))

    outcome = take_turns(
        contenders, load, options.repeats, has_baseline=options.against != "nothing", progress=progress
    )
    figures = []
    for ours, baseline in outcome.compare("tokens_per_s"):
        rows = ours.contender.rows
        title = f"T3, {rows} at once" if rows != 1 else "T3, one at a time"
        note = f"{options.chunk_tokens(NUM_TOKENS)} tokens after {NUM_TEXT_TOKENS} of text"
        goal = target(options, "t3", rows)
        figures.append(Figure("t3", "tokens_per_s", title, "tokens/s", "more", ours, baseline, target=goal, note=note))
    for ours, baseline in outcome.compare("steps_tokens_per_s"):
        title = f"T3, {ours.contender.rows} at once, steps alone"
        figures.append(Figure("t3", "steps_tokens_per_s", title, "tokens/s", "more", ours, baseline))
    for ours, baseline in outcome.compare("step_ms"):
        title = f"T3, {ours.contender.rows} at once, one step"
        figures.append(Figure("t3", "step_ms", title, "ms", "less", ours, baseline if _is_one_row(ours) else None))
    return figures


def _is_one_row(series: Any) -> bool:
    """A step of many rows is not to be compared with a step of one."""
    return bool(series.contender.rows == 1)


def _measure_once(once: Once, seeds: Iterator[int], num_tokens: int, rows: int) -> Values:
    all_s = _complete(once, seeds, num_tokens)
    one_s = _complete(once, seeds, 1)
    step_s = max(all_s - one_s, 1e-9) / max(1, num_tokens - 1)
    return {"tokens_per_s": rows * num_tokens / all_s, "steps_tokens_per_s": rows / step_s, "step_ms": 1000 * step_s}


def _complete(once: Once, seeds: Iterator[int], num_tokens: int) -> float:
    """Seconds of the first run in which no chunk stopped early."""
    for seed in itertools.islice(seeds, MOST_TRIES):
        seconds, is_complete = once(seed, num_tokens)
        if is_complete:
            return seconds
    raise BenchmarkError(f"in {MOST_TRIES} runs a chunk stopped before {num_tokens} tokens")


def _text(spec: ModelSpec, seed: int) -> IntArray:
    """Random text tokens, those of llama models between their start and stop."""
    most = min(spec.text_vocab_size, 50_000)
    text = np.random.default_rng(seed).integers(START_TEXT_TOKEN + 1, most, NUM_TEXT_TOKENS)
    if spec.uses_cfg:
        text = np.concatenate(([START_TEXT_TOKEN], text, [STOP_TEXT_TOKEN]))
    return text.astype(np.int32)


# ---------------------------------------------------------------------------------------- ours


def _load_weights(options: Options, folder: Path, dtype: str, num_threads: int) -> tuple[T3, DevicePlan]:
    plan = options.plan(Contender("ours", dtype, num_threads))
    return load_t3(folder / options.spec.t3_file, plan.torch_device, plan.torch_dtype), plan


def _load_ours(options: Options, folder: Path, contender: Contender, t3: T3, plan: DevicePlan) -> Runner:
    spec, num_tokens, num_chunks = options.spec, options.chunk_tokens(NUM_TOKENS), contender.rows or 1
    num_voice_positions = 2 + (spec.max_prompt_tokens if spec.backbone == "gpt2" else 32)
    decoder = Decoder(
        t3,
        num_rows=num_chunks * (2 if spec.uses_cfg else 1),
        length=num_voice_positions + NUM_TEXT_TOKENS + 4 + num_tokens,
        max_new_tokens=num_tokens,
        cache_dtype=plan.cache_dtype,
    )
    prefix = _builtin_prefix(options, folder, decoder)
    seeds = itertools.count(1)

    def once(seed: int, count: int) -> tuple[float, bool]:
        requests = [
            DecodeRequest(prefix, _text(spec, seed + index), default_sampling(spec), seed + index, count)
            for index in range(num_chunks)
        ]
        return _decode(decoder, requests, options.place)

    return Runner(lambda: _measure_once(once, seeds, num_tokens, num_chunks), plan.dtype)


def _decode(decoder: Decoder, requests: list[DecodeRequest], device: torch.device) -> tuple[float, bool]:
    num_tokens = requests[0].max_new_tokens
    with Stopwatch(device) as watch:
        handles = [decoder.admit(request) for request in requests]
        for start in range(0, num_tokens, STEPS_PER_LOOK):
            decoder.step(min(STEPS_PER_LOOK, num_tokens - start))
            rows = decoder.read()
    for handle in handles:
        assert handle is not None, "fewer rows than chunks"
        decoder.release(handle)
    return watch.seconds, all(len(row.tokens) == num_tokens for row in rows.values())


def _builtin_prefix(options: Options, folder: Path, decoder: Decoder) -> VoicePrefix:
    voice = builtin_conditionals(folder, options.spec, "benchmark")
    assert voice is not None, folder
    return voice_prefix(decoder, voice, options)


def voice_prefix(decoder: Decoder, voice: Any, options: Options) -> VoicePrefix:
    """A voice's keys and values."""
    speaker = torch.tensor(voice.speaker_embedding, device=options.place)
    tokens = torch.tensor(voice.t3_prompt_tokens, dtype=torch.int64, device=options.place)
    return decoder.compute_prefix(speaker, tokens, options.spec.sampling.exaggeration)


def default_sampling(spec: ModelSpec) -> SamplingSettings:
    """A model's own sampling, which is upstream's."""
    values = spec.sampling
    return SamplingSettings(
        temperature=values.temperature,
        top_p=values.top_p,
        repetition_penalty=values.repetition_penalty,
        top_k=values.top_k or UNLIMITED_TOP_K,
        min_p=values.min_p or 0.0,
        cfg_weight=values.cfg_weight or 0.0,
    )


# ---------------------------------------------------------------------------------------- upstream


def _load_upstream(options: Options, folder: Path) -> Runner:
    models = load_modules(options, folder)
    seeds = itertools.count(1)

    def once(seed: int, count: int) -> tuple[float, bool]:
        torch.manual_seed(seed)
        text = torch.from_numpy(_text(options.spec, seed).astype(np.int64)).to(options.place)[None]
        with quiet(), Stopwatch(options.place) as watch:
            tokens = upstream_tokens(models, options.spec, text, count)
        return watch.seconds, len(tokens) == count and STOP_SPEECH_TOKEN not in tokens

    num_tokens = options.chunk_tokens(NUM_TOKENS)
    return Runner(lambda: _measure_once(once, seeds, num_tokens, 1), "float32")


def upstream_tokens(models: Any, spec: ModelSpec, text: torch.Tensor, count: int) -> list[int]:
    """Upstream's own decoding loop with its own defaults: at most `count` tokens of int64 (1, N) text."""
    names = ("temperature", "top_p", "repetition_penalty", *(("min_p", "cfg_weight") if spec.uses_cfg else ("top_k",)))
    settings = {name: getattr(spec.sampling, name) for name in names}
    if spec.uses_cfg:
        rows = text.expand(2, -1)  # with and without guidance
        tokens = models.t3.inference(t3_cond=models.conds.t3, text_tokens=rows, max_new_tokens=count, **settings)
    else:
        # It gives one token before its loop counts.
        tokens = models.t3.inference_turbo(models.conds.t3, text, max_gen_len=count - 1, **settings)
    return [int(token) for token in tokens[0]]
