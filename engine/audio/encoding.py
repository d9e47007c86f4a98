"""Waveforms as files and as streams of bytes, written block by block in the formats that clients ask for."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from engine.errors import SpeechError
from engine.types import FloatArray

_WRITE_FRAMES = 1 << 16

_UNKNOWN_SIZE = 0xFFFFFFFF

_OGG_PAGE_LATENCY_MS = 0x1302  # libsndfile's SFC_SET_OGG_PAGE_LATENCY_MS, which soundfile has no name for
_STREAMED_PAGE_MS = 100.0

_MP3_KBITS = MappingProxyType({32_000: (320, 32, 96), 16_000: (160, 8, 64), 0: (64, 8, 40)})
"""Bit rates of mp3 streams by the lowest sample rate of an MPEG version: its highest, its lowest, and ours."""
_MP3_HEADER_BYTES = 4
_MP3_SIDE_INFO_BYTES = 9  # of a mono frame at the lower rates, its fewest: no frame with sound has none set


@dataclass(frozen=True)
class AudioFormat:
    """A file format that speech can be delivered in.

    Args:
        name: what a request calls it.
        mime_type: for HTTP and data URIs.
        suffix: of file names, with the dot.
        container, subtype: as libsndfile names them.
        sample_rates: Hz that the format can hold; None for any.
    """

    name: str
    mime_type: str
    suffix: str
    container: str
    subtype: str
    sample_rates: tuple[int, ...] | None = None


_MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)

FORMATS: Mapping[str, AudioFormat] = {
    audio_format.name: audio_format
    for audio_format in (
        AudioFormat("wav", "audio/wav", ".wav", "WAV", "PCM_16"),
        AudioFormat("flac", "audio/flac", ".flac", "FLAC", "PCM_16"),
        AudioFormat("mp3", "audio/mpeg", ".mp3", "MP3", "MPEG_LAYER_III", _MP3_RATES),
        AudioFormat("opus", "audio/ogg", ".opus", "OGG", "OPUS", _OPUS_RATES),
    )
}
"""Of files, by name."""

STREAM_FORMATS: Mapping[str, AudioFormat] = {
    **FORMATS,
    "pcm": AudioFormat("pcm", "audio/pcm", ".pcm", "RAW", "PCM_16"),
}
"""Of streams, by name: `pcm` is 16-bit little-endian samples and nothing else."""


def check_format(name: str, sample_rate: int, formats: Mapping[str, AudioFormat] = FORMATS) -> AudioFormat:
    """Look a format up and check that it can hold the sample rate.

    Args:
        name: what a request asked for.
        sample_rate: Hz.
        formats: `FORMATS` or `STREAM_FORMATS`.

    Raises:
        SpeechError: invalid_request for an unknown format (field output_format) or for a rate that it
            cannot hold (field sample_rate).
    """
    if name not in formats:
        raise _invalid("output_format", f"one of {', '.join(formats)}", name)
    rates = formats[name].sample_rates
    if rates is not None and sample_rate not in rates:
        raise _invalid("sample_rate", f"for {name} one of {', '.join(map(str, rates))} Hz", sample_rate)
    return formats[name]


def encode(waveform: FloatArray, sample_rate: int, format: str = "wav", *, title: str | None = None) -> bytes:
    """A whole audio file, see `FileEncoder`.

    Args:
        waveform: float32 (T,) mono.
        sample_rate: Hz; opus takes 8, 12, 16, 24 or 48 kHz, mp3 its nine MPEG rates.
        format: a name of `FORMATS`.
        title: for the file's tags.

    Raises:
        SpeechError: invalid_request, see `check_format`.
    """
    target = io.BytesIO()
    encoder = FileEncoder(target, sample_rate, format, title=title)
    encoder.push(waveform)
    encoder.finish()
    return target.getvalue()


class FileEncoder:
    """Writes an audio file block by block, its headers exact, so that a player knows its duration.

    wav and flac hold 16-bit samples, rounded without dither: the rounding lies 98 dB below full scale,
    far under the noise of any voice. What exceeds full scale is clipped. mp3 and opus are written at
    libsndfile's default quality (mp3 about 64 kbit/s, opus about 48 kbit/s for mono at 24 kHz).

    All four formats carry the title in any language: wav in its INFO chunk (as UTF-8, which the format
    leaves open), flac and opus in their comments, mp3 in an ID3v2.3 tag.

    Args:
        target: a binary file that can seek; written from its present position on, and left open.
        sample_rate: Hz.
        format: a name of `FORMATS`.
        title: for the file's tags, None for none.

    Raises:
        SpeechError: invalid_request, see `check_format`.
    """

    def __init__(self, target: BinaryIO, sample_rate: int, format: str, *, title: str | None = None) -> None:
        audio_format = check_format(format, sample_rate)
        title = _one_line(title or "")
        if title and format == "mp3":
            target.write(_id3_tag(title))  # libsndfile's own would hold 30 bytes, said to be Latin-1
        self._section = _Section(target)
        self._subtype = audio_format.subtype
        self._file = _open(self._section, sample_rate, audio_format)
        if title and format != "mp3":
            self._file.title = title

    def push(self, block: FloatArray) -> None:
        """Write the next float32 (n,) mono.

        Raises:
            OSError: the target's own.
        """
        assert not self._file.closed and block.ndim == 1, (self._file.closed, block.shape)
        with self._section.errors():
            _write(self._file, block, self._subtype)

    def finish(self) -> None:
        """Write what is still held, and the headers. Nothing may be pushed after it.

        Raises:
            OSError: the target's own.
        """
        assert not self._file.closed
        with self._section.errors():
            self._file.close()


class StreamEncoder:
    """Encodes a stream block by block to bytes that can be played as they come.

    The bytes that all calls give are, one after the other, a valid file of unknown length: a wav
    header has the sizes 0xFFFFFFFF, a flac header no number of samples (libsndfile does not read one to
    its end, other decoders do), an mp3 no Info frame: a decoder cannot cut off the encoder's delay, 46 ms
    at 24 kHz, and tells the duration from the bit rate, which is constant (64 kbit/s from 16 to 24 kHz,
    less below, more above). The others sound as `FileEncoder` writes them. What is held back between
    pushes: nothing in pcm and wav, a block of 4096 samples in flac, two or three frames in mp3 (0.06 s at
    24 kHz), a page of up to 0.12 s in opus, of which libsndfile alone would make a second.

    Args:
        sample_rate: Hz.
        format: a name of `STREAM_FORMATS`.

    Raises:
        SpeechError: invalid_request, see `check_format`.
    """

    def __init__(self, sample_rate: int, format: str) -> None:
        audio_format = check_format(format, sample_rate, STREAM_FORMATS)
        self._subtype = audio_format.subtype
        self._outlet = _Outlet()
        self._finished = False
        self._file: soundfile.SoundFile | None = None
        if format == "wav":
            self._outlet.write(_wav_header(sample_rate))
        elif format != "pcm":
            self._file = _open(self._outlet, sample_rate, audio_format, constant_rate=format == "mp3")
        self._start: bytes | None = b"" if format == "mp3" else None  # until it is known what it begins with
        if format == "opus":
            _set_page_latency(self._file, _STREAMED_PAGE_MS)

    def push(self, block: FloatArray) -> bytes:
        """Take the next float32 (n,) mono; give the bytes that are ready, often none."""
        assert not self._finished and block.ndim == 1, (self._finished, block.shape)
        if self._file is None:
            self._outlet.write(_to_16_bits(block).tobytes())
        else:
            _write(self._file, block, self._subtype)
        return self._take()

    def finish(self) -> bytes:
        """The bytes of what was still held. Nothing may be pushed after it."""
        assert not self._finished
        self._finished = True
        if self._file is not None:
            self._file.close()
        return self._take()

    def _take(self) -> bytes:
        if self._start is None:
            return self._outlet.take()
        self._start += self._outlet.take()
        rest = _without_empty_frame(self._start)
        if rest or self._finished:
            self._start = None
        return rest


class _Section:
    """The part of a file from its present position on, as a file of its own for libsndfile.

    Errors of the file cannot pass through libsndfile: the first is kept, and nothing is written after it.
    """

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self._origin = target.tell()
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self._error is not None or self._target.closed:  # closed: someone gave up, and the encoder went later
            return 0
        try:
            return self._target.write(data)
        except OSError as error:
            self._error = error
            return 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._error is not None or self._target.closed:
            return 0
        start = self._origin if whence == io.SEEK_SET else 0
        try:
            return self._target.seek(start + offset, whence) - self._origin
        except OSError as error:  # a file with a buffer writes it before it moves
            self._error = error
            return 0

    def tell(self) -> int:
        return 0 if self._target.closed else self._target.tell() - self._origin

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise the file's error, if it had one, in place of libsndfile's."""
        try:
            yield
        except (soundfile.LibsndfileError, AssertionError):  # the latter is how soundfile says that less was written
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error


