"""A library in a folder, which may be a network volume that many workers mount.

A blob is written under a temporary name, flushed to disk, and only then given its name by one rename or
hard link, so a reader sees it whole and a crash leaves a temporary file at most. Nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from voice_library.errors import LibraryError
from voice_library.store import Entry, check_key, is_key

_TEMPORARY = "tmp"
_COARSEST_MTIME_S = 2.0
"""Two writes within this time may carry equal times (FAT has 2 s, ext4 and NFS some milliseconds)."""
_FOLDER_ATTEMPTS = 5
"""Another worker may remove a folder that just became empty between our making it and our using it."""
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})


class FolderStore:
    """Blobs as files under a folder, which is made when the first one is written.

    Args:
        root: the folder. A missing one is an empty store.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    num_serial_reads = 64

    def describe(self) -> str:
        return str(self._root)

    def read(self, key: str, max_bytes: int) -> bytes | None:
        with self._reported("read", key):
            try:
                with open(self._path(key), "rb") as file:
                    return file.read(max_bytes + 1)
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes) -> None:
        with self._reported("write", key), self._temporary(data) as temporary:
            self._in_folder_of(self._path(key), lambda path: os.replace(temporary, path))

    def create(self, key: str, data: bytes) -> bool:
        with self._reported("write", key), self._temporary(data) as temporary:
            try:
                self._in_folder_of(self._path(key), lambda path: self._link(temporary, path))
            except FileExistsError:
                return False
        return True

    def replace(self, key: str, data: bytes, version: str) -> bool:
        # A folder has no compare-and-swap: the time between this look and the rename is not covered.
        with self._reported("write", key), self._temporary(data) as temporary:
            if not self._is_version(key, version):
                return False
            os.replace(temporary, self._path(key))
            _flush_folder(self._path(key).parent)
        return True

    def remove(self, key: str, version: str) -> bool:
        path, aside = self._path(key), self._new_temporary()
        with self._reported("delete", key):
            if not self._is_version(key, version):
                return False
            aside.parent.mkdir(parents=True, exist_ok=True)  # copying a library may leave empty folders out
            try:
                os.rename(path, aside)
            except FileNotFoundError:
                return False
            try:
                if _version(os.stat(aside)) == version:
                    _flush_folder(path.parent)
                    return True
                with contextlib.suppress(FileExistsError):  # another came between the look and the rename: put it back
                    self._link(aside, path)
                return False
            finally:
                aside.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._reported("delete", key):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                _flush_folder(path.parent)
            self._prune(path.parent)

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._reported("list", prefix):
            now_s = time.time()
            folder = prefix.rpartition("/")[0]
            for key, status in _files(self._root, folder):
                if key.startswith(prefix) and is_key(key):
                    yield _entry(key, status, now_s)

    def sweep(self, older_than_s: float) -> int:
        limit_s, num_swept = time.time() - older_than_s, 0
        with self._reported("sweep", _TEMPORARY):
            for name, status in _files(self._root, _TEMPORARY):
                if status.st_mtime < limit_s:
                    with contextlib.suppress(FileNotFoundError):
                        (self._root / name).unlink()
                        num_swept += 1
        return num_swept

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextlib.contextmanager
    def _reported(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)) + (_remedy(self._root) if error.errno in _FORBIDDEN else "")
            raise LibraryError("storage_failed", f"could not {verb} {key} in {self._root}: {reason}") from error

    def _new_temporary(self) -> Path:
        return self._root / _TEMPORARY / f"{os.getpid()}-{secrets.token_hex(8)}"

    def _is_version(self, key: str, version: str) -> bool:
        try:
            return _version(os.stat(self._path(key))) == version
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """A file of this content on disk, gone afterwards unless it was renamed."""
        path = self._new_temporary()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink()

    def _in_folder_of(self, path: Path, place: Callable[[Path], None]) -> None:
        for attempt in range(_FOLDER_ATTEMPTS):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                place(path)
                break
            except FileNotFoundError:
                if attempt == _FOLDER_ATTEMPTS - 1:
                    raise
        _flush_folder(path.parent)

    @staticmethod
    def _link(temporary: Path, path: Path) -> None:
        """Give a file a second name, which fails with FileExistsError if the name is taken."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            # Over a network the first answer can get lost and the call be sent again: then the link is ours.
            if os.stat(temporary).st_nlink < 2:
                raise
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            # An empty file holds the name until the rename: after a crash in between, it is known by its
            # size for a name that was taken and never filled.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            os.replace(temporary, path)

    def _prune(self, folder: Path) -> None:
        """Remove folders that became empty, up to the root's own."""
        while folder.parent != self._root and folder.is_relative_to(self._root):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _files(root: Path, folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Files below a folder of the root, by their names from the root on; what vanishes while we look was deleted
    by another worker."""
    try:
        found = os.scandir(root / folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with found:
        for item in found:
            name = f"{folder}/{item.name}" if folder else item.name
            if item.is_dir(follow_symlinks=False):
                yield from _files(root, name)
                continue
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield name, status


def _entry(key: str, status: os.stat_result, now_s: float) -> Entry:
    settled = now_s - status.st_mtime > _COARSEST_MTIME_S
    return Entry(key, status.st_size, status.st_mtime, _version(status), settled)


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_ino}-{status.st_size}"


def _flush_folder(folder: Path) -> None:
    """Make a rename or removal outlive a power cut; some network volumes cannot, and say so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remedy(root: Path) -> str:
    """A volume belongs to the user who made it, often root: say whose the folder must become."""
    user = os.geteuid()
    return f" (this process runs as user {user}: make the folder and give it to that user, chown -R {user} {root})"
