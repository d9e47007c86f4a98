"""The figures to reach, each against upstream's own code with the same weights in the same run.

Those of the CPU were set for two cores, those of the GPU for the H200's class.
"""

from __future__ import annotations

from scripts.benchmarks.figures import Target
from scripts.benchmarks.options import Options

_CPU_T3 = {
    ("turbo", 1): Target(ratio_at_least=2.8),
    ("turbo", 8): Target(ratio_at_least=10),
    ("original", 1): Target(ratio_at_least=3.5),
    ("original", 8): Target(ratio_at_least=12),
}
_CPU = {
    "flow": Target(ratio_at_least=1.6),
    "vocoder": Target(ratio_at_least=1.15),
    "utterance": Target(ratio_at_least=2.3),
    "long-form": Target(ratio_at_least=5),
    "voice-used-before": Target(ratio_at_least=500),
    "cold-start": Target(ratio_at_least=3),
    "memory": Target(ratio_at_most=0.7),
    "first_audio_s": Target(ratio_at_least=3),
}
_PLAN = Target(value_at_most=2.0)
_GPU_TURBO = {
    ("t3", 1): Target(ratio_at_least=8, value_at_least=600),
    ("throughput", 64): Target(value_at_least=400),
    ("first_audio_s", 1): Target(value_at_most=0.15),
}
_GPU_REAL_TIME_FACTOR = Target(value_at_most=0.04)

_VOICES = {
    "open": Target(value_at_most=1.0),
    "list": Target(value_at_most=0.05),
    "memory": Target(ratio_at_least=100),
    "disk": Target(ratio_at_least=20),
    "cold": Target(ratio_at_least=1.5),
    "warm": Target(ratio_at_least=10),
    "audio-memory": Target(ratio_at_most=0.7),
}


def voices_target(options: Options, key: str) -> Target | None:
    """The target of a figure of the voice library, which has its own baselines; tiny ones have none."""
    return _VOICES[key] if options.size == "full" else None


def target(options: Options, key: str, rows: int | None = None) -> Target | None:
    """The target of a quantity, or None: tiny models have none, and neither have other comparisons."""
    if options.size != "full":
        return None
    if key == "plan":
        return _PLAN
    if options.is_on_gpu:
        return _gpu_target(options, key, rows)
    if options.against != "upstream":
        return None
    return _CPU_T3.get((options.model, rows or 1)) if key == "t3" else _CPU.get(key)


def _gpu_target(options: Options, key: str, rows: int | None) -> Target | None:
    if key == "real-time-factor":
        return _GPU_REAL_TIME_FACTOR
    return _GPU_TURBO.get((key, rows or 1)) if options.model == "turbo" else None
