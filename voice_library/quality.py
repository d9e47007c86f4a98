"""Is this recording fit to be a voice, and which part of it is kept?

A voice is added once and spoken with for months, so this is the moment to say that it clips, hisses or came
over a telephone. The hopeless is refused with a code, the rest is measured and warned of; `prepare_reference`
is the one call between a decoded recording and `VoiceLibrary.add`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from voice_library.errors import LibraryError
from voice_library.frames import FRAME_S, LOWEST_DBFS, SILENCE_DBFS, FloatArray, Frames, clipped_samples, split_frames
from voice_library.parts import WANTED_S, Part, choose_part
from voice_library.pitch import count_speakers
from voice_library.spectrum import bandwidth_hz

__all__ = ["Part", "PreparedReference", "ReferenceQuality", "assess", "choose_part", "measure", "prepare_reference"]

MIN_REFERENCE_S = 5.0
"""A voice must be longer than this, unless the caller says otherwise: Turbo and Nano take no shorter reference
(their upstream asserts it), and a library's voices should serve every model."""

MIN_VOICE_S = 1.0
"""Least voice, pauses left out: a speaker embedding is made of 1.6 s windows, and of less than this it is chance."""

MIN_SOUND_S = 0.2
"""With less sound than this a recording is silent: a click is not a voice."""

KEPT_RATE_HZ = 24_000
"""What is kept of higher rates: no model of the family hears more."""

MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 192_000
"""Below the lowest, what is left of a voice does not tell speakers apart; above the highest is no audio interface."""

HOPELESS_CLIPPED_SHARE = 0.10
"""With a tenth of the samples cut off, every period of the voice is: the timbre is the distortion's."""

CLIPPED_SHARE = 0.001
"""Where clipping begins to be heard as roughness."""

NOISY_SNR_DB = 20.0
"""Noise nearer to the voice than this is imitated along with it."""

QUIET_DBFS = -40.0
"""A voice below this has lost three or more of 16-bit audio's bits, and its noise is raised with it."""

NARROW_HZ = 7_000.0
"""S3Gen's mel reaches up to 8 kHz; telephone and low-rate files stop far before, and the speech sounds like them."""

SILENT_SHARE = 0.5
"""More silence than this, and there is little voice for the length."""

COMFORTABLE_S = 10.0
"""What the models make use of; shorter works and is less alike."""


