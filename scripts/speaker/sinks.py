"""Where audio goes while it is spoken: speakers, a file, standard output, a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from scripts.batch import files
from scripts.console import complain
from scripts.speaker.unattended import unattended
from scripts.wav import WavError, WavReader, finish_sizes, streamed_header

_BLOCK_BYTES = 1 << 14  # whoever is cancelled waits for one: a third of a second at the speakers


class SinkError(Exception):
    """Audio that can go nowhere; the message says what would help."""


class Sink(Protocol):
    """Takes a file's bytes, and later perhaps another file's. Blocks.

    Attributes:
        may_hang: whether it may wait for ever, for somebody who reads; it then keeps nothing that has to be closed.
    """

    @property
    def may_hang(self) -> bool: ...

    def write(self, data: bytes) -> None:
        """The next bytes."""

    def end_file(self) -> None:
        """What comes now is another file.

        Raises:
            SinkError: the one that ended has not begun.
        """


async def write(sink: Sink, data: bytes) -> None:
    """Write in a thread.

    Whoever is cancelled waits until nobody writes, as no sink may be closed while it is written to; but not for a sink
    that may hang.

    Raises:
        SinkError, OSError: the sink's own.
    """
    for start in range(0, len(data), _BLOCK_BYTES):
        await _write_block(sink, data[start : start + _BLOCK_BYTES])


async def _write_block(sink: Sink, block: bytes) -> None:
    if sink.may_hang:
        await unattended(lambda: sink.write(block))
        return
    writing = asyncio.ensure_future(asyncio.to_thread(sink.write, block))
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
        """What comes now is another file.

        Raises:
            SinkError: of this one not even the header came.
        """
        if not self._reader.sample_rate:
            raise SinkError("the audio is a wav that ends before its first sample")
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

    may_hang = False

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
        with self._errors():
            if self._stream is None:
                rate, channels = self._samples.shape
                self._stream = self._library.RawOutputStream(samplerate=rate, channels=channels, dtype="int16")
                self._stream.start()
            self._stream.write(samples)

    def end_file(self) -> None:
        self._samples.end_file()

    def close(self) -> None:
        """Play to the end.

        Raises:
            SinkError: they are gone.
        """
        if self._stream is not None:
            with self._errors():
                self._stream.stop()
                self._stream.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._library.PortAudioError as error:
            raise SinkError(f"the speakers cannot be used: {error}; --output FILE writes a file instead") from error


class Straight:
    """What takes each piece at once and gives none back: standard output, a pipe, a device.

    Without a buffer: a program cannot end while a thread waits in that, for its lock.

    Args:
        opened: gives its descriptor; called with the first piece, as a pipe is opened only when somebody reads.
    """

    may_hang = True

    def __init__(self, opened: Callable[[], int]) -> None:
        self._opened = opened
        self._descriptor: int | None = None

    def write(self, data: bytes) -> None:
        """The next bytes.

        Raises:
            SinkError: it is a terminal.
            OSError: nobody takes them.
        """
        if self._descriptor is None:
            self._descriptor = _no_terminal(self._opened())
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def end_file(self) -> None:
        """Files of the kinds that may follow each other do."""

    def close(self) -> None:
        """Tell who reads that this was all. Not while it is written to."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def standard_output() -> Sink:
    """Standard output: for a player, or an encoder.

    Raises:
        SinkError: it is a terminal, or closed.
    """
    if sys.stdout is None:
        raise SinkError("standard output is closed")
    descriptor = _no_terminal(sys.stdout.fileno())
    return Straight(lambda: descriptor)


def _no_terminal(descriptor: int) -> int:
    if os.isatty(descriptor):
        raise SinkError("audio is nothing for a terminal; pipe it on, or name a file with --output")
    return descriptor


class OneWav:
    """Wav files as one: a header of its own, which knows no length, and the samples of all. Before another sink.

    Args:
        sink: takes the one.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._samples = _Samples()

    @property
    def may_hang(self) -> bool:
        return self._sink.may_hang

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

    may_hang = False

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
    """A file that takes its name when it is whole, and says so. What is there and is no file is written to as it is.

    Args:
        keeps_whole: whether one that is given up takes its name too, with those files in it that have ended.

    Raises:
        SinkError: it is a folder.
        OSError: it cannot be written.
    """
    if _is_file(path):
        with _new_file(path, keeps_whole=keeps_whole) as sink:
            yield sink
        return
    if path.is_dir():
        raise SinkError(f"{path} is a folder")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written to")
    flags = os.O_WRONLY | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    straight = Straight(lambda: os.open(path, flags))
    yield straight
    straight.close()  # what fails, or is cancelled, may still be written to, and ends with the program


def _is_file(path: Path) -> bool:
    """Whether a path is that of a file, or of nothing yet. Links are followed."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def _new_file(path: Path, *, keeps_whole: bool) -> Iterator[_File]:
    target = Path(os.path.realpath(path))
    stopped: BaseException | None = None
    with _made(target) as file:
        sink = _File(file)
        try:
            yield sink
        except BaseException as error:
            if not (keeps_whole and sink.has_whole):
                raise
            stopped = error
            sink.cut()
        sink.finish()
    complain(f"wrote {path}" if stopped is None else f"wrote {path}, up to the last line that was spoken whole")
    if stopped is not None:
        raise stopped


@contextlib.contextmanager
def _made(target: Path) -> Iterator[BinaryIO]:
    """A file beside its target, whose name it takes at the end. Under a name of its own: another run may have one."""
    own = target.with_name(f"speak-{uuid.uuid4().hex[:12]}")
    with files.writing(own) as file:
        yield file
    try:
        files.temporary(own).replace(target)
    except OSError:
        files.temporary(own).unlink(missing_ok=True)
        raise
