"""What a folder of weights should hold, written beside them when they are fetched, and whether it still does.

A truncated copy, a volume that lost blocks or a file that someone replaced is told by its name before a
model speaks with it. A manifest guards against damage, not against someone who would change it too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import SpeechError

MANIFEST = "weights-manifest.json"
"""Its name in the folder."""

_MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """One file: its size in bytes and its content's SHA-256 in lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Where a folder's weights are from.

    Args:
        repository: at the hub, "owner/name".
        revision: the commit.
        files: by name; other files of the folder are not spoken of.
    """

    repository: str
    revision: str
    files: Mapping[str, FileRecord]

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """This one and more files of the same commit, sorted by name."""
        return dataclasses.replace(self, files=dict(sorted({**self.files, **files}.items())))

    def differences(self, folder: Path, *, hashes: bool) -> Iterator[str]:
        """What of this a folder does not hold, one line per file; with `hashes`, content is read too."""
        for name, record in self.files.items():
            if difference := _difference(folder / name, record, hashes=hashes):
                yield f"{name} {difference}"


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none.

    Raises:
        SpeechError: weights_missing for one that cannot be read.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            return _parse(json.loads(file.read(_MAX_MANIFEST_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a manifest"
        raise SpeechError("weights_missing", f"{path} cannot be read: {reason}", "model_dir") from error


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write it beside the weights; a reader finds the former one or this one, whole.

    Returns:
        The file.

    Raises:
        OSError: as the file system says.
    """
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{MANIFEST}-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(folder / MANIFEST)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return folder / MANIFEST


def verify_manifest(folder: Path, *, hashes: bool) -> Manifest | None:
    """Compare a folder with its manifest.

    Args:
        hashes: whether to read the files and compare their content too; some seconds per GB.

    Returns:
        The manifest; None where the folder has none, as one that was not fetched by this project.

    Raises:
        SpeechError: weights_missing, naming every file that is missing or differs.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    differences = list(manifest.differences(folder, hashes=hashes))
    if differences:
        raise SpeechError(
            "weights_missing",
            f"{folder} is not what was fetched from {manifest.repository} at {manifest.revision}: "
            f"{', '.join(differences)}. Fetch it again.",
            "model_dir",
        )
    return manifest


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex.

    Raises:
        OSError: as the file system says.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(path: Path, record: FileRecord, *, hashes: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"has {size} bytes, not {record.size}"
        return "has another SHA-256" if hashes and sha256_of(path) != record.sha256 else None
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:  # a volume that lost blocks, a file of another user's
        return f"cannot be read by user {os.geteuid()}: {error.strerror}"


def _parse(content: dict[str, Any]) -> Manifest:
    """Raises ValueError, KeyError, TypeError or AttributeError for what is none."""
    files = {name: FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    for name, record in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a file outside the folder: {name}")
        if not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
            raise ValueError(f"no SHA-256: {record.sha256}")
    return Manifest(str(content["repository"]), str(content["revision"]), files)
