"""scripts/wav.py: samples out of wavs that come in pieces, and sizes into wavs that were begun without them."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine.audio.encoding import FORMATS, StreamEncoder, encode
from engine.types import FloatArray
from scripts.wav import WavError, WavReader, finish_sizes, streamed_header

SAMPLES = np.arange(-500, 500, dtype="<i2")
SOUND: FloatArray = (np.sin(np.arange(24_000) / 20) / 2).astype(np.float32)
UNKNOWN = 0xFFFFFFFF
ODD_CHUNK = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
"""Of an odd size, so with a byte of padding."""


def wav(
    data: bytes = SAMPLES.tobytes(),
    *,
    riff: int | None = None,
    size: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
    rate_hz: int = 24_000,
    num_channels: int = 1,
) -> bytes:
    """A wav file, its sizes right where none are given."""
    shape = struct.pack("<HHIIHH", 1, num_channels, rate_hz, rate_hz * 2 * num_channels, 2 * num_channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + shape + before + b"data"
    body += struct.pack("<I", len(data) if size is None else size) + data + after
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def streamed(audio_format: str = "wav") -> bytes:
    encoder = StreamEncoder(24_000, audio_format)
    return encoder.push(SOUND) + encoder.finish()


def finished(data: bytes) -> bytes:
    file = io.BytesIO(data)
    finish_sizes(file)
    return file.getvalue()


def read(data: bytes, piece_bytes: int) -> tuple[bytes, WavReader]:
    reader = WavReader()
    pieces = [reader.push(data[start : start + piece_bytes]) for start in range(0, len(data), piece_bytes)]
    return b"".join(pieces), reader


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("is_new", [True, False])
def test_a_streamed_wav_gets_its_true_sizes_in_its_file(is_new: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(streamed())
    with path.open("w+b") if is_new else path.open("r+b") as file:
        if is_new:
            file.write(streamed())
        finish_sizes(file)
    with wave.open(str(path)) as opened:
        assert opened.getnframes() == SOUND.size
    assert path.read_bytes() == encode(SOUND, 24_000)


@pytest.mark.parametrize("before", [b"", ODD_CHUNK, ODD_CHUNK * 3, b"junk" + struct.pack("<I", 0)])
def test_sizes_are_told_wherever_the_samples_lie(before: bytes) -> None:
    assert finished(wav(riff=UNKNOWN, size=UNKNOWN, before=before)) == wav(before=before)


def test_no_part_of_a_sample_is_counted_or_kept() -> None:
    assert finished(wav(SAMPLES.tobytes() + b"x", riff=UNKNOWN, size=UNKNOWN)) == wav()
    cut = SAMPLES.tobytes() + b"xyz"
    assert finished(wav(cut, riff=UNKNOWN, size=UNKNOWN, num_channels=2)) == wav(num_channels=2)


def test_the_header_of_a_wav_without_samples_says_none() -> None:
    assert finished(streamed_header(24_000, 1)) == wav(b"")


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_file_of_any_kind_is_left_as_it_is(name: str) -> None:
    data = encode(SOUND, 24_000, name, title="A title")
    assert finished(data) == data


@pytest.mark.parametrize(
    "data",
    [
        *(streamed(name) for name in ("flac", "mp3", "opus", "pcm")),
        wav(after=ODD_CHUNK),
        wav(size=SAMPLES.nbytes * 2),  # cut off, and no stream
        b"",
        b"RIFF",
        streamed_header(24_000, 1)[:-1],
        b"RIFF" + b"\xff" * 4 + b"AVI " + b"data" + b"\xff" * 40,
        b"A text in which data\xff\xff\xff\xff is said, and this at the place where a wav has it too.",
        b"RIFF\xff\xff\xff\xffWAVEdata\xff\xff\xff\xff" + b"x" * 100,  # of samples of which nothing is known
    ],
)
def test_what_is_no_streamed_wav_is_left_as_it_is(data: bytes) -> None:
    assert finished(data) == data


def test_a_wav_that_is_too_large_for_its_sizes_keeps_them_unknown(tmp_path: Path) -> None:
    header = streamed_header(24_000, 1)
    with (tmp_path / "large.wav").open("w+b") as file:
        file.write(header)
        file.truncate(8 + UNKNOWN + 1)  # takes no room on the disk
        finish_sizes(file)
        file.seek(0)
        assert file.read(44) == header and file.seek(0, 2) == 8 + UNKNOWN + 1


def test_a_header_of_our_own_is_that_of_the_engine() -> None:
    assert streamed()[:44] == streamed_header(24_000, 1)
    stereo = finished(streamed_header(8_000, 2) + SAMPLES.tobytes())
    audio, rate_hz = soundfile.read(io.BytesIO(stereo), dtype="int16")
    assert rate_hz == 8_000 and np.array_equal(audio, SAMPLES.reshape(-1, 2))


# ------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("piece_bytes", [1, 3, 45, 10_000])
@pytest.mark.parametrize(
    "data",
    [
        wav(),
        wav(riff=UNKNOWN, size=UNKNOWN),
        wav(before=ODD_CHUNK, after=ODD_CHUNK),
        wav(after=b"\0" + ODD_CHUNK),
        wav(size=UNKNOWN - 1),  # a size of which less came
        wav(SAMPLES.tobytes() + b"x", size=UNKNOWN),
    ],
    ids=["known", "unknown", "chunks", "padding", "cut", "half"],
)
def test_samples_and_nothing_else_are_given_out_however_the_wav_comes(data: bytes, piece_bytes: int) -> None:
    samples, reader = read(data, piece_bytes)
    assert samples == SAMPLES.tobytes()
    assert (reader.sample_rate, reader.num_channels) == (24_000, 1)


def test_each_piece_given_out_is_of_whole_frames() -> None:
    data, reader = wav(num_channels=2), WavReader()
    assert {len(reader.push(data[at : at + 1])) for at in range(len(data))} == {0, 4}


@pytest.mark.parametrize("name", ["flac", "mp3", "opus"])
def test_what_is_no_wav_is_refused(name: str) -> None:
    with pytest.raises(WavError, match="no wav"):
        read(encode(SOUND, 24_000, name), 7)


def test_a_wav_of_other_samples_or_of_none_is_refused() -> None:
    file = io.BytesIO()
    soundfile.write(file, SOUND, 24_000, "FLOAT", format="WAV")
    with pytest.raises(WavError, match="16-bit"):
        read(file.getvalue(), 100)
    with pytest.raises(WavError, match="what kind"):
        read(b"RIFF\xff\xff\xff\xffWAVEdata\xff\xff\xff\xff" + b"x" * 100, 100)
    with pytest.raises(WavError, match="without samples"):
        read(b"RIFF\xff\xff\xff\xffWAVE" + ODD_CHUNK * 100_000, 1 << 16)
