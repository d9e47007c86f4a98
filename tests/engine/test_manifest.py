"""A folder of weights is told from one that was changed, cut short or lost a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine.errors import SpeechError
from engine.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    verify_manifest,
    write_manifest,
)

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("t3.safetensors", "vocab.json"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    write_manifest(tmp_path, manifest_of(tmp_path))
    return tmp_path


def manifest_of(folder: Path) -> Manifest:
    files = {path.name: FileRecord(path.stat().st_size, sha256_of(path)) for path in sorted(folder.iterdir())}
    return Manifest("owner/name", "1" * 40, files)


def refusal(folder: Path, *, hashes: bool) -> str:
    with pytest.raises(SpeechError) as raised:
        verify_manifest(folder, hashes=hashes)
    assert raised.value.code == "weights_missing"
    return raised.value.message


def test_a_manifest_reads_back_as_it_was_written(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    manifest = manifest_of(folder)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert verify_manifest(folder, hashes=True) == manifest
    assert {path.name for path in folder.iterdir()} == {*manifest.files, MANIFEST}, "nothing else is left behind"


def test_a_folder_without_a_manifest_is_no_error(tmp_path: Path) -> None:
    assert verify_manifest(tmp_path, hashes=True) is None


def test_sizes_are_always_compared_and_content_when_asked(folder: Path) -> None:
    path = folder / "t3.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    assert verify_manifest(folder, hashes=False) is not None
    assert "t3.safetensors has another SHA-256" in refusal(folder, hashes=True)
    path.write_bytes(path.read_bytes()[:-1])
    assert "t3.safetensors has 1399 bytes, not 1400" in refusal(folder, hashes=False)


def test_every_file_that_differs_is_named(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    (folder / "t3.safetensors").write_bytes(b"")
    message = refusal(folder, hashes=False)
    assert "vocab.json is missing" in message
    assert "t3.safetensors has 0 bytes" in message
    assert "owner/name" in message


def test_files_of_the_same_commit_join_a_manifest() -> None:
    record = FileRecord(1, "0" * 64)
    manifest = Manifest("a/b", "1" * 40, {"b": record}).with_files({"a": record})
    assert list(manifest.files) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"files": {}}',
        json.dumps({"repository": "a/b", "revision": "c", "files": {"x": {"size": 1, "sha256": "short"}}}),
        json.dumps({"repository": "a/b", "revision": "c", "files": {"../x": {"size": 1, "sha256": "0" * 64}}}),
        json.dumps({"repository": "a/b", "revision": "c", "files": {"/x": {"size": 1, "sha256": "0" * 64}}}),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    assert "is not a manifest" in refusal(tmp_path, hashes=False)


_AS_NOBODY = """
import os, sys
from pathlib import Path
from engine.checkpoint import find_checkpoint
from engine.errors import SpeechError
from engine.models import MODELS
os.setgroups([]), os.setgid(65534), os.setuid(65534)  # after the imports: they may lie where nobody may look
where = {"model_dir": sys.argv[1]} if sys.argv[2] == "folder" else {"cache_dirs": [Path(sys.argv[1])]}
try:
    find_checkpoint(MODELS["turbo"], allow_download=False, **where)
except SpeechError as error:
    print(error.code, error.message)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("place", ["folder", "cache"])
def test_weights_that_another_user_keeps_to_itself_are_named_with_the_user_who_may_not_read(place: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        kept = Path(name, "kept")
        (kept / "models--ResembleAI--chatterbox-turbo").mkdir(parents=True)
        kept.chmod(0o700)
        command = [sys.executable, "-c", _AS_NOBODY, str(kept), place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("weights_missing "), done.stderr
    assert f"cannot be read by user {NOBODY}" in done.stdout
