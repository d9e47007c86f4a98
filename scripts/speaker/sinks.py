"""Where audio goes while it is spoken: speakers, a file, standard output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from scripts.batch import files

_WAV_FORMAT, _WAV_DATA = b"fmt ", b"data"
_STREAMED_HEADER_BYTES, _UNKNOWN_SIZE = 44, b"\xff\xff\xff\xff"  # as `engine.audio.encoding` streams it


class SinkError(Exception):
    """Audio that can go nowhere; the message says what would help."""


class Sink(Protocol):
    """Takes a file's bytes, and later perhaps another file's. Blocks."""

    def write(self, data: bytes) -> None:
        """The next bytes."""

    def end_file(self) -> None:
        """What comes now is another file."""


class WavReader:
    """The samples of a wav that comes in pieces, whatever it says of its own size.

    Attributes:
        sample_rate, num_channels: known once the first samples are given out.
    """

    def __init__(self) -> None:
        self.sample_rate = self.num_channels = 0
        self._header = bytearray()
        self._is_inside = False

    def push(self, data: bytes) -> bytes:
        """Take the file's next bytes; gives those of them that are samples, 16 bits each.

        Raises:
            SinkError: it is no wav of 16-bit samples.
        """
        if self._is_inside:
            return data
        self._header += data
        start = self._find_samples()
        if start is None:
            return b""
        self._is_inside = True
        return bytes(self._header[start:])

    def _find_samples(self) -> int | None:
        header, place = self._header, 12
        if len(header) >= 12 and (bytes(header[:4]), bytes(header[8:12])) != (b"RIFF", b"WAVE"):
            raise SinkError("the audio is no wav")
        while len(header) >= place + 8:
            name, size = bytes(header[place : place + 4]), int.from_bytes(header[place + 4 : place + 8], "little")
            if name == _WAV_DATA:
                return place + 8
            if name == _WAV_FORMAT and len(header) >= place + 24:
                self._take_format(header[place + 8 : place + 24])
            place += 8 + size + size % 2
        return None

    def _take_format(self, chunk: bytearray) -> None:
        kind, self.num_channels = (int.from_bytes(chunk[i : i + 2], "little") for i in (0, 2))
        self.sample_rate = int.from_bytes(chunk[4:8], "little")
        if (kind, int.from_bytes(chunk[14:16], "little")) != (1, 16):
            raise SinkError("the audio is no wav of 16-bit samples")


class Speakers:
    """This machine's, through sounddevice. Takes wav files."""

    def __init__(self) -> None:
        try:
            import sounddevice  # type: ignore[import-not-found, unused-ignore]  # an extra of a person's own machine
        except (ImportError, OSError) as error:  # OSError: its PortAudio is missing
            raise SinkError("playing needs `pip install sounddevice`; --output FILE writes a file instead") from error
        self._library: Any = sounddevice
        self._stream: Any = None
        self._reader = WavReader()

    def write(self, data: bytes) -> None:
        samples = self._reader.push(data)
        if not samples:
            return
        try:
            if self._stream is None:
                rate, channels = self._reader.sample_rate, self._reader.num_channels
                self._stream = self._library.RawOutputStream(samplerate=rate, channels=channels, dtype="int16")
                self._stream.start()
            self._stream.write(samples)
        except self._library.PortAudioError as error:
            raise SinkError(f"the speakers cannot be used: {error}; --output FILE writes a file instead") from error

    def end_file(self) -> None:
        self._reader = WavReader()

    def close(self) -> None:
        """Play to the end."""
        if self._stream is not None:
            self._stream.stop()
            self._stream.close()


class StandardOutput:
    """Standard output, each piece at once: for a player, or an encoder."""

    def __init__(self) -> None:
        if sys.stdout.isatty():
            raise SinkError("standard output is a terminal; pipe it on, or name a file with --output")
        self._out = sys.stdout.buffer

    def write(self, data: bytes) -> None:
        self._out.write(data)
        self._out.flush()

    def end_file(self) -> None:
        """Files of the kinds that may follow each other do."""


class OneWav:
    """Wav files as one: the header of the first, the samples of all. Before another sink.

    Args:
        sink: takes the one.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._reader: WavReader | None = None

    def write(self, data: bytes) -> None:
        self._sink.write(data if self._reader is None else self._reader.push(data))

    def end_file(self) -> None:
        self._reader = WavReader()


class _File:
    """Args: file: open for writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._header = b""

    def write(self, data: bytes) -> None:
        self._header += data[: _STREAMED_HEADER_BYTES - len(self._header)]
        self._file.write(data)

    def end_file(self) -> None:
        """As of standard output."""

    def finish(self) -> None:
        """A wav that was streamed was begun before its length was known; tell it now."""
        if self._header[36:44] != _WAV_DATA + _UNKNOWN_SIZE:
            return
        num_bytes = self._file.seek(0, os.SEEK_END)
        for place in (4, 40):
            self._file.seek(place)
            self._file.write(min(num_bytes - place - 4, 2**32 - 1).to_bytes(4, "little"))


@contextlib.contextmanager
def file_sink(path: Path) -> Iterator[Sink]:
    """A file that takes its name when it is whole.

    Raises:
        OSError: it cannot be written.
    """
    with files.writing(path) as file:
        sink = _File(file)
        yield sink
        sink.finish()
    files.finish(path)
