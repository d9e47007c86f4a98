"""Fetching weights: a file has one writer at a time, up to the moment when it is in its place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from engine import hub
from engine.hub import Listing, RemoteFile, download

CONTENT = b"weights"
LISTING = Listing(
    "owner/name", "c" * 40, (RemoteFile("t3.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "0" * 40),)
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A hub that gives the content; where each request began in the file."""
    places: list[int] = []

    def http_get(_url: str, stream: Any, *, resume_size: int, **_: Any) -> None:
        places.append(resume_size)
        stream.write(CONTENT[resume_size:])

    monkeypatch.setattr("huggingface_hub.file_download.http_get", http_get)
    return places


def fetch(folder: Path) -> None:
    download(LISTING, lambda file: folder / file.name, lambda _done, _total: None, None)


def test_a_file_is_another_processes_until_its_content_is_checked_and_it_is_in_its_place(
    asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def checked(path: Path) -> str:
        if path.name.endswith(".part"):
            with pytest.raises(ConnectionError) as refusal:
                fetch(tmp_path)
            refused.append(str(refusal.value))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(hub, "sha256_of", checked)
    fetch(tmp_path)
    assert len(refused) == 1 and "being fetched by another process" in refused[0]
    assert (tmp_path / "t3.bin").read_bytes() == CONTENT and asked == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["t3.bin"]


def test_half_a_file_is_gone_on_with_and_a_damaged_one_is_not_left(asked: list[int], tmp_path: Path) -> None:
    part = tmp_path / f".t3.bin.{LISTING.files[0].etag[:12]}.part"
    part.write_bytes(b"XX")
    with pytest.raises(ConnectionError, match="damaged"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    part.write_bytes(CONTENT[:3])
    fetch(tmp_path)
    assert asked == [2, 3] and (tmp_path / "t3.bin").read_bytes() == CONTENT
