"""Row voice: from an audio array to ready to decode, for a voice that is new and for one used before.

Ours goes through the engine's two caches: conditionals, keyed by the audio's content (hashing it is part of
the time), and the voice's keys and values. Upstream has none and takes a file: it computes all again for
every call, and then still runs the voice through T3 with every chunk, which is not counted here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.conditioning import Conditioner
from engine.t3.decoder import Decoder
from engine.t3.model import load_t3
from engine.types import FloatArray, VoicePrompt
from engine.voices import ConditionalsCache, PreparedVoices
from scripts.benchmarks.figures import Figure, Runner, Stopwatch, Values, take_turns
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.targets import target
from scripts.benchmarks.upstream import load_speaker, quiet
from scripts.benchmarks.weights import random_checkpoint

PROMPT_S = 10
RATE_HZ = 24_000
CACHE_BYTES = 1 << 30


def measure_voice(options: Options, progress: Callable[[str], None]) -> list[Figure]:
    folder, audio = random_checkpoint(options), make_prompt()

    def load(contender: Contender) -> Runner:
        if contender.side == "upstream":
            return _load_upstream(options, folder, audio)
        return _load_ours(options, folder, contender, audio)

    outcome = take_turns(
        options.contenders(), load, options.repeats, has_baseline=options.against != "nothing", progress=progress
    )
    note = f"{PROMPT_S} s of reference audio; upstream computes it for every call"
    return [
        Figure("voice", key, title, "s", "less", ours, baseline, target=target(options, f"voice-{key}"), note=note)
        for key, title in (("new", "A new voice, ready to decode"), ("used-before", "A voice used before"))
        for ours, baseline in outcome.compare(key)
    ]


def make_prompt() -> FloatArray:
    """(samples,) of a buzz with a wandering pitch and some breath: enough of a voice to be measured with."""
    source = np.random.default_rng(0)
    seconds = np.arange(PROMPT_S * RATE_HZ) / RATE_HZ
    pitch_hz = 120 + 20 * np.sin(2 * np.pi * 0.7 * seconds)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / RATE_HZ
    buzz = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 20))
    return (0.1 * buzz + 0.01 * source.standard_normal(len(seconds))).astype(np.float32)


def _load_ours(options: Options, folder: Path, contender: Contender, audio: FloatArray) -> Runner:
    spec, plan = options.spec, options.plan(contender)
    conditioner = Conditioner.load(spec, folder, "benchmark", plan.torch_device)
    t3 = load_t3(folder / spec.t3_file, plan.torch_device, plan.torch_dtype)
    decoder = Decoder(
        t3,
        num_rows=2,
        length=8,
        max_new_tokens=1,
        cache_dtype=plan.cache_dtype,
        use_graphs=False,
    )

    def run() -> Values:
        conditionals = ConditionalsCache(conditioner.embed, CACHE_BYTES)
        voices = PreparedVoices(decoder.compute_prefix, plan.torch_device, CACHE_BYTES)

        def prepare() -> float:
            with Stopwatch(options.place) as watch:
                voices.get(conditionals.get(VoicePrompt(audio, RATE_HZ)), spec.sampling.exaggeration)
            return watch.seconds

        return {"new": prepare(), "used-before": prepare()}

    return Runner(run, plan.dtype)


def _load_upstream(options: Options, folder: Path, audio: FloatArray) -> Runner:
    import soundfile

    speaker = load_speaker(options, folder)
    _keep_float32(speaker)
    keeper = tempfile.TemporaryDirectory(prefix="benchmark-voice-")
    path = Path(keeper.name) / "voice.wav"
    soundfile.write(path, audio, RATE_HZ, subtype="FLOAT")

    def run() -> Values:
        with quiet(), Stopwatch(options.place) as watch:
            speaker.prepare_conditionals(str(path))
        return {"new": watch.seconds, "used-before": watch.seconds}

    return Runner(run, "float32", close=keeper.cleanup)


def _keep_float32(speaker: Any) -> None:
    """Turbo's `norm_loudness` scales by a float64 number, which under numpy 2 makes the audio float64: its
    networks then refuse it. Cast back, as numpy 1 did, so that there is something to measure."""
    if hasattr(speaker, "norm_loudness"):
        norm_loudness = speaker.norm_loudness
        speaker.norm_loudness = lambda audio, rate: norm_loudness(audio, rate).astype(np.float32)
