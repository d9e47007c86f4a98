"""From a waveform to what the client receives: loudness, rate, format, base64, and never too large.

A result over the platform's limit is lost without a word to anyone, so its serialised size is checked
here, and the client learns what to ask for instead.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.audio import mastering
from engine.types import FloatArray, Speech
from jobs.errors import JobError
from jobs.schema import AudioInput

_LOUDNESS_TOLERANCE_LU = 0.5
_WAV_SAMPLE_BYTES = 2


@dataclass(frozen=True)
class Encoded:
    """Audio as it goes into the result.

    Args:
        audio_base64: the file, base64.
        format: wav, flac, mp3 or opus.
        sample_rate: Hz.
        duration_s: seconds of audio.
        master_s, encode_s: what loudness and rate took, and what the format took, seconds.
        warnings: what could not be done as asked.
    """

    audio_base64: str
    format: str
    sample_rate: int
    duration_s: float
    master_s: float
    encode_s: float
    warnings: tuple[str, ...] = ()


def check_output(request: AudioInput, model_rate: int) -> None:
    """Refuse an output that cannot be made, before anything is spent on it.

    Args:
        request: the job.
        model_rate: Hz of the model's own waveforms, the default of `sample_rate`.

    Raises:
        SpeechError: invalid_request, for a sample rate that the format does not have.
    """
    mastering.check_format(request.output_format, request.sample_rate or model_rate)


def encode(speech: Speech, request: AudioInput) -> Encoded:
    """Master and encode an utterance as the job asked. Blocks: call it in a thread."""
    started_s = time.perf_counter()
    waveform, warnings = _normalized(speech, request)
    sample_rate = request.sample_rate or speech.sample_rate
    waveform = mastering.resample(waveform, speech.sample_rate, sample_rate)
    mastered_s = time.perf_counter()
    data = mastering.encode(waveform, sample_rate, request.output_format)
    audio = base64.b64encode(data).decode("ascii")
    return Encoded(
        audio_base64=audio,
        format=request.output_format,
        sample_rate=sample_rate,
        duration_s=speech.duration_s,
        master_s=mastered_s - started_s,
        encode_s=time.perf_counter() - mastered_s,
        warnings=warnings,
    )


def _normalized(speech: Speech, request: AudioInput) -> tuple[FloatArray, tuple[str, ...]]:
    implied = "none" if request.loudness_lufs is None else "loudness"
    mode = request.audio_normalization or implied
    if mode != "loudness":
        return mastering.normalize(speech.waveform, speech.sample_rate, mode), ()
    target = mastering.DEFAULT_LUFS if request.loudness_lufs is None else request.loudness_lufs
    waveform = mastering.normalize(speech.waveform, speech.sample_rate, mode, loudness_lufs=target)
    reached = mastering.measure_lufs(waveform, speech.sample_rate)
    if reached >= target - _LOUDNESS_TOLERANCE_LU:
        return waveform, ()
    return waveform, (f"loudness {target:g} LUFS would clip; the audio has {reached:.1f} LUFS",)


def check_result(result: Mapping[str, Any], max_bytes: int) -> None:
    """Make sure that the platform will take this result.

    Raises:
        JobError: result_too_large, naming the way out.
    """
    num_bytes = len(json.dumps({"output": result}, ensure_ascii=False, allow_nan=False).encode("utf-8"))
    if max_bytes and num_bytes > max_bytes:
        raise _too_large(num_bytes, max_bytes, result.get("format"))


def check_length(duration_s: float, request: AudioInput, model_rate: int, max_bytes: int) -> None:
    """Refuse audio of known length whose file is surely too large, before it is made.

    Only a wav's size (16-bit samples, as base64) is certain; of the others `check_result` decides.

    Args:
        duration_s: the least that will come out, seconds.
        request: the job.
        model_rate: Hz of the model's own waveforms, the default of `sample_rate`.
        max_bytes: of a result, 0 for no limit.

    Raises:
        JobError: result_too_large, naming the way out.
    """
    if request.output_format != "wav":
        return
    num_bytes = int(duration_s * (request.sample_rate or model_rate)) * _WAV_SAMPLE_BYTES * 4 // 3
    if max_bytes and num_bytes > max_bytes:
        raise _too_large(num_bytes, max_bytes, request.output_format)


def _too_large(num_bytes: int, max_bytes: int, audio_format: str | None) -> JobError:
    shorten = "send less text, or a shorter recording"
    way_out = shorten if audio_format == "opus" else f"ask for output_format opus or mp3, or {shorten}"
    message = f"the result is {num_bytes / 1e6:.1f} MB and at most {max_bytes / 1e6:.1f} MB can be returned; {way_out}"
    return JobError("result_too_large", message, "output_format")
