"""Prompt audio at rest: 24-bit FLAC, known by a hash of what reads back.

Samples are rounded to 24 bits once, when a voice is added; from then on every read gives the same floats
on any machine, so the hash of them names the voice's audio wherever it is used.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import soundfile
from numpy.typing import NDArray

from voice_library.errors import LibraryError

FloatArray = NDArray[np.float32]

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_PROMPT_S = 600.0
"""Longest prompt kept. Models listen to 15 s at most; older libraries hold whole recordings."""
_FULL_SCALE = 1 << 23


@dataclass(frozen=True, eq=False)
class Prompt:
    """Audio ready to be stored.

    Args:
        flac: the file.
        audio_hash: of what reads back from it.
        num_samples: of it.
        sample_rate: Hz.
    """

    flac: bytes
    audio_hash: str
    num_samples: int
    sample_rate: int


def audio_hash(audio: FloatArray, sample_rate: int) -> str:
    """Hash of mono audio float32 (T,) and its rate in Hz: blake2b, 16 bytes, as hex.

    Over the rate as 4 bytes and the samples as IEEE floats, all little-endian.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(sample_rate.to_bytes(4, "little"))
    digest.update(audio.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def to_int24(samples: FloatArray) -> NDArray[np.int32]:
    """Nearest 24-bit integers, int32 (T,): what was once stored comes back exactly, however often it is stored again.

    libsndfile's own conversion rounds in another way from version to version.
    """
    scaled = np.rint(samples.astype(np.float64) * _FULL_SCALE)
    return np.clip(scaled, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int32)


def as_kept(samples: FloatArray) -> FloatArray:
    """What reads back of audio float32 (T,) that is stored: rounded to 24 bits, clipped. Floats hold that exactly."""
    return to_int24(samples).astype(np.float32) / np.float32(_FULL_SCALE)


def encode(audio: object, sample_rate: object) -> Prompt:
    """FLAC of mono audio float (T,) in [-1, 1]; samples beyond are clipped.

    Raises:
        LibraryError: reference_unreadable, reference_too_long, invalid_request (sample_rate).
    """
    rate = _checked_rate(sample_rate)
    samples = _checked_audio(audio)
    if samples.size > MAX_PROMPT_S * rate:
        raise LibraryError("reference_too_long", f"expected at most {MAX_PROMPT_S:g} s of audio", "audio")
    file = io.BytesIO()
    try:
        soundfile.write(file, to_int24(samples) << 8, rate, format="FLAC", subtype="PCM_24")
    except (soundfile.LibsndfileError, ValueError) as error:  # FLAC has no odd rates above 65,535 Hz
        raise LibraryError("invalid_request", f"FLAC cannot hold {rate} Hz: {error}", "sample_rate") from error
    flac = file.getvalue()
    kept = _decoded(flac, samples.size, rate)
    return Prompt(flac, audio_hash(kept, rate), samples.size, rate)


def decode(flac: bytes, *, num_samples: int, sample_rate: int, expected_hash: str) -> FloatArray:
    """The audio float32 (T,), read-only, that was stored.

    Never decodes more than `num_samples`, however much the file claims to hold or holds.

    Raises:
        ValueError: when the file is not what was stored.
    """
    try:
        audio = _decoded(flac, num_samples, sample_rate)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the FLAC file cannot be decoded: {error}") from error
    if audio_hash(audio, sample_rate) != expected_hash:
        raise ValueError("the audio is not what was stored (its hash differs)")
    audio.setflags(write=False)
    return audio


def _decoded(flac: bytes, num_samples: int, sample_rate: int) -> FloatArray:
    with soundfile.SoundFile(io.BytesIO(flac)) as file:
        found = (file.format, file.channels, file.samplerate, file.frames)
        expected = ("FLAC", 1, sample_rate, num_samples)
        if found != expected:
            raise ValueError(f"expected format, channels, rate and samples {expected}, found {found}")
        audio: FloatArray = file.read(num_samples, dtype="float32")
    if audio.size != num_samples:
        raise ValueError(f"expected {num_samples} samples, {audio.size} could be decoded")
    return audio


def _checked_rate(sample_rate: object) -> int:
    is_integer = isinstance(sample_rate, int | np.integer) and not isinstance(sample_rate, bool)
    if not is_integer or not MIN_RATE_HZ <= int(sample_rate) <= MAX_RATE_HZ:  # type: ignore[call-overload]
        raise LibraryError(
            "invalid_request",
            f"expected a sample rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {sample_rate!r}",
            "sample_rate",
        )
    return int(sample_rate)  # type: ignore[call-overload]


def _checked_audio(audio: object) -> FloatArray:
    samples = np.asarray(audio)
    if samples.ndim != 1 or samples.size == 0 or not np.issubdtype(samples.dtype, np.floating):
        raise LibraryError(
            "reference_unreadable",
            f"expected float mono audio of shape (T,), got {samples.dtype} {samples.shape}",
            "audio",
        )
    with np.errstate(over="ignore"):
        converted = samples.astype(np.float32)
    if not np.isfinite(converted).all():
        raise LibraryError("reference_unreadable", "the audio holds NaN or infinity", "audio")
    return converted
