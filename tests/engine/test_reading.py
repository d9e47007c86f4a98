"""Recordings in every accepted format come out as audio, and everything else as a code."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.audio.reading import check_reference, decode
from engine.errors import SpeechError
from tests.engine.synthetic_voices import sung_vowel

RATES_HZ = (8_000, 16_000, 22_050, 24_000, 44_100, 48_000, 96_000)
LOSSLESS = [
    (container, subtype)
    for container, subtypes in {
        "WAV": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"),
        "WAVEX": ("PCM_16", "PCM_24", "FLOAT"),
        "FLAC": ("PCM_16", "PCM_24"),
    }.items()
    for subtype in subtypes
]
LOSSY = [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
WHOLE = 1.0


def _file(container: str, subtype: str, rate_hz: int, channels: int = 1, duration_s: float = WHOLE) -> bytes:
    voice = sung_vowel(140.0, duration_s, rate_hz)
    target = io.BytesIO()
    samples = voice if channels == 1 else np.stack([voice] * channels, axis=1)
    soundfile.write(target, samples, rate_hz, subtype, format=container)
    return target.getvalue()


def _decode(data: bytes, max_duration_s: float = 60.0) -> tuple[np.ndarray, int]:
    return decode(data, max_duration_s=max_duration_s, field="reference_audio")


def _code(data: bytes, max_duration_s: float = 60.0) -> str:
    with pytest.raises(SpeechError) as caught:
        _decode(data, max_duration_s)
    assert caught.value.field == "reference_audio"
    assert "Traceback" not in caught.value.message
    return caught.value.code


def _outcome(data: bytes, max_duration_s: float) -> str | float:
    """The code of the error, or how many seconds of sound audio came out."""
    try:
        audio, rate_hz = _decode(data, max_duration_s)
    except SpeechError as error:
        return error.code
    assert np.isfinite(audio).all() and np.abs(audio).max() <= 1.0
    return audio.size / rate_hz


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate_hz", RATES_HZ)
@pytest.mark.parametrize(("container", "subtype"), LOSSLESS)
def test_lossless_recordings_come_out_sample_for_sample(
    container: str, subtype: str, rate_hz: int, channels: int
) -> None:
    audio, read_hz = _decode(_file(container, subtype, rate_hz, channels))
    original = sung_vowel(140.0, WHOLE, rate_hz)
    step = {"PCM_U8": 1 / 128, "PCM_16": 1 / 32768}.get(subtype, 1e-6)
    assert read_hz == rate_hz and audio.dtype == np.float32
    assert np.abs(audio - original).max() <= step * 1.01


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("container", "subtype"), LOSSY)
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 24_000, 48_000])
def test_lossy_recordings_come_out_with_their_length_and_level(
    container: str, subtype: str, rate_hz: int, channels: int
) -> None:
    audio, read_hz = _decode(_file(container, subtype, rate_hz, channels))
    original = sung_vowel(140.0, WHOLE, rate_hz)
    assert read_hz == rate_hz and audio.ndim == 1
    assert audio.size / read_hz == pytest.approx(WHOLE, abs=0.15)
    assert np.sqrt(np.mean(audio**2)) == pytest.approx(np.sqrt(np.mean(original**2)), rel=0.2)


def test_stereo_is_the_average_of_its_channels() -> None:
    left, right = sung_vowel(100.0), sung_vowel(200.0)
    target = io.BytesIO()
    soundfile.write(target, np.stack([left, right], axis=1), 24_000, "FLOAT", format="WAV")
    audio, _ = _decode(target.getvalue())
    assert np.allclose(audio, (left + right) / 2, atol=1e-6)


def test_float_audio_beyond_full_scale_is_scaled_not_clipped() -> None:
    target = io.BytesIO()
    soundfile.write(target, sung_vowel(140.0) * 4, 24_000, "FLOAT", format="WAV")
    audio, _ = _decode(target.getvalue())
    assert np.abs(audio).max() == pytest.approx(1.0)
    assert np.corrcoef(audio, sung_vowel(140.0))[0, 1] > 0.9999


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audio_that_is_not_a_number_is_unreadable(value: float) -> None:
    voice = sung_vowel(140.0)
    voice[100] = value
    target = io.BytesIO()
    soundfile.write(target, voice, 24_000, "FLOAT", format="WAV")
    assert _code(target.getvalue()) == "reference_unreadable"


@pytest.mark.parametrize(
    "data",
    [b"", b"R", b"RIFF", PNG, b"hello, this is text " * 50, b"\0" * 5000, b"\xff" * 5000, b"ID3" + bytes(500), b"OggS"],
    ids=["empty", "one byte", "riff", "png", "text", "zeros", "ones", "id3", "oggs"],
)
def test_what_is_not_audio_is_unreadable(data: bytes) -> None:
    assert _code(data) == "reference_unreadable"


@pytest.mark.parametrize("container", ["AIFF", "AU", "CAF", "W64"])
def test_containers_that_were_not_promised_are_refused(container: str) -> None:
    assert _code(_file(container, "PCM_16", 24_000)) == "reference_unreadable"


@pytest.mark.parametrize("rate_hz", [4_000, 384_000])
def test_rates_beyond_the_bounds_are_refused(rate_hz: int) -> None:
    assert _code(_file("WAV", "PCM_16", rate_hz, duration_s=0.2)) == "reference_unreadable"


@pytest.mark.parametrize(("container", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), *LOSSY])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.02, 0.3, 0.6, 0.99])
def test_a_cut_off_file_gives_what_is_there_or_is_unreadable(container: str, subtype: str, kept: float) -> None:
    data = _file(container, subtype, 24_000)
    outcome = _outcome(data[: int(len(data) * kept)], 60.0)
    assert outcome == "reference_unreadable" or 0 < float(outcome) <= WHOLE + 0.15


@pytest.mark.parametrize(("container", "subtype"), [("WAV", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")])
def test_most_of_a_half_file_is_read(container: str, subtype: str) -> None:
    data = _file(container, subtype, 24_000, duration_s=10.0)
    audio, _ = _decode(data[: len(data) // 2])
    assert audio.size / 24_000 > 2.5


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=30),
)
def test_a_damaged_file_gives_bounded_audio_or_a_code(kind: tuple[str, str], damage: list[tuple[float, int]]) -> None:
    data = bytearray(_file(*kind, 16_000, duration_s=0.5))
    for where, value in damage:
        data[int(where * (len(data) - 1))] = value
    outcome = _outcome(bytes(data), 5.0)
    assert outcome in ("reference_unreadable", "reference_too_long") or float(outcome) <= 5.0


@pytest.mark.parametrize(("container", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY])
def test_a_recording_over_the_limit_is_too_long(container: str, subtype: str) -> None:
    assert _code(_file(container, subtype, 16_000, duration_s=12.0), max_duration_s=10.0) == "reference_too_long"


@pytest.mark.parametrize(
    ("container", "subtype", "minutes"),
    [("FLAC", "PCM_16", 120), ("MP3", "MPEG_LAYER_III", 10), ("OGG", "VORBIS", 10), ("OGG", "OPUS", 2)],
)
def test_hours_in_a_small_file_are_refused_within_little_memory(container: str, subtype: str, minutes: int) -> None:
    target = io.BytesIO()
    with soundfile.SoundFile(target, "w", 8_000, 1, subtype, format=container) as file:
        for _ in range(minutes):
            file.write(np.zeros(8_000 * 60, np.float32))
    data = target.getvalue()
    tracemalloc.start()
    code = _code(data, max_duration_s=5.0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == "reference_too_long"
    assert peak_bytes < 2e6  # 5 s are 0.16 MB, a block in hand is 0.26 MB; two hours would be 230 MB


def test_minutes_at_a_high_rate_take_no_more_memory_than_at_48_khz_and_the_way_out_is_told() -> None:
    target = io.BytesIO()
    soundfile.write(target, np.zeros(192_000 * 20, np.float32), 192_000, "PCM_16", format="FLAC")
    tracemalloc.start()
    with pytest.raises(SpeechError, match="at most 15 s of audio at 192000 Hz; resampled to 48000 Hz") as caught:
        _decode(target.getvalue(), max_duration_s=60.0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.code == "reference_too_long"
    assert peak_bytes < 60 * 48_000 * 4 + 2e6


@pytest.mark.parametrize("max_duration_s", [10.0, 60.0, 600.0])
def test_a_reference_of_ordinary_length_is_read_at_any_rate(max_duration_s: float) -> None:
    audio, rate_hz = _decode(_file("FLAC", "PCM_24", 192_000, duration_s=10.0), max_duration_s)
    assert (rate_hz, audio.size) == (192_000, 1_920_000)


def test_a_flac_header_that_claims_too_little_does_not_let_the_rest_in() -> None:
    data = bytearray(_file("FLAC", "PCM_16", 16_000, duration_s=12.0))
    total_samples = slice(21, 26)  # the low 36 bits of bytes 21 to 25 of STREAMINFO
    packed = int.from_bytes(data[total_samples], "big")
    data[total_samples] = ((packed >> 36 << 36) | 16_000).to_bytes(5, "big")
    outcome = _outcome(bytes(data), 5.0)
    assert outcome in ("reference_unreadable", "reference_too_long") or float(outcome) <= 5.0


@pytest.mark.parametrize(
    ("at", "claim"),
    [
        (22, struct.pack("<H", 65_535)),  # channels
        (22, struct.pack("<H", 1_024)),
        (22, struct.pack("<H", 0)),
        (24, struct.pack("<I", 0xFFFFFFFF)),  # Hz
        (24, struct.pack("<I", 0)),
        (32, struct.pack("<H", 65_535)),  # bytes of a frame
        (34, struct.pack("<H", 65_535)),  # bits of a sample
        (20, struct.pack("<H", 0x11)),  # coding: ADPCM, and what is no wav at all
        (20, struct.pack("<H", 0x55)),
        (40, struct.pack("<I", 0xFFFFFFF0)),  # bytes of samples
    ],
)
def test_a_header_that_claims_the_impossible_takes_no_memory(at: int, claim: bytes) -> None:
    data = bytearray(_file("WAV", "PCM_16", 24_000))
    data[at : at + len(claim)] = claim
    tracemalloc.start()
    outcome = _outcome(bytes(data), 600.0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcome == "reference_unreadable" or 0 < float(outcome) <= WHOLE
    assert peak_bytes < 2e6


def test_a_wav_of_unknown_length_as_a_pipe_writes_it_is_read() -> None:
    data = bytearray(_file("WAV", "PCM_16", 24_000))
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    audio, _ = _decode(bytes(data))
    assert audio.size == WHOLE * 24_000


def test_a_flac_of_unknown_length_as_a_pipe_writes_it_is_read_to_its_end() -> None:
    data = bytearray(_file("FLAC", "PCM_16", 24_000, duration_s=6.0))
    data[21] &= 0xF0  # the low 36 bits of bytes 21 to 25 of STREAMINFO: 0 samples in all means unknown
    data[22:26] = bytes(4)
    audio, _ = _decode(bytes(data))
    assert audio.size == 6 * 24_000


@pytest.mark.parametrize(
    ("start", "name"), [(b"\0\0\0\x20ftypM4A ", "m4a"), (b"\x1aE\xdf\xa3", "WebM"), (b"\xff\xf1\x50\x80", "AAC")]
)
def test_what_phones_and_browsers_record_is_refused_by_name(start: bytes, name: str) -> None:
    with pytest.raises(SpeechError, match=f"expected a wav, flac, mp3 or ogg file, got .*{name}"):
        _decode(start + bytes(2_000))


def test_channels_whose_sum_overflows_are_refused_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    target = io.BytesIO()
    soundfile.write(target, np.full((24_000, 2), 3e38, np.float32), 24_000, "FLOAT", format="WAV")
    assert _code(target.getvalue()) == "reference_unreadable"
    assert not list(recwarn)


def test_looking_for_silence_takes_little_memory() -> None:
    audio = np.zeros(24_000 * 300, np.float32)  # 29 MB
    tracemalloc.start()
    with pytest.raises(SpeechError, match="silent"):
        check_reference(audio, 24_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 0.5 * audio.nbytes


def test_a_recording_of_a_voice_passes_the_check() -> None:
    check_reference(sung_vowel(140.0), 24_000)


@pytest.mark.parametrize("duration_s", [0.0, 0.3, 0.99])
def test_too_little_audio_is_too_short(duration_s: float) -> None:
    with pytest.raises(SpeechError) as caught:
        check_reference(np.ones(int(duration_s * 24_000), np.float32), 24_000, field="reference_audio")
    assert (caught.value.code, caught.value.field) == ("reference_too_short", "reference_audio")


def test_a_model_that_needs_more_gets_more() -> None:
    with pytest.raises(SpeechError, match="5 s"):
        check_reference(sung_vowel(140.0), 24_000, min_s=5.0)


def _silences() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal(72_000).astype(np.float32)
    click = np.zeros(72_000, np.float32)
    click[30_000] = 1.0
    return {
        "digital": np.zeros(72_000, np.float32),
        "dither": noise * np.float32(1e-5),
        "below -60 dBFS": noise * np.float32(7e-4),
        "offset": np.full(72_000, 0.3, np.float32),
        "click": click,
    }


@pytest.mark.parametrize("kind", _silences())
def test_a_recording_without_a_voice_is_silent(kind: str) -> None:
    with pytest.raises(SpeechError) as caught:
        check_reference(_silences()[kind], 24_000)
    assert caught.value.code == "reference_silent"


def test_a_quiet_voice_and_one_with_long_pauses_are_not_silent() -> None:
    check_reference(sung_vowel(140.0) * np.float32(0.01), 24_000)
    check_reference(np.concatenate([np.zeros(24_000 * 20, np.float32), sung_vowel(140.0)]), 24_000)
