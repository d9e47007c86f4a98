"""An encoded audio file that has no name: in memory, or in a temporary file that may be larger than memory."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

AUDIO_FIELDS = ("audio", "sample_audio")
"""Fields of a result that hold a file as base64; where there are both, it is the same."""

_BASE64_BLOCK_BYTES = 3 << 20  # a multiple of three: its base64 is a piece of the whole's
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class AudioFile:
    """A file's bytes, which can be read again and again, by several at a time.

    Args:
        num_bytes: its size.
        open: gives the file from its start on; each time one of its own, to be closed by whoever asked.
    """

    num_bytes: int
    open: Callable[[], BinaryIO]

    @classmethod
    def of_bytes(cls, data: bytes) -> AudioFile:
        """A file in memory."""
        return cls(len(data), lambda: io.BytesIO(data))

    @classmethod
    def of_temporary(cls, file: BinaryIO) -> AudioFile:
        """What an open file on disk holds; it must be open wherever this is opened, but not while that is read."""
        return cls(os.fstat(file.fileno()).st_size, lambda: _reader(file))

    @property
    def num_base64_chars(self) -> int:
        """Length of the file as base64."""
        return (self.num_bytes + 2) // 3 * 4

    def as_base64(self) -> str:
        """The file as text. Blocks."""
        with self.open() as file:
            parts = iter(lambda: file.read(_BASE64_BLOCK_BYTES), b"")
            return b"".join(base64.b64encode(part) for part in parts).decode("ascii")


def _reader(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Reader(os.dup(file.fileno())), _BUFFER_BYTES))


class _Reader(io.RawIOBase):
    """A file with a position of its own: whoever else has it open neither moves it nor closes it.

    Args:
        descriptor: of the open file; closed with this, at the latest when nothing refers to it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.pread(self._descriptor, len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}
        self._position = start[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)