@dataclass(frozen=True)
class ReferenceQuality:
    """What was measured of a recording.

    Args:
        duration_s: its length.
        voice_s: how much of it is louder than its pauses.
        level_dbfs: RMS of that, dB relative to full scale.
        clipped_share: share of samples that are cut off, 0 to 1.
        noise_floor_dbfs: level of the pauses; None when the level hardly changes, so that no pause shows it.
        snr_db: the voice over that; None likewise. An estimate from levels: music counts as voice.
        silence_share: share of the recording that is not voice, 0 to 1.
        bandwidth_hz: where the voice's spectrum ends, whatever the sample rate promises.
        speakers: 2 when the recording holds long stretches at pitches far apart; None when that cannot be
            told, which is no promise of one: two voices of like pitch are not told apart.
        warnings: what is not as it should be, in words.
    """

    duration_s: float
    voice_s: float
    level_dbfs: float
    clipped_share: float
    noise_floor_dbfs: float | None
    snr_db: float | None
    silence_share: float
    bandwidth_hz: float
    speakers: int | None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON, rounded to what the measurements are worth."""
        digits = {"clipped_share": 5, "silence_share": 3, "bandwidth_hz": 0}
        rounded = {
            name: round(value, digits.get(name, 2)) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return rounded | {"warnings": list(self.warnings)}


@dataclass(frozen=True, eq=False)
class PreparedReference:
    """A recording made ready to be kept.

    Args:
        audio: float32 (T,) in [-1, 1], the chosen part.
        sample_rate: Hz, 24,000 or what the recording had if that is less.
        quality: for `Voice.quality`: the part's figures and, under "part", where it lay in the recording.
        warnings: of the quality, for whoever added it.
    """

    audio: FloatArray
    sample_rate: int
    quality: dict[str, Any]
    warnings: tuple[str, ...]


def assess(audio: FloatArray, sample_rate: int, *, min_s: float = MIN_REFERENCE_S) -> ReferenceQuality:
    """Measure a recording, and refuse what cannot become a voice.

    Args:
        audio: float32 (T,) mono in [-1, 1].
        sample_rate: Hz.
        min_s: the recording must be longer than this, seconds.

    Raises:
        LibraryError: reference_unreadable (not finite mono audio, or clipped beyond use), reference_too_short,
            reference_silent.
    """
    audio = _checked(audio, sample_rate)
    _refuse_short(audio.size / sample_rate, min_s)
    quality = measure(audio, sample_rate)
    _refuse_hopeless(quality)
    return quality


def prepare_reference(
    audio: FloatArray,
    sample_rate: int,
    *,
    min_s: float = MIN_REFERENCE_S,
    wanted_s: tuple[float, float] = WANTED_S,
) -> PreparedReference:
    """Choose the part of a recording to keep, measure it, and bring it to the rate that voices are kept at.

    Args:
        audio: float32 (T,) mono in [-1, 1].
        sample_rate: Hz.
        min_s: what is kept must be longer than this, seconds; silence counts if there is no more voice.
        wanted_s: the shortest and longest part to pick of a longer recording, seconds.

    Raises:
        LibraryError: as `assess`. Clipping is judged by the part: a recording may hold a good one.
    """
    audio = _checked(audio, sample_rate)
    duration_s = audio.size / sample_rate
    _refuse_short(duration_s, min_s)
    part = choose_part(audio, sample_rate, wanted_s, min_s=min_s)
    quality = measure(part.audio, sample_rate)
    _refuse_hopeless(quality)
    kept, rate = _at_kept_rate(part.audio, sample_rate)
    _refuse_short(kept.size / rate, min_s)
    where = {"start_s": round(part.start_s, 3), "end_s": round(part.end_s, 3), "of_s": round(duration_s, 3)}
    return PreparedReference(kept, rate, quality.to_dict() | {"part": where}, quality.warnings)


def measure(audio: FloatArray, sample_rate: int) -> ReferenceQuality:
    """Measure a recording of at least 20 ms without refusing it; arguments as for `assess`."""
    frames = split_frames(audio, sample_rate)
    voiced = _frames_of_voice(audio, frames)
    quality = ReferenceQuality(
        duration_s=audio.size / sample_rate,
        voice_s=frames.voice_s,
        level_dbfs=frames.voice_dbfs,
        clipped_share=float(np.mean(clipped_samples(audio))),
        noise_floor_dbfs=frames.noise_dbfs,
        snr_db=_snr_db(frames),
        silence_share=1.0 - float(np.mean(frames.is_voice)),
        bandwidth_hz=bandwidth_hz(voiced, sample_rate),
        speakers=count_speakers(audio, sample_rate, frames),
    )
    return dataclasses.replace(quality, warnings=tuple(_warnings(quality)))


def _checked(audio: FloatArray, sample_rate: int) -> FloatArray:
    audio = np.asarray(audio)
    if not MIN_RATE_HZ <= sample_rate <= MAX_RATE_HZ:
        raise _unreadable(f"expected a sample rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {sample_rate}")
    if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating):
        raise _unreadable(f"expected float mono audio of shape (T,), got {audio.dtype} {audio.shape}")
    if audio.size < 2 * FRAME_S * sample_rate:
        raise LibraryError("reference_too_short", "the recording holds no audio to speak of", "reference_audio")
    with np.errstate(over="ignore"):
        audio = audio.astype(np.float32, copy=False)
    if not np.isfinite(audio).all():
        raise _unreadable("the audio holds NaN or infinity")
    return audio


def _unreadable(reason: str) -> LibraryError:
    return LibraryError("reference_unreadable", f"reference audio: {reason}", "reference_audio")


def _refuse_short(duration_s: float, min_s: float) -> None:
    if duration_s <= min_s:
        message = f"expected more than {min_s:g} s of reference audio, got {duration_s:.2f} s"
        raise LibraryError("reference_too_short", message, "reference_audio")


def _refuse_hopeless(quality: ReferenceQuality) -> None:
    """By what is worst: silence first, since nothing else is worth saying of it."""
    if quality.voice_s < MIN_SOUND_S:
        message = f"the reference audio is silent (below {SILENCE_DBFS:g} dBFS)"
        raise LibraryError("reference_silent", message, "reference_audio")
    if quality.voice_s < MIN_VOICE_S:
        message = f"expected at least {MIN_VOICE_S:g} s of voice, got {quality.voice_s:.2f} s and silence"
        raise LibraryError("reference_too_short", message, "reference_audio")
    if quality.clipped_share > HOPELESS_CLIPPED_SHARE:
        raise _unreadable(
            f"clipped beyond use, {quality.clipped_share:.0%} of its samples are cut off; record it again, lower"
        )


def _warnings(quality: ReferenceQuality) -> list[str]:
    found = {
        f"only {quality.duration_s:.1f} s long; {COMFORTABLE_S:g} s or more sound more alike": (
            quality.duration_s < COMFORTABLE_S
        ),
        f"clipped: {quality.clipped_share:.2%} of the samples are cut off": quality.clipped_share > CLIPPED_SHARE,
        f"quiet: the voice lies at {quality.level_dbfs:.0f} dBFS": quality.level_dbfs < QUIET_DBFS,
        f"narrow: nothing above {quality.bandwidth_hz / 1000:.1f} kHz, as over a telephone": (
            quality.bandwidth_hz < NARROW_HZ
        ),
        f"{quality.silence_share:.0%} of it is silence": quality.silence_share > SILENT_SHARE,
        "more than one speaker, by the pitch": quality.speakers is not None and quality.speakers > 1,
        "its level hardly changes: steady noise, music, or no pauses to tell": quality.snr_db is None,
        f"noisy: the voice is {quality.snr_db or 0:.0f} dB above the noise, expected {NOISY_SNR_DB:g} or more": (
            quality.snr_db is not None and quality.snr_db < NOISY_SNR_DB
        ),
    }
    return [warning for warning, holds in found.items() if holds]


def _snr_db(frames: Frames) -> float | None:
    """Of voice without the noise that is in it too."""
    if frames.noise_dbfs is None:
        return None
    noise = 10 ** (frames.noise_dbfs / 10)
    voice = max(10 ** (frames.voice_dbfs / 10) - noise, 10 ** (LOWEST_DBFS / 10))
    return float(10 * np.log10(voice / noise))


def _frames_of_voice(audio: FloatArray, frames: Frames) -> FloatArray:
    """(N, size) frames of voice, or all where there are none."""
    split = audio[: frames.is_voice.size * frames.size].reshape(-1, frames.size)
    return split[frames.is_voice] if frames.is_voice.any() else split


def _at_kept_rate(audio: FloatArray, sample_rate: int) -> tuple[FloatArray, int]:
    """Resampled as the engine would do it; peaks that the filter raised beyond full scale are brought back."""
    if sample_rate <= KEPT_RATE_HZ:
        return np.ascontiguousarray(audio), sample_rate
    import soxr

    resampled = soxr.resample(audio, sample_rate, KEPT_RATE_HZ, quality="HQ")
    peak = float(np.abs(resampled).max())
    return (resampled / np.float32(peak) if peak > 1.0 else resampled), KEPT_RATE_HZ
