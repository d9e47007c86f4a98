"""Is this machine fit to speak? Asked once, when the model is loaded and before the first job is taken.

What another machine would do better (a GPU that is not seen, memory that is gone, weights that were cut off on their
way, a device that gives NaN) makes a worker unfit: it leaves, and the platform starts another. What is wrong with the
deployment itself (a model that does not exist, a bucket that is refused) would be wrong everywhere: then the worker
stays and tells each job (`jobs.worker.BrokenWorker`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.manifest import verify_manifest
from engine.types import SpeechRequest
from jobs.context import SpeechEngine
from jobs.settings import Settings
from jobs.voices import Voices

MIN_FREE_BYTES = 512 << 20
"""What the first jobs need beside what is loaded, on the device and on the host: less is told now, not by a job."""

PROBE_TEXT = "One."
_PROBE_TOKENS = 50
_PROBE_PATIENCE_S = 120.0
_GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"))

Check = Callable[[], None]


class UnfitError(Exception):
    """This machine cannot do the work; the message says what is wrong with it."""


def checks(
    engine: SpeechEngine, voices: Voices | None, settings: Settings, environment: Mapping[str, str] = os.environ
) -> Sequence[Check]:
    """What to check, the cheapest first.

    Args:
        engine: loaded.
        voices: the voice library, where there is one.
        settings: the deployment's.
        environment: the process's.

    Returns:
        Functions that raise `UnfitError`, or what the engine and the library raise; their names say what they check.
    """

    def device() -> None:
        check_device(engine.stats(), settings.device, has_gpu(environment))

    def free_memory() -> None:
        check_memory(engine.free_bytes())

    def weights() -> None:
        if folder := engine.stats().get("model_dir"):
            verify_manifest(Path(folder), hashes=settings.verify_weights)

    def voice_library() -> None:
        if voices is not None:
            voices.stats()

    def utterance() -> None:
        check_utterance(engine)

    return (device, free_memory, weights, voice_library, utterance)


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether the machine has an NVIDIA GPU for us, whatever torch can make of it."""
    counted = environment.get("RUNPOD_GPU_COUNT", "")
    return any(path.exists() for path in _GPU_FILES) or (counted.isdecimal() and int(counted) > 0)


def check_device(stats: Mapping[str, Any], wanted: str, has_gpu: bool) -> None:
    """DEVICE=auto on a machine with a GPU that torch cannot use speaks on the CPU, at the price of the GPU."""
    if wanted == "auto" and has_gpu and stats.get("device", "").startswith("cpu"):
        reasons = "; ".join(stats.get("reasons", ()))
        raise UnfitError(
            f"there is a GPU that cannot be used ({reasons}); set DEVICE=cpu to speak on the CPU all the same"
        )


def check_memory(free_bytes: Mapping[str, int]) -> None:
    """Args: free_bytes: by place, such as {"cuda:0": …, "host": …}."""
    for place, num_bytes in free_bytes.items():
        if num_bytes < MIN_FREE_BYTES:
            raise UnfitError(
                f"{num_bytes / 2**20:.0f} MiB are free on {place}, expected {MIN_FREE_BYTES >> 20} MiB or more"
            )


def check_utterance(engine: SpeechEngine) -> None:
    """A word is spoken, and is something like sound. What it warms up, the first job need not."""
    language = "en" if "en" in engine.languages else engine.languages[0]
    request = SpeechRequest(text=PROBE_TEXT, language=language, seed=1, max_new_tokens=_PROBE_TOKENS)
    speech = engine.submit(request).result(timeout=_PROBE_PATIENCE_S)
    if not (speech.waveform.size and np.isfinite(speech.waveform).all() and np.any(speech.waveform)):
        raise UnfitError("the probe utterance is empty, silent, or holds numbers that are not finite")
