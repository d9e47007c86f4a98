"""A folder of another user, as a network volume's is at first: refused by name, and writable by either remedy."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = 10001
ROOTS_GROUP = 0  # as the image's user has it

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")

_WRITE = f"""
import os, sys
from pathlib import Path
from voice_library import LibraryError
from voice_library.folder_store import FolderStore
os.setgroups([]), os.setgid({ROOTS_GROUP}), os.setuid({WORKER})  # after the imports: they may lie where it may not look
try:
    store = FolderStore(Path(sys.argv[1]))
    store.write("voices/anna", b"x")
    print("written", store.read("voices/anna", 10))
except LibraryError as error:
    print(error.code, error.message)
"""


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder as root makes it, where everyone may look."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name, "voices")
        folder.mkdir(mode=0o755)
        yield folder


def write_as_worker(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WRITE, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("name", ["", "made/by/the/worker"])
def test_a_folder_of_roots_is_refused_with_the_user_the_folder_and_the_remedy(volume: Path, name: str) -> None:
    message = write_as_worker(volume / name)
    assert message.startswith("storage_failed ")
    assert f"user {WORKER}" in message
    assert f"chown -R {WORKER} {volume / name}" in message


def test_giving_the_folder_to_the_user_is_enough(volume: Path) -> None:
    os.chown(volume, WORKER, -1)
    assert write_as_worker(volume).startswith("written b'x'")


def test_opening_the_folder_to_roots_group_is_enough_too(volume: Path) -> None:
    volume.chmod(0o775)
    assert write_as_worker(volume).startswith("written b'x'")
