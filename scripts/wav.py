"""Wav files of 16-bit samples, also those that are streamed: begun before their length is known."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

_UNKNOWN_SIZE = 0xFFFFFFFF  # what stands for a size that is not known yet, as `engine.audio.encoding` streams it
_RIFF_SIZE_AT = 4
_MOST_HEADER_BYTES = 1 << 20
"""Before the samples; ours are 44, with a title some hundred."""


class WavError(Exception):
    """What is no wav of 16-bit samples."""


@dataclass(frozen=True)
class _Header:
    """What stands before the samples.

    Args:
        start: of the samples, in bytes.
        num_bytes: of samples, as the header says; None where it does not know.
        sample_rate: Hz.
        num_channels: 1 or more.
    """

    start: int
    num_bytes: int | None
    sample_rate: int
    num_channels: int

    @property
    def frame_bytes(self) -> int:
        return 2 * self.num_channels


class WavReader:
    """The samples of a wav that comes in pieces: those that it says it has, or all where it does not know.

    Attributes:
        sample_rate, num_channels: known once the first samples are given out; 0 before.
    """

    def __init__(self) -> None:
        self.sample_rate = self.num_channels = 0
        self._header: _Header | None = None
        self._held = b""  # of the header while it is not whole, then of a frame that is not
        self._num_left: int | None = None

    def push(self, data: bytes) -> bytes:
        """Take the file's next bytes; gives those of them that are samples, 16 bits each, whole frames.

        Raises:
            WavError: it is no wav of 16-bit samples.
        """
        data = self._held + data
        if self._header is None:
            self._header = _parse(data)
            if self._header is None:
                self._held = data
                return b""
            self.sample_rate, self.num_channels = self._header.sample_rate, self._header.num_channels
            self._num_left = self._header.num_bytes
            data = data[self._header.start :]
        return self._frames(data)

    def _frames(self, data: bytes) -> bytes:
        assert self._header is not None
        data = data[: self._num_left]  # what comes after them is padding, or other chunks
        end = len(data) - len(data) % self._header.frame_bytes
        self._held = data[end:]
        if self._num_left is not None:
            self._num_left -= end
        return data[:end]


def streamed_header(sample_rate: int, num_channels: int) -> bytes:
    """Of a wav of 16-bit samples whose length is not known; `finish_sizes` mends it in a file.

    Args:
        sample_rate: Hz.
        num_channels: 1 or more.
    """
    frame_bytes = 2 * num_channels
    shape = struct.pack("<IHHIIHH", 16, 1, num_channels, sample_rate, sample_rate * frame_bytes, frame_bytes, 16)
    unknown = struct.pack("<I", _UNKNOWN_SIZE)
    return b"RIFF" + unknown + b"WAVEfmt " + shape + b"data" + unknown


def finish_sizes(file: BinaryIO) -> None:
    """Tell a wav that was streamed the sizes that it was begun without. Any other file is left as it is.

    So is one of 4 GiB, whose sizes have no place in a wav. Of a last frame that is not whole nothing is kept.

    Args:
        file: can be read, written and sought in; where it stands afterwards is not said.

    Raises:
        OSError: the file's own.
    """
    file.seek(0)
    header = None
    with contextlib.suppress(WavError):
        header = _parse(file.read(_MOST_HEADER_BYTES))
    if header is None or header.num_bytes is not None:
        return
    num_bytes = file.seek(0, os.SEEK_END) - header.start
    num_bytes -= num_bytes % header.frame_bytes
    end = header.start + num_bytes
    if end - 8 >= _UNKNOWN_SIZE:
        return
    for place, size in ((_RIFF_SIZE_AT, end - 8), (header.start - 4, num_bytes)):
        file.seek(place)
        file.write(struct.pack("<I", size))
    file.truncate(end)


def _parse(data: bytes) -> _Header | None:
    """A wav's header from its first bytes, None while they are too few."""
    if not b"RIFF".startswith(data[:4]) or not b"WAVE".startswith(data[8:12]):
        raise WavError("the audio is no wav")
    place, shape = 12, (0, 0)
    while len(data) >= place + 8:
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8
        if name == b"data":
            return _header(place, size, *shape)
        if name == b"fmt " and len(data) >= place + 16:
            shape = _shape(data[place : place + 16])
        place += size + size % 2
    if len(data) >= _MOST_HEADER_BYTES:
        raise WavError("the audio is a wav without samples")
    return None


def _header(start: int, size: int, sample_rate: int, num_channels: int) -> _Header:
    if not (sample_rate and num_channels):
        raise WavError("the audio is a wav that does not say of what kind it is")
    return _Header(start, None if size == _UNKNOWN_SIZE else size, sample_rate, num_channels)


def _shape(chunk: bytes) -> tuple[int, int]:
    """Hz and channels, of a chunk that says that its samples have 16 bits."""
    kind, num_channels, sample_rate, _, _, num_bits = struct.unpack("<HHIIHH", chunk)
    if (kind, num_bits) != (1, 16):
        raise WavError("the audio is no wav of 16-bit samples")
    return sample_rate, num_channels
