"""Audio files that are whole or not there: written under another name, made sure of, then renamed."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def temporary(path: Path) -> Path:
    """Where a file is while it is written. The same each time: a folder has one run, and a file one writer."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file under its temporary name, on the disk when the block ends; nothing is left of one that is not whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_base64(path: Path, text: str) -> int:
    """Write what base64 says under the temporary name; its number of bytes.

    Raises:
        ValueError: for what is no base64.
    """
    data = base64.b64decode(text, validate=True)
    with writing(path) as file:
        file.write(data)
    return len(data)


def finish(path: Path) -> None:
    """Give a written file its own name."""
    temporary(path).replace(path)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not there."""
    with writing(path) as file:
        file.write(text.encode("utf-8", "replace"))  # what a worker says may hold half a character
    finish(path)


def is_whole(path: Path, num_bytes: int | None) -> bool:
    """Whether a file is there, of the size that it was written with."""
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not on Windows, and not on every network's file system
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
