"""Where audio goes while it is spoken: speakers, a file, standard output."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from scripts.batch import files
from scripts.console import complain
from scripts.wav import WavError, WavReader, finish_sizes, streamed_header


class SinkError(Exception):
    """Audio that can go nowhere; the message says what would help."""


class Sink(Protocol):
    """Takes a file's bytes, and later perhaps another file's. Blocks."""

    def write(self, data: bytes) -> None:
        """The next bytes."""

    def end_file(self) -> None:
        """What comes now is another file."""


async def write(sink: Sink, data: bytes) -> None:
    """Write in a thread. Whoever is cancelled waits for its end too: no sink may be closed while it is written to.

    Raises:
        SinkError, OSError: the sink's own.
    """
    writing = asyncio.ensure_future(asyncio.to_thread(sink.write, data))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        with contextlib.suppress(SinkError, OSError):
            await writing
        raise


class _Samples:
    """The samples of wav files that follow each other.

    Attributes:
        shape: sample rate in Hz and number of channels of all of them, None before the first samples.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self._reader = WavReader()

    def push(self, data: bytes) -> bytes:
        """Take the next bytes of a file; gives those of them that are samples.

        Raises:
            SinkError: it is no wav of 16-bit samples, or of another shape than the files before it.
        """
        try:
            samples = self._reader.push(data)
        except WavError as error:
            raise SinkError(str(error)) from error
        if self._reader.sample_rate:
            self._check((self._reader.sample_rate, self._reader.num_channels))
        return samples

    def end_file(self) -> None:
        self._reader = WavReader()

    def _check(self, shape: tuple[int, int]) -> None:
        self.shape = self.shape or shape
        if shape != self.shape:
            (before_hz, num_before), (rate_hz, num_channels) = self.shape, shape
            raise SinkError(
                f"the audio has {rate_hz} Hz and {num_channels} channels, what came before it {before_hz} Hz and "
                f"{num_before}; they cannot be one"
            )


class Speakers:
    """This machine's, through sounddevice. Takes wav files."""

    def __init__(self) -> None:
        try:
            import sounddevice  # type: ignore[import-not-found, unused-ignore]  # an extra of a person's own machine
        except (ImportError, OSError) as error:  # OSError: its PortAudio is missing
            raise SinkError("playing needs `pip install sounddevice`; --output FILE writes a file instead") from error
        self._library: Any = sounddevice
        self._stream: Any = None
        self._samples = _Samples()

    def write(self, data: bytes) -> None:
        samples = self._samples.push(data)
        if not samples or self._samples.shape is None:
            return
        try:
            if self._stream is None:
                rate, channels = self._samples.shape
                self._stream = self._library.RawOutputStream(samplerate=rate, channels=channels, dtype="int16")
                self._stream.start()
            self._stream.write(samples)
        except self._library.PortAudioError as error:
            raise SinkError(f"the speakers cannot be used: {error}; --output FILE writes a file instead") from error

    def end_file(self) -> None:
        self._samples.end_file()

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
    """Wav files as one: a header of its own, which knows no length, and the samples of all. Before another sink.

    Args:
        sink: takes the one.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._samples = _Samples()

    def write(self, data: bytes) -> None:
        """The next bytes.

        Raises:
            SinkError: the files cannot be one.
        """
        is_begun = self._samples.shape is not None
        samples = self._samples.push(data)
        if self._samples.shape is not None:
            self._sink.write(samples if is_begun else streamed_header(*self._samples.shape) + samples)

    def end_file(self) -> None:
        self._samples.end_file()
        self._sink.end_file()


class _File:
    """Several files one after the other in one.

    Args:
        file: open for reading and writing, and empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._num_bytes = self._num_whole_bytes = 0

    @property
    def has_whole(self) -> bool:
        """Whether a file that has ended is in it."""
        return self._num_whole_bytes > 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._num_bytes += len(data)

    def end_file(self) -> None:
        self._num_whole_bytes = self._num_bytes

    def cut(self) -> None:
        """Drop what came of a file that has not ended."""
        self._file.truncate(self._num_whole_bytes)

    def finish(self) -> None:
        """A wav that was streamed was begun before its length was known; tell it now."""
        finish_sizes(self._file)


@contextlib.contextmanager
def file_sink(path: Path, *, keeps_whole: bool = False) -> Iterator[Sink]:
    """A file that takes its name when it is whole, and says so.

    Args:
        keeps_whole: whether one that is given up takes its name too, with those files in it that have ended.

    Raises:
        OSError: it cannot be written.
    """
    stopped: BaseException | None = None
    with files.writing(path) as file:
        sink = _File(file)
        try:
            yield sink
        except BaseException as error:
            if not (keeps_whole and sink.has_whole):
                raise
            stopped = error
            sink.cut()
        sink.finish()
    files.finish(path)
    complain(f"wrote {path}" if stopped is None else f"wrote {path}, up to the last line that was spoken whole")
    if stopped is not None:
        raise stopped
