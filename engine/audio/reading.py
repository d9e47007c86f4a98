"""Recordings of any origin, read with bounds: what comes out is mono float audio or a clear error.

The bytes are a client's. Their header may lie, their end may be missing, and a few of them may stand
for hours of audio: so samples are decoded in blocks and counted, and nothing is believed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
import soundfile

from engine.errors import SpeechError
from engine.types import FloatArray

MIN_REFERENCE_S = 1.0
"""Shortest recording a voice is taken from; some models need more."""

SILENCE_DBFS = -60.0
MIN_SOUND_S = 0.2
"""A recording is silent where less than this of it lies above `SILENCE_DBFS`: a click is not a voice."""

MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 192_000
MAX_CHANNELS = 8

_FULL_RATE_HZ = 48_000
_ALWAYS_ROOM_S = 60.0
"""Above 48 kHz a recording may have no more samples than the longest one at 48 kHz, but always those of 60 s
of that: seconds alone would let four times the memory in at 192 kHz."""

_CONTAINERS = frozenset({"WAV", "WAVEX", "RF64", "FLAC", "MP3", "OGG"})
_FOREIGN = (
    (b"....ftyp", "MP4 (m4a, AAC)"),
    (rb"\x1aE\xdf\xa3", "WebM or Matroska"),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "AAC"),
    (b"#!AMR", "AMR"),
    (rb"0&\xb2u\x8ef\xcf\x11", "WMA"),
)
"""What phones and browsers record in and libsndfile does not read, by its first bytes: to be told by name."""

_BLOCK_FRAMES = 1 << 16
_LEVEL_FRAME_S = 0.02
_LEVEL_FRAMES = 1 << 10


class _Forward(soundfile.SoundFile):
    """A file read once from its start to its end. Where soundfile may seek, it believes the header's
    length, and seeks after every block, which loses the last block of a FLAC that was streamed."""

    def seekable(self) -> bool:
        return False


def decode(data: bytes, *, max_duration_s: float, field: str) -> tuple[FloatArray, int]:
    """Decode a recording: wav (16, 24, 32 bit, float), flac, mp3, ogg with vorbis or opus.

    Channels are averaged. Float samples beyond full scale are brought back to it as a whole. Of a
    damaged file, what comes before the damage is read. Memory stays within about twice of what
    `max_duration_s` (or 60 s, if that is more) of mono audio at 48 kHz takes, whatever the header says.

    Args:
        data: the file.
        max_duration_s: the longest recording to read, seconds.
        field: the request field the recording came in, for errors.

    Returns:
        float32 (T,) in [-1, 1] and its sample rate in Hz, 8 to 192 kHz.

    Raises:
        SpeechError: reference_unreadable, reference_too_long.
    """
    try:
        file = _Forward(io.BytesIO(data))
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:  # raw audio without a header is a TypeError
        raise _unreadable(field, f"expected a wav, flac, mp3 or ogg file{_but_got(data)}") from error
    with file:
        _check_header(file, field)
        audio = _collect(_mono_blocks(file), file.samplerate, max_duration_s, field)
        return _checked_samples(audio, field), file.samplerate


def check_reference(
    audio: FloatArray, sample_rate: int, *, min_s: float = MIN_REFERENCE_S, field: str = "reference_audio"
) -> None:
    """Check that there is enough of a voice in a recording.

    Args:
        audio: float32 (T,).
        sample_rate: Hz.
        min_s: the shortest recording that will do, seconds.
        field: the request field, for errors.

    Raises:
        SpeechError: reference_too_short; reference_silent where, leaving out a constant offset, less
            than 0.2 s of its 20 ms frames have an RMS above -60 dBFS.
    """
    duration_s = audio.size / sample_rate
    if duration_s < min_s:
        raise SpeechError(
            "reference_too_short", f"{field}: at least {min_s:g} s of audio, got {duration_s:.2f} s", field
        )
    if _sounding_s(audio, sample_rate) < min(MIN_SOUND_S, duration_s):
        raise SpeechError("reference_silent", f"{field}: the recording is silent (below {SILENCE_DBFS:g} dBFS)", field)


def _check_header(file: soundfile.SoundFile, field: str) -> None:
    if file.format not in _CONTAINERS:
        raise _unreadable(field, f"expected a wav, flac, mp3 or ogg file, got {file.format}")
    if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ:
        raise _unreadable(
            field, f"expected a sample rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {file.samplerate}"
        )
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise _unreadable(field, f"expected at most {MAX_CHANNELS} channels, got {file.channels}")


def _mono_blocks(file: soundfile.SoundFile) -> Iterator[FloatArray]:
    """Blocks (N,) up to the end of the file or of what can be decoded of it."""
    while True:
        try:
            block = file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)  # (N, channels)
        except soundfile.LibsndfileError:
            return  # cut off or damaged from here on
        if not len(block):
            return
        with np.errstate(over="ignore"):  # channels of 1e38: infinite, and refused as that
            mono = block.mean(axis=1)
        yield mono


def _collect(blocks: Iterator[FloatArray], rate_hz: int, max_duration_s: float, field: str) -> FloatArray:
    max_frames = _max_frames(rate_hz, max_duration_s)
    kept: list[FloatArray] = []
    num_frames = 0
    for block in blocks:
        num_frames += len(block)
        if num_frames > max_frames:
            raise _too_long(field, max_frames / rate_hz, rate_hz)
        kept.append(block)
    if not kept:
        raise _unreadable(field, "the file holds no audio that can be decoded")
    return np.concatenate(kept)


def _max_frames(rate_hz: int, max_duration_s: float) -> int:
    return int(min(max_duration_s * rate_hz, max(max_duration_s, _ALWAYS_ROOM_S) * _FULL_RATE_HZ))


def _checked_samples(audio: FloatArray, field: str) -> FloatArray:
    peak = max(audio.max(), -audio.min())  # NaN in any sample is NaN here
    if not np.isfinite(peak):
        raise _unreadable(field, "the audio holds NaN or infinity")
    return audio / peak if peak > 1.0 else audio


def _sounding_s(audio: FloatArray, sample_rate: int) -> float:
    """Seconds of 20 ms frames above the silence level, a constant offset left out."""
    size = int(_LEVEL_FRAME_S * sample_rate)
    frames = audio[: audio.size // size * size].reshape(-1, size)
    offset = np.mean(audio, dtype=np.float64)
    num_sounding = 0
    for start in range(0, len(frames), _LEVEL_FRAMES):  # in double precision, but never all of it at once
        level = np.sqrt(np.mean((frames[start : start + _LEVEL_FRAMES] - offset) ** 2, axis=1))
        num_sounding += int(np.count_nonzero(level > 10 ** (SILENCE_DBFS / 20)))
    return float(num_sounding * size / sample_rate)


def _but_got(data: bytes) -> str:
    found = next((name for start, name in _FOREIGN if re.match(start, data, re.DOTALL)), None)
    return f", got {found}" if found else ""


def _unreadable(field: str, reason: str) -> SpeechError:
    return SpeechError("reference_unreadable", f"{field}: {reason}", field)


def _too_long(field: str, max_s: float, rate_hz: int) -> SpeechError:
    message = f"{field}: at most {max_s:g} s of audio"
    if rate_hz > _FULL_RATE_HZ:
        message += f" at {rate_hz} Hz; resampled to {_FULL_RATE_HZ} Hz it may be longer"
    return SpeechError("reference_too_long", message, field)
