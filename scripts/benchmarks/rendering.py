"""Rows flow and vocoder: S3Gen's two halves by themselves, 100 tokens (4 s of audio) after a 10 s prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import device as devices
from engine import noise
from engine.conditioning import builtin_conditionals
from engine.device import DevicePlan
from engine.models import SPEECH_VOCAB_SIZE
from engine.s3gen.flow import FRAMES_PER_TOKEN, FlowRequest
from engine.s3gen.renderer import Renderer, flow_voice, load_renderer
from engine.s3gen.vocoder import SourceNoise
from scripts.benchmarks.figures import Figure, Runner, Stopwatch, Values, take_turns
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.targets import target
from scripts.benchmarks.upstream import load_modules, quiet
from scripts.benchmarks.weights import random_checkpoint

NUM_TOKENS = 100

Part = Callable[[], object]
"""One run of a half on fixed input."""


def measure_flow(options: Options, progress: Callable[[str], None]) -> list[Figure]:
    note = f"{NUM_TOKENS} tokens after the voice's prompt ({'10' if options.size == 'full' else '2'} s)"
    return _measure(options, progress, "flow", "Flow", note, _our_flow, _upstream_flow)


def measure_vocoder(options: Options, progress: Callable[[str], None]) -> list[Figure]:
    note = f"{NUM_TOKENS / 25:g} s of audio"
    return _measure(options, progress, "vocoder", "HiFT", note, _our_vocoder, _upstream_vocoder)


def _measure(
    options: Options,
    progress: Callable[[str], None],
    row: str,
    title: str,
    note: str,
    our_part: Callable[[Options, Path, DevicePlan], tuple[Part, str]],
    upstream_part: Callable[[Options, Any], Part],
) -> list[Figure]:
    folder = random_checkpoint(options)

    def load(contender: Contender) -> Runner:
        if contender.side == "upstream":
            part, dtype = upstream_part(options, load_modules(options, folder)), "float32"
        else:
            part, dtype = our_part(options, folder, options.plan(contender))
        return Runner(lambda: _time(part, options.place), dtype)

    outcome = take_turns(
        options.contenders(), load, options.repeats, has_baseline=options.against != "nothing", progress=progress
    )
    return [
        Figure(row, "seconds", title, "s", "less", ours, baseline, target=target(options, row), note=note)
        for ours, baseline in outcome.compare("seconds")
    ]


def _time(part: Part, device: torch.device) -> Values:
    with torch.inference_mode(), Stopwatch(device) as watch:
        part()
    return {"seconds": watch.seconds}


def _tokens(device: torch.device) -> torch.Tensor:
    return torch.randint(SPEECH_VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).to(device)


def _mel(device: torch.device) -> torch.Tensor:
    """(80, frames) of the loudness that speech has."""
    frames = FRAMES_PER_TOKEN * NUM_TOKENS
    return (torch.randn(80, frames, generator=torch.Generator().manual_seed(0)) * 2 - 5).to(device)


# ---------------------------------------------------------------------------------------- ours


def _load_renderer(options: Options, folder: Path, plan: DevicePlan) -> Renderer:
    """As the engine loads it."""
    return load_renderer(
        options.spec,
        folder / options.spec.s3gen_file,
        plan.torch_device,
        torch.bfloat16 if plan.flow_dtype == "bfloat16" else torch.float32,
        autocast=lambda: devices.autocast(plan),
        exact=devices.exact_float32,
        max_frames=60_000,
    )


def _our_flow(options: Options, folder: Path, plan: DevicePlan) -> tuple[Part, str]:
    renderer = _load_renderer(options, folder, plan)
    conditionals = builtin_conditionals(folder, options.spec, "benchmark")
    assert conditionals is not None, folder
    voice, tokens = flow_voice(conditionals, plan.torch_device), _tokens(plan.torch_device)
    num_frames = FRAMES_PER_TOKEN * (len(voice.tokens) + NUM_TOKENS)
    seeds = itertools.count(1)

    def run() -> object:
        start = noise.normal(next(seeds), noise.STREAM_FLOW, (80, num_frames), plan.torch_device)
        with devices.autocast(plan):
            return renderer.flow([FlowRequest(voice, tokens, start)])

    return run, plan.flow_dtype


def _our_vocoder(options: Options, folder: Path, plan: DevicePlan) -> tuple[Part, str]:
    vocoder, mel, seeds = _load_renderer(options, folder, plan).vocoder, _mel(plan.torch_device), itertools.count(1)

    def run() -> object:
        source = SourceNoise.from_seed(next(seeds), mel.shape[1], plan.torch_device)
        with devices.exact_float32():
            return vocoder(mel[None], source)

    return run, "float32"


# ---------------------------------------------------------------------------------------- upstream


def _upstream_flow(options: Options, models: Any) -> Part:
    tokens = _tokens(options.place)

    def run() -> object:
        with quiet():
            return models.s3gen.flow_inference(tokens, ref_dict=models.conds.gen, finalize=True)

    return run


def _upstream_vocoder(options: Options, models: Any) -> Part:
    mel = _mel(options.place)[None]
    return lambda: models.s3gen.hift_inference(mel)