class _Outlet:
    """A file for libsndfile whose bytes are taken away as they come.

    libsndfile goes back at the end to correct headers. What it then writes over bytes that were already
    taken is dropped.
    """

    def __init__(self) -> None:
        self._num_taken = 0
        self._ready = bytearray()
        self._position = 0

    def write(self, data: bytes) -> int:
        start = self._position - self._num_taken  # in what is ready; before it where negative
        assert start <= len(self._ready), (start, len(self._ready))
        self._position += len(data)
        kept = data[max(-start, 0) :]
        self._ready[max(start, 0) : max(start, 0) + len(kept)] = kept
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_taken + len(self._ready)}
        self._position = origins[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def take(self) -> bytes:
        taken = bytes(self._ready)
        self._num_taken += len(taken)
        self._ready.clear()
        return taken


def _open(
    file: _Section | _Outlet, sample_rate: int, audio_format: AudioFormat, *, constant_rate: bool = False
) -> soundfile.SoundFile:
    container, subtype = audio_format.container, audio_format.subtype
    if not constant_rate:
        return soundfile.SoundFile(file, "w", sample_rate, 1, subtype, format=container)
    level, mode = _mp3_compression(sample_rate), "CONSTANT"
    return soundfile.SoundFile(
        file, "w", sample_rate, 1, subtype, format=container, compression_level=level, bitrate_mode=mode
    )


def _mp3_compression(sample_rate: int) -> float:
    """The level by which libsndfile means a bit rate: from 0 for an MPEG version's highest to 1 for its lowest."""
    least_hz = max(hz for hz in _MP3_KBITS if hz <= sample_rate)
    highest, lowest, wanted = _MP3_KBITS[least_hz]
    return (highest - wanted) / (highest - lowest)


def _write(file: soundfile.SoundFile, waveform: FloatArray, subtype: str) -> None:
    """In pieces: libsndfile's Ogg writers put all that one call gives them on the stack."""
    for block in _blocks(waveform):
        file.write(_to_16_bits(block) if subtype == "PCM_16" else block)


def _blocks(waveform: FloatArray) -> Iterable[FloatArray]:
    return (waveform[start : start + _WRITE_FRAMES] for start in range(0, waveform.size, _WRITE_FRAMES))


def _to_16_bits(block: FloatArray) -> NDArray[np.int16]:
    """Rounded to the nearest; libsndfile's own conversion rounds down in some of its versions."""
    return np.clip(np.rint(block * np.float32(32768)), -32768, 32767).astype("<i2")


def _wav_header(sample_rate: int) -> bytes:
    """Of 16-bit mono samples to which there is no end."""
    shape = struct.pack("<IHHIIHH", 16, 1, 1, sample_rate, sample_rate * 2, 2, 16)
    sizes = struct.pack("<I", _UNKNOWN_SIZE)
    return b"RIFF" + sizes + b"WAVEfmt " + shape + b"data" + sizes


def _without_empty_frame(start: bytes) -> bytes:
    """An mp3's bytes without the frame at their start that is kept free for the Info frame, as far as they are known.

    It is a header and zeros: left as it is, a decoder takes it for silence.
    """
    header, zeros = start[:_MP3_HEADER_BYTES], start[_MP3_HEADER_BYTES:]
    return start if any(zeros[:_MP3_SIDE_INFO_BYTES]) else zeros.lstrip(b"\0") if header else b""


def _one_line(title: str) -> str:
    """A title that any tag can hold: no line ends, no control characters, no halves of surrogate pairs."""
    whole = title.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(char if char.isprintable() else " " for char in whole).split())


def _id3_tag(title: str) -> bytes:
    """ID3v2.3 with nothing but a title, in UTF-16 with its byte order mark: the encoding all readers know."""
    text = b"\x01" + title.encode("utf-16")
    frame = b"TIT2" + struct.pack(">IH", len(text), 0) + text
    size = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + frame


def _set_page_latency(file: soundfile.SoundFile, latency_ms: float) -> None:
    """How much audio an Ogg page may wait for; libsndfile's default is a second."""
    value = soundfile._ffi.new("double *", latency_ms)
    soundfile._snd.sf_command(file._file, _OGG_PAGE_LATENCY_MS, value, soundfile._ffi.sizeof("double"))


def _invalid(field: str, expected: str, value: object) -> SpeechError:
    return SpeechError("invalid_request", f"{field}: expected {expected}, got {value!r}", field)
