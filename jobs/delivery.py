"""From a waveform to what the client receives: loudness, rate, format, base64 or an address, and never too large.

A result over the platform's limit is lost without a word to anyone, so its serialised size is checked
here, and the client learns what to ask for instead. Audio that a result cannot hold goes to a bucket where there
is one (`delivery: auto`); where there is none, what is surely too large is refused before it is made.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.audio import mastering
from engine.types import FloatArray, Speech
from jobs import bucket
from jobs.audio_file import AUDIO_FIELDS, AudioFile
from jobs.errors import JobError
from jobs.schema import AudioInput, SpeechInput

if TYPE_CHECKING:
    from jobs.context import JobContext

_LOUDNESS_TOLERANCE_LU = 0.5
_WAV_SAMPLE_BYTES = 2
_MAX_WAV_BYTES = 2**32 - 2**16  # its sizes have 32 bits, and it holds more than its samples
_URL_BYTES = 4_096  # more than a signed address takes


@dataclass(frozen=True)
class Encoded:
    """Audio as it is delivered.

    Args:
        audio: the file.
        format: wav, flac, mp3 or opus; of a stream pcm too.
        sample_rate: Hz.
        duration_s: seconds of audio.
        master_s, encode_s: what loudness and rate took, and what the format took, seconds.
        warnings: what could not be done as asked.
        first_audio_s: when there was something to hear, seconds of the job; None for all at once, at its end.
    """

    audio: AudioFile
    format: str
    sample_rate: int
    duration_s: float
    master_s: float
    encode_s: float
    warnings: tuple[str, ...] = ()
    first_audio_s: float | None = None


def check_output(request: AudioInput, model_rate: int, *, streams: bool = False) -> None:
    """Refuse an output that cannot be made, before anything is spent on it.

    Args:
        request: the job.
        model_rate: Hz of the model's own waveforms, the default of `sample_rate`.
        streams: whether the answer is a stream, which may be pcm.

    Raises:
        SpeechError: invalid_request, for a sample rate that the format does not have, and pcm as a file.
    """
    formats = mastering.STREAM_FORMATS if streams else mastering.FORMATS
    mastering.check_format(request.output_format, request.sample_rate or model_rate, formats)


def encode(speech: Speech, request: AudioInput) -> Encoded:
    """Master and encode an utterance as the job asked. Blocks: call it in a thread."""
    started_s = time.perf_counter()
    sample_rate = request.sample_rate or speech.sample_rate
    waveform = mastering.resample(speech.waveform, speech.sample_rate, sample_rate)
    waveform, warnings = _normalized(waveform, sample_rate, Level.of(request))  # last: a new rate has new peaks
    mastered_s = time.perf_counter()
    return Encoded(
        audio=AudioFile.of_bytes(_file(waveform, sample_rate, request)),
        format=request.output_format,
        sample_rate=sample_rate,
        duration_s=speech.duration_s,
        master_s=mastered_s - started_s,
        encode_s=time.perf_counter() - mastered_s,
        warnings=warnings,
    )


def _file(waveform: FloatArray, sample_rate: int, request: AudioInput) -> bytes:
    if request.output_format == "pcm":
        encoder = mastering.StreamEncoder(sample_rate, "pcm")
        return encoder.push(waveform) + encoder.finish()
    title = request.title if isinstance(request, SpeechInput) else None
    return mastering.encode(waveform, sample_rate, request.output_format, title=title)


@dataclass(frozen=True)
class Level:
    """The level that a job asks for.

    Args:
        mode: a name of `engine.audio.mastering.NORMALIZATIONS`.
        lufs: target of mode "loudness".
    """

    mode: str
    lufs: float

    @classmethod
    def of(cls, request: AudioInput) -> Level:
        implied = "none" if request.loudness_lufs is None else "loudness"
        lufs = mastering.DEFAULT_LUFS if request.loudness_lufs is None else request.loudness_lufs
        return cls(request.audio_normalization or implied, lufs)

    def warnings(self, reached_lufs: float | None) -> tuple[str, ...]:
        """What to say of the loudness that was reached; None where none was asked for."""
        if reached_lufs is None or reached_lufs >= self.lufs - _LOUDNESS_TOLERANCE_LU:
            return ()
        return (f"loudness {self.lufs:g} LUFS would clip; the audio has {reached_lufs:.1f} LUFS",)


def _normalized(waveform: FloatArray, sample_rate: int, level: Level) -> tuple[FloatArray, tuple[str, ...]]:
    waveform = mastering.normalize(waveform, sample_rate, level.mode, loudness_lufs=level.lufs)
    if level.mode != "loudness":
        return waveform, ()
    return waveform, level.warnings(mastering.measure_lufs(waveform, sample_rate))


def check_destination(request: AudioInput, context: JobContext) -> None:
    """Refuse a delivery that this worker does not have, before anything is done.

    Raises:
        JobError: invalid_request.
    """
    if request.delivery != "s3" or context.bucket is not None:
        return
    why = "has no bucket configured (BUCKET_NAME), nor brings the job one (s3Config)"
    if context.feed is not None:
        why = "gives its audio in pieces (STREAMING)"
    raise JobError("invalid_request", f"delivery s3: this worker {why}; use auto or inline", "delivery")


def max_inline_bytes(request: AudioInput, context: JobContext) -> int:
    """Most that a result with its audio may have, if that is certain to be in it; 0 where there is no such limit."""
    return context.max_result_bytes if context.bucket is None or request.delivery == "inline" else 0


async def hand_over(
    result: dict[str, Any],
    encoded: Encoded,
    request: AudioInput,
    context: JobContext,
    *,
    fields: tuple[str, ...] = ("audio",),
    room_bytes: int = 0,
    way_out: str | None = None,
) -> dict[str, Any]:
    """Put the audio into its result, or into a bucket and its address into the result.

    Args:
        result: all of it but the audio.
        encoded: the audio.
        request: the job, which may ask for the one or the other.
        context: its surroundings.
        fields: that hold the audio; those of an address are called so with `_url` behind.
        room_bytes: for what is added to the result later.
        way_out: what to tell the client to do about audio that is too large; None for what helps in general.

    Raises:
        JobError: result_too_large, storage_failed.
    """
    limit = context.max_result_bytes
    num_bytes = await asyncio.to_thread(_num_bytes, result) + len(fields) * encoded.audio.num_base64_chars
    fits = not limit or num_bytes + room_bytes <= limit
    if context.bucket is None or request.delivery == "inline" or (request.delivery == "auto" and fits):
        if limit and num_bytes > limit:
            raise _too_large(f"is {num_bytes / 1e6:.1f} MB", limit, encoded.format, way_out)
        return {**dict.fromkeys(fields, await asyncio.to_thread(encoded.audio.as_base64)), **result}

    await asyncio.to_thread(check_result, result, limit and max(limit - room_bytes - _URL_BYTES, 1))
    started_s = time.perf_counter()
    title = request.title if isinstance(request, SpeechInput) else None
    label = bucket.Label(context.job_id, title, encoded.format)
    name = await bucket.deliver(encoded.audio, label, context.bucket, time_left_s=context.time_left_s)
    context.delivered.name, context.delivered.fields = name, fields
    context.figures.num_s3_bytes += encoded.audio.num_bytes
    upload_s = time.perf_counter() - started_s
    timings = result["timings"]
    total_s = timings["total"] + upload_s  # and nobody hears anything before
    factor = total_s / max(encoded.duration_s, 1e-9)
    now = {"upload": upload_s, "total": total_s, "first_audio_s": total_s, "real_time_factor": factor}
    timings |= {name: round(seconds, 4) for name, seconds in now.items()}
    return {**await addressed(context), **result}


async def addressed(context: JobContext) -> dict[str, Any]:
    """The fields of a result that say where its audio is.

    Raises:
        JobError: storage_failed.
    """
    delivered = context.delivered
    assert context.bucket is not None and delivered.name is not None
    try:
        url = await context.bucket.url(delivered.name)
    except bucket.BucketError as error:
        message = f"the audio lies in {context.bucket.describe()}, but no address could be signed: {error.reason}"
        raise JobError("storage_failed", message) from None
    lifetime_s = context.settings.bucket_url_lifetime_s
    return {**{f"{field}_url": url for field in delivered.fields}, "audio_url_expires_s": lifetime_s}


def check_result(result: Mapping[str, Any], max_bytes: int) -> None:
    """Make sure that the platform will take this result.

    Raises:
        JobError: result_too_large, naming the way out.
    """
    num_bytes = _num_bytes(result)
    if max_bytes and num_bytes > max_bytes:
        # Without audio in it, another format would change nothing.
        audio_format = result.get("format") if _has_audio(result) else "opus"
        raise _too_large(f"is {num_bytes / 1e6:.1f} MB", max_bytes, audio_format)


def _num_bytes(result: Mapping[str, Any]) -> int:
    """As the SDK sends it."""
    audio = {name: value for name, value in result.items() if name in AUDIO_FIELDS}  # as long in JSON as it is
    rest = json.dumps({"output": {**result, **dict.fromkeys(audio, "")}}, ensure_ascii=False, allow_nan=False)
    return len(rest.encode("utf-8")) + sum(map(len, audio.values()))


def _has_audio(result: Mapping[str, Any]) -> bool:
    return any(result.get(name) for name in AUDIO_FIELDS)


def check_length(
    duration_s: float, request: AudioInput, model_rate: int, max_bytes: int, *, way_out: str | None = None
) -> None:
    """Refuse audio of known length whose file is surely too large, before it is made.

    Only a wav's size (16-bit samples, as base64) is certain; of the others `check_result` decides.

    Args:
        duration_s: the least that will come out, seconds.
        request: the job.
        model_rate: Hz of the model's own waveforms, the default of `sample_rate`.
        max_bytes: of a result, 0 for no limit.
        way_out: what to tell the client to do; None for what helps in general.

    Raises:
        JobError: result_too_large, naming the way out.
    """
    if request.output_format == "wav":
        num_bytes = int(duration_s * (request.sample_rate or model_rate)) * _WAV_SAMPLE_BYTES
        if num_bytes > _MAX_WAV_BYTES:
            message = "a wav file holds at most 4.3 GB; ask for another output_format"
            raise JobError("result_too_large", message, "output_format")
        check_file(num_bytes, "wav", max_bytes, way_out=way_out)


def check_file(num_bytes: int, audio_format: str, max_bytes: int, *, way_out: str | None = None) -> None:
    """Refuse an audio file that is surely too large once it is base64.

    Args:
        num_bytes: of the file, or of what there is of it so far.
        audio_format: wav, flac, mp3 or opus.
        max_bytes: of a result, 0 for no limit.
        way_out: what to tell the client to do; None for what helps in general.

    Raises:
        JobError: result_too_large, naming the way out.
    """
    num_in_result = num_bytes * 4 // 3
    if max_bytes and num_in_result > max_bytes:
        raise _too_large(f"would be over {num_in_result / 1e6:.1f} MB", max_bytes, audio_format, way_out)


def _too_large(found: str, max_bytes: int, audio_format: str | None, way_out: str | None = None) -> JobError:
    if way_out is None:
        shorten = "send less text, or a shorter recording"
        way_out = shorten if audio_format == "opus" else f"ask for output_format opus or mp3, or {shorten}"
    message = f"the result {found} and at most {max_bytes / 1e6:.1f} MB can be returned; {way_out}"
    return JobError("result_too_large", message, "output_format")
