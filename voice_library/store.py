"""Where a library lies: named blobs in a folder or in a bucket, behind one small protocol.

Every rule that makes the library safe among many workers is built from three promises of a store: a write
is seen whole or not at all, `create` has one winner, and what a call has written is there for every later
call of any worker. No store holds a lock that a dead worker could keep.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class Entry:
    """One blob in a listing.

    Args:
        key: its name, parts joined by '/'.
        num_bytes: its size.
        modified_s: when it was written, seconds since 1970 by the store's clock.
        version: changes when the content does.
        settled: False while another write could still leave `version` as it is (coarse file times).
    """

    key: str
    num_bytes: int
    modified_s: float
    version: str
    settled: bool = True


class Store(Protocol):
    """Blobs under keys such as `voices/anna/claim.json`.

    Every method blocks, may be called from any thread, and raises LibraryError storage_failed when the
    storage does.
    """

    @property
    def num_serial_reads(self) -> int:
        """So many small reads are faster one after another than in threads."""

    def describe(self) -> str:
        """The store's place, for messages; without secrets."""

    def read(self, key: str, max_bytes: int) -> bytes | None:
        """A blob, or None when there is none. One larger than `max_bytes` comes back cut after
        `max_bytes` + 1 bytes, so that a swapped file never fills the memory."""

    def write(self, key: str, data: bytes) -> None:
        """Write a blob whole, over any other."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a blob whole if there is none; False, and nothing changed, if there is one."""

    def replace(self, key: str, data: bytes, version: str) -> bool:
        """Write a blob whole over the one of this version; False, and nothing changed, if it is gone or another."""

    def remove(self, key: str, version: str) -> bool:
        """Remove the blob of this version; False, and nothing changed, if it is gone or another."""

    def delete(self, key: str) -> None:
        """Remove a blob; nothing happens if there is none."""

    def list(self, prefix: str) -> Iterable[Entry]:
        """All blobs whose keys begin with `prefix`, in no particular order. What lies there under names that are
        no keys (a file manager's, a file system's) is not the library's and stays out of sight."""

    def sweep(self, older_than_s: float) -> int:
        """Remove what killed writers left behind that no key names; returns how many."""

    def close(self) -> None:
        """Let go of connections."""


def is_key(name: str) -> bool:
    """Whether a store could have written something under this name."""
    return _KEY.fullmatch(name) is not None


def check_key(key: str) -> str:
    """The key, asserted to be one: whatever comes from outside was checked or hashed long before."""
    assert is_key(key), key
    return key
