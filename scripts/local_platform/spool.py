"""JSON that is kept until nobody refers to it any more: what is small in memory, what is large in unnamed files.

Thousands of results with their audio would fill the memory. A file is filled with many, one after the other, and
closed (which frees it, since it has no name) when the last of them is forgotten.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass

_IN_MEMORY_BYTES = 16_384
_FILE_BYTES = 256 << 20


class _File:
    """An open file without a name."""

    def __init__(self) -> None:
        self.descriptor, path = tempfile.mkstemp(prefix="local-platform-")
        os.unlink(path)
        weakref.finalize(self, os.close, self.descriptor)
        self.num_bytes = 0

    def append(self, data: bytes) -> int:
        """Where it begins."""
        start = self.num_bytes
        written = 0
        while written < len(data):
            written += os.pwrite(self.descriptor, memoryview(data)[written:], start + written)
        self.num_bytes += len(data)
        return start


@dataclass(frozen=True)
class Kept:
    """Some bytes, here or in a file."""

    data: bytes
    file: _File | None = None
    start: int = 0
    num_bytes: int = 0

    def read(self) -> bytes:
        """The bytes."""
        if self.file is None:
            return self.data
        data = b""
        while len(data) < self.num_bytes:
            data += os.pread(self.file.descriptor, self.num_bytes - len(data), self.start + len(data))
        return data


class Spool:
    """Where bytes are given to be kept. For one thread."""

    def __init__(self) -> None:
        self._file: _File | None = None

    def keep(self, data: bytes) -> Kept:
        """Keep bytes for as long as there is a reference to what this returns."""
        if len(data) <= _IN_MEMORY_BYTES:
            return Kept(data)
        if self._file is None or self._file.num_bytes + len(data) > _FILE_BYTES:
            self._file = _File()
        return Kept(b"", self._file, self._file.append(data), len(data))
